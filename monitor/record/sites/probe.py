"""Runs the probes: decides when, tapes the steps that they need, and keeps them inside their share of the time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from monitor.curvature.environment import RandomState
from monitor.probes.pathways import Pathways
from monitor.record import processes
from monitor.record.closure import fingerprint
from monitor.record.facts import unwrap
from monitor.record.mode import Watcher
from monitor.record.private import compiles
from monitor.record.probe import Moment, Probe
from monitor.record.site import START, Site
from monitor.record.sites._backward import BACKWARD, losses
from monitor.record.tape import Tape

#: Memory that the first batch of a run may take to be kept as the probe set.
KEEP = 64 << 20
#: Why a batch cannot be played again.
UNSEEN = "between model and loss something is computed that cannot be seen: a torch.autograd.Function, a compiled one"
#: Steps at which a probe may be due in vain, for there was no backward or none to be seen, before it is given up.
ATTEMPTS = 3
#: Probes that run though nobody asked for them.
DEFAULT: tuple[type[Probe], ...] = (Pathways,)


@dataclass
class _Scheduled:
    """A probe and what it has cost so far, in seconds.

    Attributes:
        untaped: times that it was due and the calls of the step were not seen, since it was last measured.
    """

    probe: Probe
    spent: float = 0.0
    last: float | None = None
    why_not: str | None = None
    asked: bool = False
    untaped: int = 0

    def due(self, step: int, elapsed: float, steps: int) -> bool:
        """True if it is measured at ``step``, ``elapsed`` seconds and ``steps`` steps after the first."""
        if self.why_not is not None:
            return False
        if self.probe.every is not None:
            return step % self.probe.every == 0
        return steps >= START and self.probe.affordable(elapsed, elapsed / max(1, steps), self.spent, self.last)


class ProbeSite(Site):
    """Measures the probes before the first update of a step.

    Where forward and backward run in a closure that the optimizer's step was given: after its first evaluation, which
    is still before the update. Not if the parameters have been moved by then, as optimizers do that look for sharp
    losses: what is measured has to be the loss at the parameters of the step.
    """

    name = "probe"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._all = [_Scheduled(p) for p in recorder.probes]
        given = {type(p) for p in recorder.probes}
        self._all += [_Scheduled(kind()) for kind in DEFAULT if kind not in given]
        for s in self._all:
            s.probe.begin()
        self._keeps = any(s.probe.keeps_first for s in self._all)
        self._began = 0.0
        self._steps = 0
        self._spent = 0.0  # by the recorder before the first step
        self._joined = False
        self._due: list[_Scheduled] = []
        self._decided = -1
        self._tape: Tape | None = None
        self._inner: weakref.ref[nn.Module] | None = None  # the root that is being called, maybe by its wrapper
        self._ended = False  # at a backward; the next forward begins another
        self._tapes: list[tuple[int, Tape]] = []  # with the attempt at an update that they belong to
        self._first: Tape | None = None
        self._why_no_tape = self._why_no_first = ""
        self._before: tuple[Optimizer, Tensor] | None = None  # its parameters when the step began
        #: Optimizers that evaluate a closure elsewhere or not at all: theirs is not waited for.
        self._at_once: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._local: processes.LocalGradients | None = None
        self._averaging: list[weakref.ref[nn.Module]] = []  # what averages gradients over processes

    def before(self) -> dict[Any, Watcher]:
        """A call of backward ends a tape."""
        return dict.fromkeys(BACKWARD, self._backward)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide what is due in this step, and whether it has to be taped."""
        late = not self._joined and self._join(module)
        self._joined = True
        if self._decided != self.rec.step:
            self._decide()
        if late:
            self._due, self.rec.probing = [], False
            return
        self.rec.mode.tape = None  # what happens inside a root module is played again by calling it
        if self._ended:
            self._close()
        if self._tape is None and (self._keeps or any(s.probe.taped for s in self._due)):
            random = RandomState.capture([self.rec.device])
            self._tape = Tape(self.rec.roots, random)
        if self._tape is not None:
            self._inner = weakref.ref(unwrap(module))
            self._tape.enter()
        if self._local is None and any(s.probe.taped for s in self._due) and processes.several():
            self._local = processes.LocalGradients(self.rec.roots, lambda: self.rec.epoch, self._pay)

    def on_inner(self, module: nn.Module) -> None:
        """What the wrapper has turned on, as Fabric's does with autocast, is on in a replay without it too."""
        if self._tape is not None and self._inner is not None and module is self._inner():
            self._tape.enter()

    def _pay(self, seconds: float) -> None:
        self.rec.spent += seconds
        self.rec.probed += seconds

    def _decide(self) -> None:
        now = time.perf_counter()
        if self._steps <= 1:  # the first step also pays for looking around, which is not the training's time
            self._began, self._spent = now, self.rec.spent
        self._decided = self.rec.step
        self._close()
        self._local = self._before = None
        self._tapes.clear()
        elapsed = now - self._began - (self.rec.spent - self._spent)  # the training's own time
        self._due = [s for s in self._all if s.due(self.rec.step, elapsed, self._steps)]
        self.rec.probing = bool(self._due)
        self._steps += 1

    def _join(self, module: nn.Module) -> bool:
        """Of several processes: look for what averages gradients, and follow it should the model alone have been given.

        It may do something to the model's output that no tape of the model alone could tell of.

        Returns:
            True if the call of ``module`` that has begun comes from such a wrapper, not followed until now.
        """
        if not processes.several():
            return False
        found = processes.wrappers()
        self._averaging = [weakref.ref(w) for w in found]
        if [module] != list(self.rec.roots) or compiles():
            return False
        around = [w for w in found if unwrap(w) is module]
        for w in around:
            self.rec.adopt(w)
        return bool(around)

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A root module has been called: from here to backward every call counts."""
        if self._tape is not None:
            self._tape.root(module, args, kwargs, output)
            self.rec.mode.tape = self._called

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """On the training's own path, so whatever is odd about a call costs the tape and nothing else."""
        if self._tape is not None:
            try:
                self._tape.call(func, args, kwargs, result)
            except Exception as e:
                self._why_no_tape = f"{getattr(func, '__name__', func)} cannot be taped: {type(e).__name__}: {e}"
                self._tape = self.rec.mode.tape = None
                self._ended = False

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.rec.mode.tape = None
        if self.rec.in_step and not (self.rec.in_closure and self.rec.evaluations == 1):
            self._tape = None  # of a loss somewhere else
        if self._tape is None:
            return
        given = losses(args, kwargs)
        gradient = args[1] if len(args) > 1 else kwargs.get("gradient", kwargs.get("grad_tensors"))
        gradients = gradient if isinstance(gradient, Sequence) else [gradient] * len(given)
        for loss, g in zip(given, gradients, strict=True):
            self._lost(self._tape, loss, g)

    def _lost(self, tape: Tape, loss: Tensor, gradient: Tensor | None) -> None:
        """Backward is called on ``loss``, maybe not the first that was made of the last forward."""
        tape = tape.twin() if self._ended else tape
        self._ended = True
        tape.end(loss, gradient)
        if not tape.complete:
            self._why_no_tape = "the loss does not stem from a call of the model that can be seen"
            return
        self._tapes.append((self.rec.epoch, tape))
        if self._keeps:
            self._keeps = False
            if tape.severed:
                self._why_no_first = UNSEEN
            elif tape.nbytes > KEEP:
                self._why_no_first = f"the first batch takes more than {KEEP >> 20} MiB"
            else:
                self._first = tape.copy()

    def _close(self) -> None:
        """End the tape of the last forward and those of the losses made of it."""
        for tape in (self._tape, *(tape for _, tape in self._tapes)):
            if tape is not None:
                tape.close()
        self._tape, self._ended = None, False

    def before_closure(self, optimizer: Optimizer) -> None:
        """Wait for its first evaluation if something is due."""
        if self._decided != self.rec.step:
            self._decide()
        if self._due and optimizer not in self._at_once:
            self.rec.awaiting = True
            if self._before is None:  # otherwise its step has called that of its parent class, or of another
                self._before = optimizer, fingerprint(optimizer)

    def before_evaluation(self, optimizer: Optimizer) -> None:
        """Wait no longer if the parameters are no more those of the step."""
        if self._before is None:
            return
        (outer, bits), self._before = self._before, None
        if not torch.equal(bits, fingerprint(outer)):
            self._at_once.add(outer)
            self._give_up(optimizer, "the optimizer changes the parameters before it evaluates its closure")

    def on_step(self, optimizer: Optimizer) -> None:
        """A closure that was waited for has not been evaluated."""
        if self.rec.awaiting:
            self._give_up(optimizer, "the optimizer does not evaluate its closure")

    def _give_up(self, optimizer: Optimizer, why: str) -> None:
        """Measure nothing in this step, and from the next on before the closure of this optimizer."""
        self.rec.awaiting = self.rec.probing = False
        self._at_once.add(optimizer)
        self._why_no_tape = why

    def before_update(self, optimizer: Optimizer) -> None:
        """Run what is due, once a step, on the tapes of this attempt at an update."""
        due, self._due = self._due, []
        tapes = [tape for epoch, tape in self._tapes if epoch == self.rec.epoch]
        self._close()
        self._tapes.clear()
        local = None if self._local is None else self._local.take(self.rec.epoch)
        self._local = None
        for s in due:
            p = s.probe
            if not s.asked:  # not before: other sites have to see a step first
                s.asked = True
                s.why_not = self._impossible(p) or p.wanted(self.rec)
            if s.why_not is not None:
                continue
            if (p.taped and not tapes) or (p.keeps_first and self._keeps):
                s.untaped += 1
                s.why_not = self._untaped() if s.untaped == ATTEMPTS else None
            elif p.keeps_first and self._first is None:
                s.why_not = self._why_no_first
            else:
                s.untaped = 0
                self._measure(s, optimizer, tapes if p.taped else [], local)
        if all(s.why_not is not None for s in self._all if s.probe.keeps_first):
            self._first = None  # nobody is left to need it

    def on_row(self) -> None:
        """Nothing of a step is kept beyond it, also of a forward that no backward followed."""
        self._close()
        self.rec.mode.tape = self._local = self._before = None
        self._tapes.clear()

    def _measure(
        self, s: _Scheduled, optimizer: Optimizer, tapes: Sequence[Tape], local: Mapping[int, Tensor] | None
    ) -> None:
        begin = time.perf_counter()
        first = self._first if s.probe.keeps_first else None
        moment = Moment(self.rec.step, self.rec.roots, optimizer, tapes, first, self.rec, local)
        try:
            with processes.alone(self._wrappers()) if processes.several() else nullcontext():
                s.probe.measure(moment)
        except processes.Alone as e:
            s.why_not = _said(f"{e}", s.probe)
        except Exception as e:
            s.why_not = f"{e}" if type(e).__module__.startswith("monitor.") else f"{type(e).__name__}: {e}"
            self.rec.flusher.warn(f"{s.probe.name} is not measured from step {self.rec.step} on: {s.why_not}")
        s.last = time.perf_counter() - begin
        s.spent += s.last
        self.rec.probed += s.last

    def _impossible(self, probe: Probe) -> str | None:
        """Why no probe may run the models at all, and what measures the same then."""
        followed = self.rec.followed
        if followed.sharded:
            return "the parameters are sharded"
        if not processes.several():
            return None
        if not processes.first():
            return "several processes train together, and the first one measures"
        if not processes.averaged(followed.roots, self._wrappers()):
            why = "several processes train together without DistributedDataParallel: one alone could wait for ever"
            return _said(why, probe)
        return None

    def _wrappers(self) -> list[nn.Module]:
        return [w for known in self._averaging if (w := known()) is not None]

    def missing(self) -> Sequence[tuple[str, str]]:
        """Probes that could not be measured. Of those that nobody asked for, only what the model would have had."""
        if self._steps == 0:
            return [
                (s.probe.name, "no call of the model in training was seen") for s in self._all if not s.probe.default
            ]
        found = []
        for s in self._all:
            if s.why_not is not None:
                found += [(s.probe.name, s.why_not)] if not s.probe.default or s.spent > 0 else []
            elif s.untaped and s.spent == 0:
                found.append((s.probe.name, self._untaped()))
            elif s.spent == 0 and s.probe.every is None and not (s.probe.default and s.probe.wanted(self.rec)):
                found.append((s.probe.name, f"not within its share of {s.probe.share:.0%} of the time so far"))
            elif (unmet := s.probe.unmet()) is not None:
                found.append((s.probe.name, unmet))
        return found

    def _untaped(self) -> str:
        return self._why_no_tape or "no call of backward was seen"


def _said(why: str, probe: Probe) -> str:
    return f"{why}; {probe.elsewhere}" if probe.elsewhere else why
