"""The curvature of the training loss while it trains: sharpness, stability, spectrum.

    monitor.attach(model, curvature="auto")                              # in at most 5 % of the run's time
    monitor.attach(model, curvature=monitor.Curvature(every=100))        # at these steps, whatever it costs
    monitor.attach(model, curvature=monitor.Curvature(loss_closure=lambda: loss(model(x), y)))  # on data of your own

Nothing else has to be given: the step's calls are taped and its loss is played again, which is trusted only if the
gradient is the one that the optimizer is about to use. Of several processes that train with `DistributedDataParallel`
the first measures the loss of its own batch, trusted if its gradient is that of its own backward passes; the others
wait for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from monitor.curvature.closure import Batch, LossClosure, Selection
from monitor.curvature.density import SpectralDensity
from monitor.curvature.environment import Mode
from monitor.curvature.lanczos import ASYMMETRY, Array, Eigenvalues, Krylov, lanczos
from monitor.curvature.precision import dot
from monitor.curvature.probes import landscape
from monitor.curvature.products import Hessian
from monitor.curvature.spectrum import block_spectra
from monitor.curvature.stability import stability
from monitor.curvature.trace import Estimate, traces
from monitor.errors import UsageError
from monitor.probes import _cross_entropy
from monitor.probes._rebuilt import Rebuilt, Refused, given, is_of_step, rebuilt
from monitor.record import processes
from monitor.record.probe import Moment, Probe

#: Nodes of the spectral density, random vectors for the trace, most products of one Lanczos run.
NODES, SAMPLES, MOST = 40, 10, 100
#: Products that a measurement has time for at the least, where other processes wait for it, and its parts that need as
#: many: the spectrum, the trace, the preconditioned sharpness.
FEWEST, PARTS = 8, 3
#: Bytes that a Lanczos basis may take; it restarts beyond.
BASIS = 2e9
#: Replays that may fail the check before no more are tried.
ATTEMPTS = 3
#: What measurements cost before one has been made, in training steps, and the share of the budget that goes into batch
#: sharpness alone between them. With Adam a GPT of 1.3 M parameters took 4, 33 to 49, and 130 to 200.
GUESS = {"batch": 6.0, "sharpness": 60.0, "full": 200.0}
BETWEEN = 0.2
#: Rows of the table of opposing signals, on each side.
STRONGEST = 20
#: Points of the table of the landscape in each direction.
POINTS = 11

SHARPNESS = ("value", "residual", "converged", "products", "examples", "parameters", "loss", "of_step")
EIGENVALUE = ("value", "residual", "converged")
TRACE = ("trace", "stderr", "frobenius", "frobenius_stderr", "samples")
DENSITY = ("negative_ratio", "negative_weight", "negative", "smallest", "smallest_residual", "nodes")
PRECONDITIONED = ("value", "threshold", "converged")
EDGE = ("ratio", "threshold", "stable_lr", "converged")
SGD = ("ratio", "stderr")
BATCH = ("value", "gradient_norm", "examples")
OPPOSING = ("rows", "up", "down", "up_mean", "down_mean", "typical", "cancelled")


class _State:
    """What is remembered from one measurement to the next; a new one for every run."""

    def __init__(self) -> None:
        self.measured = 0  # of sharpness
        self.refused = 0
        self.planned: str | None = None
        self.seconds: dict[str, float] = {}
        self.between = 0.0
        self.wait = 0.0  # seconds that a sharpness is expected to take
        self.start: Tensor | None = None
        self.names: tuple[str, ...] = ()
        self.told: set[str] = set()
        self.processes = 1


@dataclass(frozen=True)
class Curvature(Probe):
    """Measure the curvature of the training loss now and then, on the batch of a step.

    Attributes:
        every: measure sharpness at each so many steps, whatever it costs; None: as often as ``budget`` allows, with
            the batch sharpness alone, which is cheap, in between.
        budget: the largest share of the run's time it may take without ``every``.
        top: eigenvalues from the top in a full measurement; the others have the largest alone.
        full: every so many-th measurement is full: also the other eigenvalues, trace, spectral density, opposing
            signals and blocks.
        parameters: names of parameters or modules to measure; None for all that the optimizer trains.
        blocks: also the sharpness of each of these modules; True: of the model's children.
        landscape: in a full measurement also the loss around the weights, up to this far (‖Δw‖) to either side along
            the two sharpest directions, into the table ``landscape``.
        loss_closure: the loss to measure instead of the step's: a function without arguments that calls the model and
            returns it, or ``(loss_fn, batch)`` as for `monitor.curvature.LossClosure`.
        mode: "train": dropout masks and batch statistics are those of the step; "eval": as in evaluation.
        dtype: measure in this precision, e.g. ``torch.float64``; default that of the parameters, at least float32.

    Raises:
        UsageError: if a value makes no sense.
    """

    every: int | None = None
    budget: float = 0.05
    top: int = 5
    full: int = 8
    parameters: Selection = None
    blocks: bool | Sequence[str] = False
    landscape: float | None = None
    loss_closure: Callable[[], Tensor] | tuple[Callable[..., Any], Any] | None = None
    mode: Mode = "train"
    dtype: torch.dtype | None = None

    name = "curvature"
    elsewhere = (
        "measure between two steps, in every process at once: "
        "monitor.curvature.spectrum(model, LossClosure(model, loss_fn, batch, group=torch.distributed.group.WORLD))"
    )

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise UsageError(f"Curvature(every={self.every!r}); expected a number of steps >= 1")
        if not 0 < self.budget <= 1:
            raise UsageError(f"Curvature(budget={self.budget!r}); expected a fraction above 0, e.g. 0.05")
        if self.top < 1 or self.full < 1:
            raise UsageError(f"Curvature(top={self.top!r}, full={self.full!r}); expected numbers >= 1")
        if self.landscape is not None and not (0 < self.landscape < math.inf and self.top >= 2):
            given = f"landscape={self.landscape!r}, top={self.top!r}"
            raise UsageError(f"Curvature({given}); expected a length above 0, and at least 2 directions")
        if self.mode not in ("train", "eval"):
            raise UsageError(f'Curvature(mode={self.mode!r}); expected "train" or "eval"')
        fixed = {"share": self.budget, "taped": self.loss_closure is None, "_state": _State()}
        for key, value in fixed.items():  # frozen for the user, not for us
            object.__setattr__(self, key, value)

    @property
    def _now(self) -> _State:
        return self.__dict__["_state"]

    def begin(self) -> None:
        """Forget the run before."""
        object.__setattr__(self, "_state", _State())

    def affordable(self, elapsed: float, step: float, spent: float, last: float | None) -> bool:
        """Plan the dearest measurement that the budget allows: the next sharpness, or batch sharpness alone."""
        now = self._now
        # once the cheapest has been made, the others are guessed from what that cost
        scale = max(step, now.seconds.get("batch", 0.0) / GUESS["batch"])
        seconds = {kind: now.seconds.get(kind, GUESS[kind] * scale) for kind in GUESS}
        now.wait = seconds["sharpness"]
        # the second is full: the first shall come early
        kind = "full" if now.measured % self.full == min(1, self.full - 1) else "sharpness"
        now.planned = None
        if spent + seconds[kind] <= self.budget * elapsed:
            now.planned = kind
        elif now.between + seconds["batch"] <= BETWEEN * self.budget * elapsed:
            now.planned = "batch" if spent + seconds["batch"] <= self.budget * elapsed else None
        return now.planned is not None

    def unmet(self) -> str | None:
        """Of a run so short that only batch sharpness could be had; or the batch of the other processes."""
        now = self._now
        if self.every is None and now.between and not now.measured:
            takes = f"a measurement of the sharpness takes about {now.wait:.2g} s"
            allow = "Curvature(budget=…) or (every=…) allows more"
            return f"{takes}, more than {self.budget:.0%} of the time so far; {allow}"
        if now.processes > 1 and self.loss_closure is None:
            what = f"that of the batch of all {now.processes} processes"
            return f"{what}: recorded is that of the first one's part, as a rule sharper; {self.elsewhere}"
        return None

    def measure(self, moment: Moment) -> None:
        """Rebuild the loss, check it, measure, emit.

        Raises:
            UsageError: if the loss cannot be rebuilt (after some attempts), or not be differentiated twice.
        """
        began = time.perf_counter()
        now = self._now
        kind = now.planned or ("full" if now.measured % self.full == 0 else "sharpness")
        now.planned = None
        loss = self._loss(moment)
        if loss is None:
            return
        now.processes = processes.count()
        sharpest = _Measurement(self, now, moment, loss).run(kind)
        if kind == "full" and self.blocks:
            _blocks(self, moment, loss)
        if kind == "full" and self.landscape is not None and sharpest is not None and len(sharpest) > 1:
            _landscape(moment, loss, sharpest[:2], self.landscape)
        now.seconds[kind] = time.perf_counter() - began
        if kind == "batch":
            now.between += now.seconds[kind]
        else:
            now.measured += 1

    def _loss(self, moment: Moment) -> Rebuilt | None:
        if self.loss_closure is not None:
            return given(moment, self.loss_closure, self.parameters, self.mode, self.dtype)
        now = self._now
        try:
            found = rebuilt(moment, self.parameters, self.mode, self.dtype)
        except Refused as e:
            now.refused += 1
            if now.refused < ATTEMPTS:
                return None
            how = "computes it" if moment.local is None else "computes it without what other processes know"
            raise UsageError(
                f"the loss of a step could not be played again ({e}); "
                f"pass monitor.Curvature(loss_closure=…), a function that {how}"
            ) from None
        now.refused = 0
        return found


class _Measurement:
    """One measurement of the whole; holds every graph, so that all are freed with it."""

    def __init__(self, options: Curvature, now: _State, moment: Moment, loss: Rebuilt) -> None:
        self.options = options
        self.now = now
        self.moment = moment
        self.loss = loss
        self.closure: LossClosure = loss.closure
        self.hessian = Hessian(loss.closure, loss.names)
        size = self.hessian.n * torch.finfo(self.hessian.dtype).bits // 8
        self.basis = max(options.top + 11, int(BASIS // size))
        self.most = MOST
        self.of_step = True

    def run(self, kind: str) -> Tensor | None:
        """Measure and emit; the eigenvectors of the largest eigenvalues, ``(k, n)``, if it got that far."""
        H = self.hessian
        with H.session():
            g = self.loss.gradient if self.loss.gradient is not None else self.closure.gradient(H.point)
            if not bool(torch.isfinite(g).all()):
                return None  # nothing is defined here, and the loss says so itself
            self._batch(g)
            self.of_step = is_of_step(self.moment, self.loss, H.point.slices(), g)
            del g
            if kind == "batch":
                return None
            with self.moment.again():  # products like the first, replays like that of the check
                return self._eigen(kind == "full")

    def _eigen(self, full: bool) -> Tensor:
        H = self.hessian
        run = self._lanczos(full)
        top = _honest(run.largest, run)
        value = self.closure.value(H.point)
        sharpest = run.eigenvectors("largest")
        u = sharpest[0]
        self._emit(
            "sharpness", SHARPNESS, "",
            (*_first(top), run.products, self.loss.examples, H.n, value, float(self.of_step)),
        )  # fmt: skip
        self.now.start, self.now.names = u.to("cpu", copy=True), self.loss.names
        trace = self._spectrum(run, top) if full else None
        del run
        self._edge(top, trace)
        if full:
            self._opposing(u)
        return sharpest

    def _lanczos(self, full: bool) -> Krylov:
        H, now = self.hessian, self.now
        if full:  # a density is seen without prejudice from a random start only
            steps = min(NODES, H.n, self.most)
            return lanczos(
                H, self.options.top, 1, steps=steps, max_products=max(self.most, steps), seed=self.moment.step,
                max_basis=self.basis,
            )  # fmt: skip
        start = now.start if now.names == self.loss.names else None
        return lanczos(H, 1, start=start, max_products=self.most, seed=self.moment.step, max_basis=self.basis)

    def _batch(self, g: Tensor) -> None:
        square = dot(g, g)
        began = time.perf_counter()
        curvature = dot(g, self.hessian(g))
        took = time.perf_counter() - began
        self.most = int(min(MOST, processes.longest() / (PARTS * took)))
        if self.most < FEWEST:
            raise UsageError(f"a product with the Hessian takes {took:.2g} s, and other processes wait for it")
        if square > 0:
            self._emit("batch_sharpness", BATCH, "", (curvature / square, square**0.5, self.loss.examples))

    def _spectrum(self, run: Krylov, top: Eigenvalues) -> Estimate:
        H = self.hessian
        for i in range(len(top)):
            self._emit("hessian_eigenvalue", EIGENVALUE, f"eigenvalue[{i + 1}]", _first(top, i))
        trace, norm = traces(H, run, samples=SAMPLES, seed=self.moment.step)
        self._emit("hessian_trace", TRACE, "", (trace.value, trace.stderr, norm.value, norm.stderr, trace.samples))
        density = SpectralDensity.of([run], H.n)
        smallest = run.smallest
        self._emit(
            "spectral_density", DENSITY, "",
            (density.negative_ratio(), density.negative_weight(), density.negative, smallest.values[0],
             smallest.residuals[0], len(density.nodes)),
        )  # fmt: skip
        self.moment.table("spectral_density", {"node": density.nodes, "weight": density.weights})
        return trace

    def _edge(self, top: Eigenvalues, trace: Estimate | None) -> None:
        optimizers = self.loss.optimizers
        if not any(o.state for o in optimizers) and any({"betas", "alpha"} & o.defaults.keys() for o in optimizers):
            return  # before its first update an adaptive optimizer has no scale
        try:
            s = stability(
                self.hessian, optimizers, top=top, trace=trace.value if trace else None, seed=self.moment.step,
                max_products=self.most, max_basis=self.basis,
            )  # fmt: skip
        except UsageError as e:
            self._tell(f"edge_of_stability is not recorded: {str(e).partition(';')[0]}")
            return
        self._emit("edge_of_stability", EDGE, "", (s.ratio, s.threshold, s.largest_learning_rate, float(s.converged)))
        if s.products and s.sharpness is not None:
            self._emit("preconditioned_sharpness", PRECONDITIONED, "", (s.sharpness, s.threshold, float(s.converged)))
        if s.sgd_ratio is not None and trace is not None and s.learning_rate is not None:
            self._emit("sgd_stability", SGD, "", (s.sgd_ratio, s.learning_rate * trace.stderr / 2))

    def _opposing(self, u: Tensor) -> None:
        if not self.loss.tapes:
            return
        tape, H = self.loss.tapes[0], self.hessian
        # as an output of the closure, so that random numbers and buffers are in order
        data = tape.copy(self.closure.dtype)
        calls = self.closure.outputs(Batch(lambda: data.calls(F.cross_entropy), lambda x: x))
        losses = [_cross_entropy.losses(args, kwargs) for args, kwargs, _ in calls]
        losses = [(loss, counted) for loss, counted in losses if loss.requires_grad]
        if not losses:
            return
        rows, counted = (torch.cat(parts) for parts in zip(*losses, strict=True))
        p = _slopes(rows, H, u)[counted].cpu().double().numpy()
        at = counted.nonzero()[:, 0].cpu().numpy()
        if len(p) < 2 or not np.isfinite(p).all() or not p.any():
            return
        (up, up_mean), (down, down_mean) = _group(p), _group(-p)
        cancelled = 1 - abs(float(p.sum())) / float(np.abs(p).sum())
        typical = float(np.median(np.abs(p)))
        self._emit("opposing_signals", OPPOSING, "", (len(p), up, down, up_mean, -down_mean, typical, cancelled))
        order = np.argsort(p)
        strongest = np.unique(np.concatenate([order[:STRONGEST], order[-STRONGEST:]]))
        strongest = strongest[np.argsort(p[strongest])]
        own = rows.detach().cpu().double().numpy()[at[strongest]]
        found = {"row": at[strongest], "projection": p[strongest], "loss": own}
        self.moment.table("opposing_signals", found)

    def _emit(self, reads: str, stats: Sequence[str], module: str, values: Sequence[float | None]) -> None:
        _emit(self.moment, reads, stats, module, values)

    def _tell(self, text: str) -> None:
        if text not in self.now.told:
            self.now.told.add(text)
            self.moment.recorder.flusher.warn(text)


def _blocks(options: Curvature, moment: Moment, loss: Rebuilt) -> None:
    asked = options.blocks
    found = block_spectra(
        loss.closure.model, loss.closure, blocks=None if isinstance(asked, bool) else asked, top=1, bottom=0, steps=0,
        samples=0, max_products=MOST, seed=moment.step,
    )  # fmt: skip
    for name, s in found.items():
        _emit(moment, "block_sharpness", EIGENVALUE, name, _first(s.largest))


def _landscape(moment: Moment, loss: Rebuilt, directions: Tensor, radius: float) -> None:
    found = landscape(loss.closure, directions, parameters=loss.names, radius=radius, points=POINTS)
    first, second = np.meshgrid(*found.coordinates, indexing="ij")
    columns = {"first": first.ravel(), "second": second.ravel(), "loss": found.losses.ravel()}
    moment.table("landscape", columns)


def _emit(moment: Moment, reads: str, stats: Sequence[str], module: str, values: Sequence[float | None]) -> None:
    """Into the row of this step; None is absent."""
    numbers = [0.0 if v is None else float(v) for v in values]
    moment.recorder.emit(reads, stats, module, numbers, absent=[i for i, v in enumerate(values) if v is None])


def _first(e: Eigenvalues, i: int = 0) -> tuple[float, float, float]:
    return float(e.values[i]), float(e.residuals[i]), float(e.converged[i])


def _honest(e: Eigenvalues, run: Krylov) -> Eigenvalues:
    """Nothing has converged where the operator was not even symmetric."""
    return e if run.asymmetry <= ASYMMETRY else Eigenvalues(e.values, e.residuals, np.zeros_like(e.converged))


def _slopes(losses: Tensor, H: Hessian, u: Tensor) -> Tensor:
    """u'∇ℓ_i for all rows: the derivative of u'Σ w_i ∇ℓ_i, which is linear in w, with respect to w."""
    w = torch.zeros_like(losses, requires_grad=True)
    pulled = torch.autograd.grad(losses, H.point.leaves, w, create_graph=True, allow_unused=True)
    used = [i for i, t in enumerate(pulled) if t is not None and t.requires_grad]
    parts = H.point.split(u)
    (slopes,) = torch.autograd.grad([pulled[i] for i in used], w, [parts[i] for i in used])
    return slopes


def _group(p: Array) -> tuple[int, float]:
    """The least number of rows that hold half of what is positive in ``p``, and their mean."""
    ranked = np.sort(p[p > 0])[::-1]
    if not ranked.size:
        return 0, 0.0
    size = int(np.searchsorted(np.cumsum(ranked), 0.5 * ranked.sum())) + 1
    return size, float(ranked[:size].mean())
