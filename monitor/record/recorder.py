"""The recorder: decides when sites look, closes a row per step, hands rows on. Runs on the training's own thread.

A step is what the optimizer's post-step hook says it is; accumulation, loss scaling, closures and clipping then
fall out right. Whatever fails in here disables the site it failed in, is written into the run and warned of once.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from monitor.errors import MonitorWarning
from monitor.record.closure import Arguments, find_closure, watched, with_closure
from monitor.record.copies import hook_calls
from monitor.record.facts import compiled_regions, unwrap
from monitor.record.flush import Taker
from monitor.record.followed import FAST, Followed, children_called, find_bystanders
from monitor.record.mode import StepMode, Watcher
from monitor.record.part import is_parted
from monitor.record.private import alone, captures, compiled_any, quiet, transformed
from monitor.record.probe import Probe
from monitor.record.ring import Values
from monitor.record.rows import OpenRow
from monitor.record.site import START, Site
from monitor.record.sites._all import PARTED, SITES
from monitor.record.sites._backward import BACKWARD
from monitor.record.stack import Stack

#: Steps for which it is looked up beforehand who is told of them.
AHEAD = 50
#: What is absent unless the other processes record too.
SHARDED = "grad_norm", "the parameters are sharded: norms are those of this process alone"
#: Wrappers that are called in a model's place, and then do not call it, or copies of it.
_WRAPPERS = ("OptimizedModule", "DataParallel")


class Recorder:
    """Records one run.

    Args:
        models: root modules, as the user calls them (possibly wrapped).
        flusher: takes the rows; owns the writer thread.
        optimizers: follow only these; default: every optimizer that trains a parameter of the models.
        probes: what is measured beyond the ordinary step.
        follow_all: also follow optimizers that train other models, and look for those (used by ``monitor run``).
        start_step: number of the first row.
        every: steps between two at which the dense sites look.
        part: record no more than this process's parts of parameters that are parted.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        flusher: Taker,
        *,
        optimizers: Sequence[Optimizer] = (),
        probes: Sequence[Probe] = (),
        follow_all: bool = False,
        start_step: int = 0,
        every: int = 1,
        part: bool = False,
    ) -> None:
        self.flusher = flusher
        self.random = random.Random(0)
        self.step, self.every = start_step, every
        self.epoch = 0  # counts attempts at an update: a loss of a skipped one belongs to no row
        self.inverse_scale: Tensor | None = None
        self.in_step = False
        self.training = False
        self.stepped = 0
        self.spent = 0.0
        self.probed = 0.0  # part of it that probes took
        self.probes = probes
        self.probing = False  # a probe is due in this step
        self.awaiting = False  # and measured when the closure that the step was given has been evaluated
        self.evaluations = 0  # of that closure that have begun
        self.in_closure = False
        self.rows = 0
        self.followed = Followed(optimizers, self.adopt if follow_all else None)
        for model in models:
            self.followed.add(model)
        self._only: frozenset[str] | None = None  # parameters of which something is recorded
        if part:
            whole = {id(p): p for root in self.followed.roots for p in root.parameters()}
            self._only = frozenset(self.parameter(p) for p in whole.values() if is_parted(p))
        self.device = self.followed.device
        self.on_cpu = self.device.type == "cpu"
        self._captures = captures(self.device)
        self._captured = False
        self._open_row = OpenRow(self.device, flusher)
        self._hooks: list[Any] = []
        self._entries: dict[int, bool] = {}
        self._prefixes: dict[int, str] = {}
        self._row: list[int] = []
        self._ended: set[int] = set()  # optimizers whose last step is over
        self._expected: frozenset[int] = frozenset()
        self._unscaled_since_backward = False
        self._depth = 0
        self._redirected: list[int] = []  # calls of modules that call something else in their place
        self._was_on, self._trained = False, False  # as it was before the forward: the mode, and `training`
        self.forwards = 0  # of root modules in this step
        self.blind = False  # calls inside one of them were not watched
        self.replicated = False  # copies of one are called in its place
        self._eval_trained = False
        self._layers: dict[int, weakref.WeakSet[nn.Module]] = {}
        self._kept_fast = False
        self._beside: set[int] = set()  # modules that are not ours
        self._called_inside = False  # a loss, a backward or a clipping inside a root module's forward
        self._thread: int | None = None  # that trains; known from the first training forward or update
        self._pid = os.getpid()
        self._missing: list[tuple[str, str]] | None = None
        self.active = True
        self.sites: list[Site] = [kind(self) for kind in (PARTED if part else SITES)]
        self._broken: set[str] = set()
        # most sites care for few of the moments of a step: call those only
        self._on = {
            moment: [
                (s, getattr(s, moment)) for s in self.sites if getattr(type(s), moment) is not getattr(Site, moment)
            ]
            for moment in (
                "on_forward",
                "on_inner",
                "on_output",
                "on_evaluation",
                "on_backward",
                "before_closure",
                "before_evaluation",
                "before_update",
                "on_step",
                "on_row",
            )
        }
        # of these, the ones that are told, by who listens; and who listens to the steps to come, the last first
        self._tellings: dict[frozenset[Site], dict[str, list[Any]]] = {}
        self._ahead: list[frozenset[Site]] = []
        before: dict[Any, list[_Watches]] = {func: [] for func in BACKWARD}
        after: dict[Any, list[_Watches]] = {}
        for site in self.sites:
            for func, watcher in site.before().items():
                before.setdefault(func, []).append((site, watcher, False))
            for func, watcher in site.after().items():
                after.setdefault(func, []).append((site, watcher, site.looks))
        self.mode = StepMode(
            {f: self._watching(told, self._backward_begins if f in BACKWARD else None) for f, told in before.items()},
            {f: self._watching(told) for f, told in after.items()},
        )
        self.stack = Stack(self.mode, self._entries, self._here, self._guard)
        self._listen()
        for model in models:
            self.adopt(model)
        self._hooks.append(register_optimizer_step_pre_hook(self._before_step))
        self._hooks.append(register_optimizer_step_post_hook(self._after_step))
        _LIVE.add(self)

    # ---- what is followed

    def adopt(self, model: nn.Module) -> None:
        """Follow another root module, as the user calls it."""
        root = self.followed.add(model)
        prefix = "" if root is self.roots[0] else f"model[{len(self.roots) - 1}]."
        for m in dict.fromkeys((model, root)):
            self._enter_at(m, prefix)
        # a container cannot be called, nor need Lightning's module be, whose training step calls the parts
        in_parts = (
            callable(getattr(root, "training_step", None)) or getattr(type(root), "forward", None) is nn.Module.forward
        )
        if in_parts and not compiled_regions(root):
            self._enter_at_parts(root)

    def _enter_at(self, module: nn.Module, prefix: str) -> None:
        """Hook the calls of ``module``, once. A layer that drops its fast path when it has hooks gets none."""
        if id(module) in self._entries or isinstance(module, nn.TransformerEncoderLayer):
            return
        self._entries[id(module)] = False
        self._prefixes[id(module)] = prefix
        self._hooks += hook_calls(module, self._before_forward, self._after_forward)

    def prefix(self, module: nn.Module) -> str:
        """What distinguishes the arguments of one hooked module from those of the others; empty for the first root."""
        return self._prefixes.get(id(module), "")

    @property
    def roots(self) -> Sequence[nn.Module]:
        """The root modules that are followed, unwrapped."""
        return self.followed.roots

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that have made an update and are alive."""
        return self.followed.optimizers

    def parameter(self, p: Tensor) -> str:
        """Name of a parameter; one that belongs to no followed module is named by its place in an optimizer."""
        return self.followed.parameter(p, self.step)

    def label(self, optimizer: Optimizer) -> str:
        """Name of an optimizer: empty for the first that stepped, so that a second one does not rename it."""
        return self.followed.label(optimizer)

    def updates(self, optimizer: Optimizer) -> int:
        """Updates of this optimizer since it was first seen, including one under way."""
        return self.followed.updates(optimizer)

    @property
    def inside_forward(self) -> bool:
        """True while the forward of a root module runs."""
        return self._depth > 0

    def is_gradient(self, t: Tensor) -> bool:
        """True if ``t`` is the gradient of a parameter that is followed."""
        return self.followed.is_gradient(t)

    # ---- rows

    def emit(
        self,
        reads: str,
        stats: Sequence[str],
        module: str,
        values: Values,
        merge: Sequence[str] = (),
        at: slice = slice(None),
        absent: Sequence[int] = (),
    ) -> None:
        """Write the statistics of one module into the open row.

        Args:
            reads: id of the pass.
            stats: names of its statistics.
            module: where.
            values: ``(statistic,)``, or those of ``at``: a tensor, or on a CPU also an array or numbers, which cost a
                fifth.
            merge: how each statistic of two micro-batches becomes one ("sum", "max", "min", "mean", "last"); without
                it the later wins.
            at: which statistics ``values`` are.
            absent: statistics that are not recorded.
        """
        self._open_row.emit(self.epoch, reads, stats, module, values, merge, at, absent)

    def emit_many(
        self, reads: str, stats: Sequence[str], modules: Sequence[str], values: Values, at: slice = slice(None)
    ) -> None:
        """Write the statistics of several modules: ``values`` is ``(module, statistic)``, as in `emit`."""
        if self._only is not None:
            chosen = [i for i, name in enumerate(modules) if name in self._only]
            if not chosen:
                return
            modules = [modules[i] for i in chosen]
            if isinstance(values, Tensor):
                values = values.index_select(0, torch.tensor(chosen).to(values.device, non_blocking=True))
            else:
                values = np.asarray(values)[chosen]
        self._open_row.emit_many(reads, stats, modules, values, at)

    def _close_row(self) -> None:
        self._at("on_row")
        self._open_row.close(self.step)
        self.step += 1
        self._listen()
        self.rows += 1
        self.stepped = 0
        self._expected = frozenset(self._row)
        self._row.clear()

    def listen_anew(self) -> None:
        """The answers to who listens have changed."""
        self._ahead.clear()
        self._listen()

    def _listen(self) -> None:
        """Look up who is told of the step that begins: so much has left the cache that no call is cheap."""
        if not self._ahead:
            sites = [s for s in self.sites if s.name not in self._broken]
            steps = range(self.step, self.step + AHEAD)
            self._ahead = [frozenset(s for s in sites if s.listens(step)) for step in reversed(steps)]
        self._listening = listening = self._ahead.pop()
        told = self._tellings.get(listening)
        if told is None:
            told = {moment: [t for t in all_ if t[0] in listening] for moment, all_ in self._on.items()}
            self._tellings[listening] = told
        self._told = told

    def _follow_device(self) -> None:
        """The model may have been moved since the last step, or made on no device at all and filled later."""
        device = self.followed.device
        if device != self.device:
            with quiet():
                self._open_row.move(device)
            self.device, self.on_cpu = device, device.type == "cpu"
            self._captures = captures(device)

    # ---- the step

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Arguments | None:
        if self.active and os.getpid() == self._pid and not self._in_graph():
            return self._guard(self._begin_step, optimizer, args, kwargs)
        return None

    def _begin_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Arguments | None:
        """Returns: what the step is given instead, so that its closure is heard of."""
        if not self.followed.follows(optimizer, self.step):
            return None
        self.in_step = True
        self.evaluations, self.awaiting = 0, False
        self._ended.discard(id(optimizer))
        # nothing in a plain update is of interest, and every `p.grad` in it would pass through the mode; a closure runs
        # forward and backward in there
        if not (len(args) > 1 or kwargs) and self._here():
            self.stack.set(False)
        closure = find_closure(args, kwargs)
        if closure is not None and not self._row:
            with quiet():
                self._at("before_closure", optimizer)
        if self.probing and not self._row and not self.awaiting:
            self._measure(optimizer)
        if closure is None:
            return None
        begins = partial(self._guard, self._begin_evaluation, optimizer)
        ends = partial(self._guard, self._end_evaluation, optimizer)
        return with_closure(args, kwargs, watched(closure, begins, ends))

    def _measure(self, optimizer: Optimizer) -> None:
        self.probing = self.awaiting = False
        self.mode.inside = True  # a probe runs the models: not one of those calls is the training's
        try:
            with alone():
                self._at("before_update", optimizer)
        finally:
            self.mode.inside = False

    def _begin_evaluation(self, optimizer: Optimizer) -> bool:
        """The closure of a step is about to be evaluated; False if nobody cares for its end."""
        if not self._here() or self.in_closure or os.getpid() != self._pid:
            return False
        self.in_closure = True
        self.evaluations += 1
        if self.awaiting and self.evaluations == 1:
            with quiet():
                self._at("before_evaluation", optimizer)
        return True

    def _end_evaluation(self, optimizer: Optimizer, done: bool) -> None:
        self.in_closure = False
        if not self._here() or os.getpid() != self._pid:
            return
        self.stack.set(False)  # the update follows, or another forward
        if done and self.awaiting and self.evaluations == 1:
            self._measure(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.active and os.getpid() == self._pid and not self._in_graph():
            self._guard(self._end_step, optimizer)

    def _in_graph(self) -> bool:
        """True while a CUDA graph is made: what runs then is played again and again, and must have nothing of ours."""
        if self._captures is None or not self._captures():
            return False
        if not self._captured:
            self._captured = True
            self.flusher.warn(f"from step {self.step} on a CUDA graph is made: what is played again cannot be seen")
        return True

    def _end_step(self, optimizer: Optimizer) -> None:
        if not self.followed.follows(optimizer, self.step):
            return
        self.in_step = False
        if id(optimizer) in self._ended:  # torch tells of a step and of that of the parent class it has called
            return
        self._ended.add(id(optimizer))
        self._thread = threading.get_ident()
        with quiet():
            if self.forwards == 0:
                self._follow_device()
            if not self.followed.stepped:
                self._expected = frozenset(self.followed.alive(self.step))
            facts = self.followed.count(optimizer)
            if facts is not None:
                self.flusher.facts(facts)
            if id(optimizer) in self._row:  # the cycle of several optimizers has begun again
                self._close_row()
            self._row.append(id(optimizer))
            self.stepped += 1
            self._at("on_step", optimizer)
            if self.followed.living(self._expected) <= frozenset(self._row):
                self._close_row()
        self._rearm()

    # ---- when the mode is on the stack

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "_is_replica" in vars(module):  # of `nn.DataParallel`: a part of a call already seen, in another thread
            self.replicated = True
            return
        if not torch.compiler.is_compiling() and self._here() and not transformed():
            self._guard(self._begin_forward, module, args, kwargs)

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth == 0 and _redirected(module):
            self._redirected.append(id(module))
            return
        self._depth += 1
        if self._depth > 1:
            if self.training and self.probing:
                with quiet():
                    self._at("on_inner", module)
            return
        self._was_on, self._trained = self.stack.on, self.training
        self.training = torch.is_grad_enabled() and (module.training or self._eval_trained)
        with quiet():
            if self.forwards == 0:
                self._follow_device()
                if self.rows == 0:
                    self._look_for_bystanders()
            self.forwards += 1
            if self.training:
                self._thread = threading.get_ident()
            inside = self._looks_inside()
            self.blind |= self.training and not inside
            self.stack.set(
                self.training and module.training and inside and not self._compiled(module) and not self._fast(module)
            )
            if self.training:
                self._at("on_forward", module, args, kwargs)

    def forward_under_way(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """``module`` is being called, and its hooks were set too late for this call."""
        self._before_forward(module, args, {})

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():  # first of all: nothing of ours is to be guarded on
            return
        if self._depth == 0 and self._redirected and self._redirected[-1] == id(module):
            self._redirected.pop()
            return
        if "_is_replica" in vars(module):
            return
        if self._here() and self._depth > 0 and not transformed():
            self._guard(self._end_forward, module, args, kwargs, output)

    def _end_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            if self.training:
                with quiet():
                    self._at("on_output", module, args, kwargs, output)
            # what trains is watched until its optimizer has stepped; an evaluation leaves things as they were
            if torch.is_grad_enabled() or self._was_on:
                self.stack.wait()
            else:
                self.stack.set(False)
            if self._was_on and not torch.is_grad_enabled():
                self.training = self._trained
            if not torch.is_grad_enabled():
                with quiet():
                    self._at("on_evaluation", module, args, kwargs, output)

    def _look_for_bystanders(self) -> None:
        """Hook the calls of modules beside ours that must not meet the mode, which is on the stack until the step."""
        for module, compiled in find_bystanders(self.roots):
            if id(module) not in self._beside:
                self._beside.add(id(module))
                self._hooks += hook_calls(module, partial(self._begin_aside, compiled), self._end_aside)

    def _begin_aside(self, compiled: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and self._here():
            self._guard(self.stack.step_aside, module, compiled)

    def _end_aside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling() and self._here():
            self._guard(self.stack.step_back, module)

    def _looks_inside(self) -> bool:
        """True if calls inside this forward are of interest: while the mode is on the stack, each one costs more."""
        first = self.rows < START  # also of a run that is resumed
        # a region that was compiled with the mode on the stack would be compiled again without it
        self._called_inside |= compiled_any()
        return self._called_inside or first or any(s.inside_every > 1 for s in self._listening)

    def _compiled(self, module: nn.Module) -> bool:
        """True if a call of ``module`` enters a compiled region; looked up at first, then now and then."""
        known = self._entries.get(id(module))
        if known is None or self.rows < 3 or self.rows % 100 == 0:
            known = self._entries[id(module)] = bool(compiled_regions(module))
        return known

    def _fast(self, module: nn.Module) -> bool:
        """True if ``module`` is trained around layers in evaluation, which a mode would take off their fast path."""
        held = self._layers.get(id(module))
        if held is None or self.rows < 3 or self.rows % 100 == 0:
            held = self._layers[id(module)] = weakref.WeakSet(m for m in module.modules() if isinstance(m, FAST))
        fast = any(not m.training for m in held)
        self._kept_fast |= fast
        return fast

    def _here(self) -> bool:
        if self._thread in (None, threading.get_ident()):
            return self.active and not self.mode.inside and not self._in_graph()
        if self.mode.on_stack():  # the training goes on in another thread than it seemed to
            self.mode.leave()
        return False

    def _rearm(self) -> None:
        """After a step: off the stack until the next training forward, if there are forwards we see."""
        if self.forwards == 0 and self.rows <= 2:
            self._look_for_entries()
        self.stack.rest()
        self.forwards = 0
        self.blind = False
        self._depth = 0
        self._redirected.clear()

    def _look_for_entries(self) -> None:
        """No root module was called in this step: the user calls a wrapper or the children themselves."""
        wrappers = [m for m in gc.get_objects() if type(m).__name__ in _WRAPPERS and unwrap(m) in self.roots]
        for m in wrappers:
            self._enter_at(m, self.prefix(unwrap(m)))
        if wrappers or any(compiled_regions(r) for r in self.roots):
            return
        for root in self.roots:
            self._enter_at_parts(root)

    def _enter_at_parts(self, root: nn.Module) -> None:
        for name, child in children_called(root):
            if next(child.parameters(), None) is not None:  # otherwise it is a loss, or a metric
                self._enter_at(child, f"{self.prefix(root)}{name}.")

    def _backward_begins(self) -> None:
        """A backward pass is about to run: after an unscaling it belongs to a new attempt at an update."""
        self._called_inside |= self.inside_forward
        if self._unscaled_since_backward:
            self.epoch += 1
            self._unscaled_since_backward = False
        self._eval_trained |= not self.training
        self._at("on_backward")

    def unscaled(self, inverse: Tensor) -> bool:
        """GradScaler has unscaled gradients; True if this is the first such call since a backward."""
        self.inverse_scale = inverse
        first = not self._unscaled_since_backward
        self._unscaled_since_backward = True
        return first

    # ---- errors

    def _watching(self, told: Sequence[_Watches], first: Callable[[], None] | None = None) -> Watcher:
        """What tells several sites of a call of one function, ``first`` before them."""

        def call(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            begin = time.perf_counter()
            looking = self.stack.looking
            now = [(site, watcher) for site, watcher, looks in told if looks is looking and site in self._listening]
            if not now and (looking or first is None):
                return
            with quiet():
                if first is not None and not looking:
                    first()
                for site, watcher in now:
                    self._called_inside |= self._depth > 0 and site.inside_every == 1 and not site.looks
                    self._tell(site, watcher, args, kwargs, result)
            self.spent += time.perf_counter() - begin

        return call

    def _guard(self, what: Callable[..., Any], *args: Any) -> Any:
        """What it returns; None if it raises."""
        begin = time.perf_counter()
        try:
            return what(*args)
        except Exception as e:
            self._fail("recorder", e)
            return None
        finally:
            self.spent += time.perf_counter() - begin

    def _at(self, moment: str, *args: Any) -> None:
        for site, what in self._told[moment]:
            self._tell(site, what, *args)

    def _tell(self, site: Site, what: Callable[..., None], *args: Any) -> None:
        try:
            what(*args)
        except Exception as e:
            self._fail(site.name, e)

    def tell(self, site: Site, what: Callable[..., None], *args: Any) -> None:
        """Tell a site of what it has a way of its own to hear of."""
        begin = time.perf_counter()
        with quiet():
            self._tell(site, what, *args)
        self.spent += time.perf_counter() - begin

    def _fail(self, name: str, error: Exception) -> None:
        if name in self._broken:
            return
        self._broken.add(name)
        self.listen_anew()
        if name == "recorder":
            self.active = False
            if not self.mode.inside:
                self.stack.set(False)
        said = f"{name} is no longer recorded from step {self.step} on: {type(error).__name__}: {error}"
        self.flusher.warn(said)
        with contextlib.suppress(MonitorWarning):  # a user who turns warnings into errors still finds it in the run
            warnings.warn(f"monitor: {said} (training is not affected)", MonitorWarning, stacklevel=3)

    # ---- the end

    def missing(self) -> list[tuple[str, str]]:
        """What could not be recorded so far, and why."""
        if self._missing is not None:
            return self._missing
        found = [m for site in self.sites for m in site.missing()]
        if self.every > 1:
            why = f"looked at every {self.every} steps, as asked; so are inputs, logits, attention and routers"
            found.append(("grad_norm", why))
        if self.followed.sharded:
            found.append(SHARDED)
        regions = [name or "the model" for r in self.roots for name in compiled_regions(r)]
        if regions and any(metric == "loss" for metric, _ in found):
            why = f"{regions[0]} is compiled in place, so its calls cannot be seen without recompiling it"
            found = [(metric, why if metric in _IN_FORWARD else reason) for metric, reason in found]
        if self._kept_fast:
            why = (
                "a transformer layer in evaluation is inside the model: it leaves its fast path when calls are watched"
            )
            found.append(("attn_logit_max", why))
        return found

    def close(self) -> None:
        """Stop recording and hand on what is left. The flusher is closed by its owner."""
        if not self.active and not self._hooks:
            return
        self.active = False
        for h in self._hooks:
            h.remove()
        self._hooks.clear()
        _LIVE.discard(self)
        if os.getpid() != self._pid:
            return
        self.stack.end()
        with quiet():
            self._guard(self._finish)
        self._guard(self._release)

    def _finish(self) -> None:
        if self._row or any(site.waiting() for site in self.sites):
            self._close_row()
        self._open_row.hand_on(wait=True)

    def _release(self) -> None:
        """Let go of the model: a handle or a mode of another thread that outlives the recording must not keep it."""
        self._missing = self.missing()
        self.followed.roots, self.sites = [], []
        self._told = {moment: [] for moment in self._on}
        self._on, self._listening = self._told, frozenset()
        self._tellings.clear()
        self._ahead.clear()
        self.mode.before.clear()
        self.mode.after.clear()

    def orphaned(self) -> bool:
        """True if its optimizers are gone and nobody else holds a module of the models: they cannot train any more."""
        return self.followed.orphaned()

    def forked(self) -> None:
        """In a forked child: record nothing, leave no mode behind."""
        self.active = False
        self.stack.set(False)


#: A site, what it watches a function with, and whether it does so for an evaluation.
_Watches = tuple[Site, Watcher, bool]
_IN_FORWARD = {"loss", "logit_norm", "loss_zero_frac"}
_LIVE: weakref.WeakSet[Recorder] = weakref.WeakSet()


def _after_fork() -> None:
    for recorder in list(_LIVE):
        recorder.forked()


os.register_at_fork(after_in_child=_after_fork)


def _redirected(module: nn.Module) -> bool:
    """True if it calls Lightning's training step instead: no call of the model, which calls its parts in there.

    So Lightning has the training step called by a wrapper that averages gradients, which calls the module.
    """
    root = unwrap(module)
    return isinstance(root.__dict__.get("forward"), types.FunctionType) and hasattr(root, "training_step")
