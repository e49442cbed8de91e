"""What a probe is: a measurement that one ordinary training step does not show, such as a Hessian product.

A probe runs on some steps, in the optimizer's pre-step hook or, where that step was given a closure, after its first
evaluation: the parameters are those of the step's forward, the gradients are there, the update has not been made. It
may run the models as often as its time allows; it must leave no trace and free what it built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from monitor.curvature.environment import cloned_buffers, undisturbed
from monitor.errors import UsageError
from monitor.record.private import unseen
from monitor.record.tape import Tape

if TYPE_CHECKING:
    from monitor.record.recorder import Recorder
    from monitor.record.ring import Values
    from monitor.store.parts import Vectors


@dataclass(frozen=True)
class Moment:
    """What a probe is given.

    Attributes:
        step: updates completed.
        models: root modules, unwrapped.
        optimizer: the optimizer that is about to update.
        tapes: one per call of `backward` in this step; empty unless the probe is ``taped``.
        first: the tape of the first micro-batch of the run, on data of its own: a fixed probe set. None unless the
            probe ``keeps_first``.
        local: where several processes average their gradients: by the id of a parameter, what this process's own
            backward passes gave in this step, neither unscaled nor clipped. None where ``.grad`` is that.
    """

    step: int
    models: Sequence[nn.Module]
    optimizer: Optimizer
    tapes: Sequence[Tape]
    first: Tape | None
    recorder: Recorder
    local: Mapping[int, Tensor] | None = None

    @property
    def model(self) -> nn.Module:
        """The first root module."""
        return self.models[0]

    @property
    def devices(self) -> list[torch.device]:
        """Where the parameters are, each once."""
        return list(dict.fromkeys(p.device for m in self.models for p in m.parameters()))

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizer that is about to update, then the others that have."""
        return [self.optimizer, *(o for o in self.recorder.optimizers if o is not self.optimizer)]

    @property
    def samples(self) -> int:
        """How many samples the first batch of the run holds; 0 without one.

        Raises:
            UsageError: if the model was called with no tensor that has a first dimension.
        """
        if self.first is None:
            return 0
        sizes = [len(x) for x in tree_leaves(self.first.inputs) if isinstance(x, Tensor) and x.dim() > 0]
        if not sizes:
            raise UsageError("the model's first call had no tensor, so its samples cannot be told apart")
        return sizes[0]

    def parameter(self, p: Tensor) -> str:
        """Name of a parameter."""
        return self.recorder.parameter(p)

    def emit(self, reads: str, stats: Sequence[str], module: str, values: Values) -> None:
        """Write the statistics of one module into the row of this step; see `Recorder.emit`."""
        self.recorder.emit(reads, stats, module, values)

    def table(self, name: str, vectors: Vectors) -> None:
        """Write a table of vectors for this step.

        Args:
            name: snake_case.
            vectors: the columns; nobody may write to them any more.
        """
        self.recorder.flusher.table(name, self.step, vectors)

    def again(self) -> AbstractContextManager[None]:
        """For calls that have been made before in this measurement: one of several processes need not look once more.

        It looks at every operation otherwise, for one that needs the other processes.
        """
        return unseen()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The models in evaluation mode, without gradients; afterwards everything is bit for bit as it was.

        Modes, attributes, buffers, random states and backend flags are put back; autocast is off.
        """
        devices = self.devices
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(undisturbed(model, "eval", devices))
                stack.enter_context(cloned_buffers(model))
            stack.enter_context(torch.no_grad())
            yield


class Sparsely:
    """When a table of the samples is due: once the steps have grown by half since the last, so that few are made."""

    def __init__(self) -> None:
        self._next = 0.0

    def due(self, step: int) -> bool:
        """True if it is time at ``step``; the next time is later then."""
        if step < self._next:
            return False
        self._next = 1.5 * max(1, step)
        return True


class Probe(ABC):
    """Base of all probes.

    Where several processes train, the first measures its own batch while the others wait for it.

    Attributes:
        name: for messages; of the metric it is best known by.
        every: measure at each so many steps, whatever it costs; None: as often as the budget allows.
        share: the largest share of the run's time it may take without ``every``.
        cost: its cost in training steps before it has been measured.
        taped: it needs the tapes of the step.
        keeps_first: it needs the first micro-batch of the run.
        default: it runs though nobody asked for it, so its being not wanted is no news.
        elsewhere: what measures the same where several processes train and one alone cannot; "" if nothing does.
    """

    name = ""
    every: int | None = None
    share = 0.01
    cost = 1.0
    taped = False
    keeps_first = False
    default = False
    elsewhere = ""

    def begin(self) -> None:  # noqa: B027  # most remember nothing
        """A recording begins: forget what is remembered of another."""

    def wanted(self, recorder: Recorder) -> str | None:
        """Why it cannot be measured in this run; None if it can."""
        return None

    def affordable(self, elapsed: float, step: float, spent: float, last: float | None) -> bool:
        """True if a measurement fits into the budget now; asked before every step if ``every`` is None.

        Args:
            elapsed: seconds that the training itself has taken.
            step: seconds of one step, their mean.
            spent: seconds that this probe has taken.
            last: seconds of its last measurement, None before the first.
        """
        return spent + (self.cost * step if last is None else last) <= self.share * elapsed

    def unmet(self) -> str | None:
        """What it should have measured and did not get to in the time it may take; None if there is no such thing."""
        return None

    @abstractmethod
    def measure(self, moment: Moment) -> None:
        """Measure and emit. Runs without gradients, with every mode of the user's and ours off.

        Raises:
            UsageError: if it cannot be done; the message goes into the run and the probe is not tried again.
        """
