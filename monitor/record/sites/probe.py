"""Runs the probes: decides when, tapes the steps that they need, and keeps them inside their share of the time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from monitor.curvature.environment import RandomState
from monitor.probes.pathways import Pathways
from monitor.record import processes
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
#: Probes that run though nobody asked for them.
DEFAULT: tuple[type[Probe], ...] = (Pathways,)


@dataclass
class _Scheduled:
    """A probe and what it has cost so far, in seconds."""

    probe: Probe
    spent: float = 0.0
    last: float | None = None
    why_not: str | None = None
    asked: bool = False

    def due(self, step: int, elapsed: float, steps: int) -> bool:
        """True if it is measured at ``step``, ``elapsed`` seconds and ``steps`` steps after the first."""
        if self.why_not is not None:
            return False
        if self.probe.every is not None:
            return step % self.probe.every == 0
        return steps >= START and self.probe.affordable(elapsed, elapsed / max(1, steps), self.spent, self.last)


class ProbeSite(Site):
    """Measures the probes before the first update of a step."""

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
        self._due: list[_Scheduled] = []
        self._decided = -1
        self._tape: Tape | None = None
        self._tapes: list[tuple[int, Tape]] = []  # with the attempt at an update that they belong to
        self._first: Tape | None = None
        self._why_no_tape = self._why_no_first = ""
        self._local: processes.LocalGradients | None = None
        self._averaging: list[weakref.ref[nn.Module]] = []  # what averages gradients over processes

    def before(self) -> dict[Any, Watcher]:
        """A call of backward ends a tape."""
        return dict.fromkeys(BACKWARD, self._backward)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide what is due in this step, and whether it has to be taped."""
        late = self._steps == 0 and self._join(module)
        if self._decided != self.rec.step:
            self._decide()
        if late:
            self._due, self.rec.probing = [], False
            return
        self.rec.mode.tape = None  # what happens inside a root module is played again by calling it
        if self._tape is None and (self._keeps or any(s.probe.taped for s in self._due)):
            random = RandomState.capture([self.rec.device])
            self._tape = Tape(self.rec.roots, random)
        if self._local is None and any(s.probe.taped for s in self._due) and processes.several():
            self._local = processes.LocalGradients(self.rec.roots, lambda: self.rec.epoch, self._pay)

    def _pay(self, seconds: float) -> None:
        self.rec.spent += seconds
        self.rec.probed += seconds

    def _decide(self) -> None:
        now = time.perf_counter()
        if self._steps <= 1:  # the first step also pays for looking around, which is not the training's time
            self._began, self._spent = now, self.rec.spent
        self._decided = self.rec.step
        self._tape = self._local = None
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

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.rec.mode.tape = None
        tape, self._tape = self._tape, None
        if tape is None or self.rec.in_step:
            return
        given = losses(args, kwargs)
        gradient = args[1] if len(args) > 1 else kwargs.get("gradient", kwargs.get("grad_tensors"))
        if len(given) != 1 or not (gradient is None or isinstance(gradient, Tensor)):
            self._why_no_tape = "backward was called on several tensors at once"
            return
        tape.end(given[0], gradient, self.rec.on_cpu)
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

    def before_update(self, optimizer: Optimizer) -> None:
        """Run what is due, once a step, on the tapes of this attempt at an update."""
        due, self._due = self._due, []
        tapes = [tape for epoch, tape in self._tapes if epoch == self.rec.epoch]
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
                s.why_not = self._why_no_tape or "no call of backward was seen"
            elif p.keeps_first and self._first is None:
                s.why_not = self._why_no_first
            else:
                self._measure(s, optimizer, tapes if p.taped else [], local)
        if all(s.why_not is not None for s in self._all if s.probe.keeps_first):
            self._first = None  # nobody is left to need it

    def on_row(self) -> None:
        """Nothing of a step is kept beyond it, also of a forward that no backward followed."""
        self._tape = self.rec.mode.tape = self._local = None

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
            elif s.spent == 0 and s.probe.every is None and not (s.probe.default and s.probe.wanted(self.rec)):
                found.append((s.probe.name, f"not within its share of {s.probe.share:.0%} of the time so far"))
            elif (unmet := s.probe.unmet()) is not None:
                found.append((s.probe.name, unmet))
        return found


def _said(why: str, probe: Probe) -> str:
    return f"{why}; {probe.elsewhere}" if probe.elsewhere else why
