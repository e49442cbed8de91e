"""The training loss of one step as a `LossClosure`: played again from its tapes, and trusted only after a check.

Of several processes that average their gradients each has a loss of its own: that of its own batch, whose gradient is
what its backward passes gave before they were averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from monitor.curvature.closure import LossClosure, Selection
from monitor.curvature.environment import Mode
from monitor.curvature.precision import double
from monitor.errors import UsageError
from monitor.record.probe import Moment
from monitor.record.sites.state import StateSite
from monitor.record.tape import Tape

#: A replay is accepted if its gradient's cosine with the run's is at least this, and its norm the run's within this
#: fraction: a forgotten weight-decay term gave a cosine of .997 (measured on a small network), rounding 1 − 1e-7.
COSINE, NORM = 1 - 1e-4, 1e-3
_HALF = (torch.float16, torch.bfloat16)


class Refused(UsageError):  # noqa: N818 - not an error: the next step is tried
    """The loss that was played again is not the run's."""


@dataclass(frozen=True)
class Rebuilt:
    """The loss of a step.

    Attributes:
        closure: the loss that the optimizer was given the gradient of: summed over calls of `backward`, loss scale
            divided out. Of several processes, this one's.
        names: the parameters to be measured: trained by ``optimizers``, and selected.
        optimizers: whose gradients these are.
        gradient: of ``closure`` with respect to ``names``, flat, if checking has given it already.
        examples: rows of the batch, None if unknown.
        tapes: what it was rebuilt from; empty for a closure of the user's.
    """

    closure: LossClosure
    names: tuple[str, ...]
    optimizers: Sequence[Optimizer]
    gradient: Tensor | None
    examples: int | None
    tapes: Sequence[Tape]


def given(moment: Moment, loss: Any, parameters: Selection, mode: Mode, dtype: torch.dtype | None) -> Rebuilt:
    """The user's own loss: a callable, or ``(loss_fn, batch)``.

    Raises:
        UsageError: as `LossClosure`.
    """
    loss_fn, batch = loss if isinstance(loss, tuple) else (loss, None)
    closure = LossClosure(_model(moment), loss_fn, batch, mode=mode, dtype=dtype)
    optimizers = moment.optimizers
    trained = _trained(closure, optimizers)
    names = tuple(n for n in closure.select(parameters) if n in trained)
    return Rebuilt(closure, names, optimizers, None, closure.size, ())


def rebuilt(moment: Moment, parameters: Selection, mode: Mode, dtype: torch.dtype | None) -> Rebuilt | None:
    """The loss of the step that is about to be made; None if its gradient is not finite.

    Args:
        moment: with tapes.
        parameters: which of the trained ones are measured.
        mode: of the modules while measuring; the check runs them as they are.
        dtype: precision of the measurement.

    Raises:
        Refused: if its gradient is not the run's: cosine below `COSINE`, or another norm than that of the run, with or
            without the clipping that was seen.
        UsageError: as `LossClosure`.

    Source: corrections to the method of replaying the loss function alone, which drops a script's other terms.
    """
    model, tapes = _model(moment), moment.tapes
    inverse = _inverse_scale(moment)
    seen = _Autocast(tapes, off=False)
    as_run = LossClosure.total(model, [_again(t, inverse, seen, as_run=True) for t in tapes], mode="train")
    point = as_run.point(_trained(as_run, moment.optimizers))
    gradient = as_run.gradient(point)
    if not bool(torch.isfinite(gradient).all()):
        given = (_given(moment, p) for group in moment.optimizer.param_groups for p in group["params"])
        if all(bool(g.isfinite().all()) for g in given if g is not None):
            raise Refused("its gradient is not finite, that of the run is")
        return None
    slices, live = point.slices(), as_run.named()
    optimizers, worst = [], None
    for o in moment.optimizers:
        mine = {id(p) for group in o.param_groups for p in group["params"]}
        pairs = [(gradient[at], live[name]) for name, at in slices.items() if id(live[name]) in mine]
        fault = _fault(moment, o, pairs)
        if fault is None:
            optimizers.append(o)
        elif o is moment.optimizer:
            worst = fault
    if worst is not None:
        raise Refused(worst)
    trained = set(_trained(as_run, optimizers))
    names = tuple(n for n in as_run.select(parameters) if n in trained)
    if not names:
        raise UsageError("the optimizer updates none of the selected parameters")
    half = any(leaf.dtype in _HALF for leaf in point.leaves)
    same = mode == "train" and dtype is None and not half and not seen.met
    dtype = point.dtype if dtype is None and (half or seen.met) else dtype
    casts = _casts(model)
    off = _Autocast(tapes, off=True) if seen.met else None
    losses = [_again(t, inverse, off, casts, dtype=dtype) for t in tapes]
    closure = LossClosure.total(model, losses, mode=mode, dtype=dtype)
    kept = torch.cat([gradient[slices[n]] for n in names]) if same else None
    return Rebuilt(closure, names, optimizers, kept, _examples(tapes), tapes)


def is_of_step(moment: Moment, loss: Rebuilt, slices: Mapping[str, slice], gradient: Tensor) -> bool:
    """Whether what is measured is the loss of the step: of one that was given, whether its gradient is the run's.

    Args:
        moment: with the gradients of the step.
        loss: rebuilt or given.
        slices: where in ``gradient`` each parameter's part is.
        gradient: ``(n,)``, of ``loss`` with respect to its names.
    """
    if loss.tapes:
        return True
    live = loss.closure.named()
    for o in loss.optimizers:
        mine = {id(p) for group in o.param_groups for p in group["params"]}
        pairs = [(gradient[at], live[name]) for name, at in slices.items() if id(live[name]) in mine]
        if pairs and _fault(moment, o, pairs) is not None:
            return False
    return True


def _model(moment: Moment) -> nn.Module:
    return moment.model if len(moment.models) == 1 else nn.ModuleList(moment.models)


def _trained(closure: LossClosure, optimizers: Sequence[Optimizer]) -> tuple[str, ...]:
    ids = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    live = closure.named()
    names = tuple(n for n in closure.names if id(live[n]) in ids)
    if not names:
        raise UsageError("no optimizer that was seen updates a parameter of this model")
    return names


def _casts(model: nn.Module) -> list[torch.autocast]:
    """What turns autocast on in forwards that have been decorated with it, as Accelerate does and so `Trainer`."""
    found = []
    for m in model.modules():
        forward: Any = m.forward
        while forward is not None:
            forward = getattr(forward, "__func__", forward)
            for cell in getattr(forward, "__closure__", None) or ():
                with suppress(ValueError):  # it is empty
                    found += [cell.cell_contents] if isinstance(cell.cell_contents, torch.autocast) else []
            forward = getattr(forward, "__wrapped__", None)
    return [c for c in found if c._enabled]


@contextmanager
def _off(casts: Sequence[torch.autocast]) -> Iterator[None]:
    for c in casts:
        c._enabled = False
    try:
        yield
    finally:
        for c in casts:
            c._enabled = True


class _Autocast(TorchFunctionMode):
    """Looks whether a call in here is made under autocast, whoever has turned it on, and can turn it off for the call.

    Attributes:
        met: one was.
    """

    def __init__(self, tapes: Sequence[Tape], off: bool) -> None:
        super().__init__()
        self._kinds = {kind for t in tapes for kind in t.kinds}
        self._off = off
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on = [kind for kind in self._kinds if torch.is_autocast_enabled(kind)]
        self.met |= bool(on)
        off = on if self._off else ()
        for kind in off:
            torch.set_autocast_enabled(kind, False)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            for kind in off:
                torch.set_autocast_enabled(kind, True)


def _again(
    tape: Tape,
    inverse: float,
    mode: _Autocast | None,
    casts: Sequence[torch.autocast] = (),
    *,
    as_run: bool = False,
    dtype: torch.dtype | None = None,
) -> Callable[[], Tensor]:
    """The loss of a tape, under ``mode``: with autocast as it was, or with that of ``casts`` off."""

    def loss() -> Tensor:
        with _off(casts), mode or nullcontext():
            # on data of its own: a model that changes its input in place must not change the user's once more
            try:
                return tape.copy(dtype).replay(autocast=as_run) * inverse
            except RuntimeError as e:
                if as_run or mode is None or "dtype" not in str(e):
                    raise
                why = str(e).splitlines()[0]
                raise UsageError(
                    f"curvature is that of a loss without autocast, and without it the model fails ({why}); "
                    "pass monitor.Curvature(loss_closure=…)"
                ) from None

    return loss


def _inverse_scale(moment: Moment) -> float:
    scale = getattr(moment.optimizer, "grad_scale", None)  # GradScaler's, for optimizers that unscale inside
    if isinstance(scale, Tensor):
        return 1.0 / float(scale)
    inverse = moment.recorder.inverse_scale
    return 1.0 if inverse is None else float(inverse)


def _given(moment: Moment, p: Tensor) -> Tensor | None:
    """The gradient that the run has for this parameter, not averaged over processes."""
    g = p.grad if moment.local is None else moment.local.get(id(p))
    return None if g is None else g.detach().to_dense() if g.is_sparse else g.detach()


def _fault(moment: Moment, optimizer: Optimizer, pairs: Sequence[tuple[Tensor, Tensor]]) -> str | None:
    """Why the first of each pair is not the gradient that the second, a parameter, has; None if it is."""
    scale = getattr(optimizer, "grad_scale", None)
    unscale = 1.0 / float(scale) if isinstance(scale, Tensor) else 1.0
    clip, whose = _clip(moment), "the one the optimizer is given"
    if moment.local is not None:  # as it was before anything was done to it
        unscale, clip, whose = _inverse_scale(moment), 1.0, "that of this process's own backward passes"
    dot = mine = theirs = 0.0
    for again, p in pairs:
        a = double(again)
        mine += float(a @ a)
        given = _given(moment, p)
        if given is None:
            continue
        g = double(given.reshape(-1)).to(a.device) * unscale
        dot += float(a @ g)
        theirs += float(g @ g)
    if not math.isfinite(theirs):
        return "the gradient that the optimizer is given is not finite, its own is"
    if mine == 0 and theirs == 0:
        return None
    cosine = dot / math.sqrt(mine * theirs) if mine > 0 and theirs > 0 else 0.0
    norm = math.sqrt(theirs / mine) if mine > 0 else math.inf
    near = any(abs(norm / expected - 1) <= NORM for expected in (1.0, clip) if expected > 0)
    if cosine >= COSINE and near:
        return None
    if moment.local is None and _cut_off([(a, g) for a, p in pairs if (g := _given(moment, p)) is not None], unscale):
        return None
    again = 1 / norm if norm else math.inf
    return f"its gradient has cosine {cosine:.6f} with {whose}, and {again:.4g} times its norm"


def _cut_off(pairs: Sequence[tuple[Tensor, Tensor]], unscale: float) -> bool:
    """True if the second of each pair is the first with its larger values cut off, as by `clip_grad_value_`.

    At most half of them: of the others it has to be shown that they are the same.
    """
    limit = max((float(g.abs().max()) for _, g in pairs if g.numel()), default=0.0)
    dot = mine = theirs = 0.0
    cut = count = 0
    for again, given in pairs:
        a = double(again)
        g = double(given.reshape(-1)).to(a.device)
        at = g.abs() == limit
        if not bool((a[at] * g[at].sign() >= (1 - NORM) * limit * unscale).all()):
            return False
        cut, count = cut + int(at.sum()), count + at.numel()
        a, g = a[~at], g[~at] * unscale
        dot, mine, theirs = dot + float(a @ g), mine + float(a @ a), theirs + float(g @ g)
    if not (1 < cut <= count / 2 and mine > 0 and theirs > 0):
        return False
    return dot >= COSINE * math.sqrt(mine * theirs) and abs(math.sqrt(theirs / mine) - 1) <= NORM


def _clip(moment: Moment) -> float:
    site = next((s for s in moment.recorder.sites if isinstance(s, StateSite)), None)
    coefficient = None if site is None else site.clip
    return 1.0 if coefficient is None else float(coefficient)


def _examples(tapes: Sequence[Tape]) -> int | None:
    found = 0
    # two losses of one forward have the same inputs
    for args, kwargs in {id(kwargs): (args, kwargs) for args, kwargs in (tape.inputs for tape in tapes)}.values():
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        if first is None:
            return None
        found += len(first)
    return found
