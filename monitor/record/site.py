"""What a site is: a place of the training step that is told when something happens there and records statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from monitor.record.mode import Watcher
    from monitor.record.recorder import Recorder


#: Steps at the beginning of a run at which everything is measured every step.
START = 10
#: Why nothing is known of what is called inside a model, where its replicas are called in its place.
REPLICAS = "nn.DataParallel calls copies of the model in threads of their own, where nothing is watched"


class Site:
    """Base of all sites. Each method is called inside the recorder's guard: if it raises, training goes on without it.

    A method runs with gradients, function modes and dispatch modes off. It must not keep a tensor of the training
    beyond the step, draw random numbers, write to anything of the user's or wait for the device.
    """

    name = ""
    #: Steps between two at which its functions matter when they are called inside a root module's forward. Of a site
    #: with 1 it is not known beforehand: once one of them has been called in there, every forward is watched.
    inside_every = 1
    #: True if it looks at every step at what a step costs most to look at: does not listen at steps that are left out.
    dense = False
    #: True if what it watches for is the loss of an evaluation.
    looks = False

    def __init__(self, recorder: Recorder) -> None:
        self.rec = recorder

    def due(self, every: int, step: int | None = None, first: int = START) -> bool:
        """True if something measured every so many steps is due now (or at ``step``); up to ``first`` it always is."""
        step = self.rec.step if step is None else step
        return step < first or step % (-(-every // self.rec.every) * self.rec.every) == 0

    def listens(self, step: int) -> bool:
        """True if it is told of ``step``: the answer must be the same whenever it is asked for."""
        return self.due(self.inside_every, step) if self.dense or self.inside_every > 1 else True

    def before(self) -> dict[Any, Watcher]:
        """Functions to watch before they run."""
        return {}

    def after(self) -> dict[Any, Watcher]:
        """Functions to watch after they ran."""
        return {}

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A root module's training forward is about to run."""

    def on_inner(self, module: nn.Module) -> None:
        """A followed module is being called inside another's training forward, in a step in which a probe is due."""

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A root module's training forward has ended."""

    def on_evaluation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A root module's forward without gradients has ended: an evaluation, if the module is in that mode."""

    def on_backward(self) -> None:
        """Backward is about to run."""

    def before_closure(self, optimizer: Optimizer) -> None:
        """The first optimizer of a row has begun a step with a closure, whose evaluations will be heard of."""

    def before_evaluation(self, optimizer: Optimizer) -> None:
        """That closure is evaluated for the first time in this step; only where a probe waits for the end of it."""

    def before_update(self, optimizer: Optimizer) -> None:
        """The first optimizer of a row is about to make its update. Function modes entered in here do see calls.

        If its step was given a closure, that may have been evaluated once.
        """

    def on_step(self, optimizer: Optimizer) -> None:
        """One optimizer has just made an update; gradients are still there."""

    def on_row(self) -> None:
        """The row of this step is about to be closed."""

    def waiting(self) -> bool:
        """True if something was given that belongs to a row nobody has closed yet."""
        return False

    def missing(self) -> Sequence[tuple[str, str]]:
        """What this site could not record so far, and why: ``(metric, reason)``."""
        return ()
