"""How a router chose: how often each expert was chosen, and how sure of it the router was.

    n_e  assignments to expert e,   f_e = n_e / Σ n,   P_t = softmax(z_t), z_t the scores of a token,   p = mean_t P_t

A router is joined over micro-batches as one vector of sums (`joined`) and reduced at the end, because neither the
largest load nor an entropy of means can be put together from those of parts. What is over capacity is counted in each
call, as a model with a limit does: ``Σ_e max(0, n_e − ⌈1.25 · k T / E⌉)``.

Source: definition; Zoph et al. (2022), ST-MoE, arXiv 2202.08906, eq. 5, for the z-loss; OLMo-core for the violation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Of the pass ``router``, per router; of the pass ``router_load``, per expert.
STATS = (
    "tokens", "rows", "experts", "assigned", "sum_entropy", "mean_entropy", "sumsq_lse", "max_z", "sumsq_load",
    "max_load", "load_entropy", "sum_margin", "over", "dropped", "limited", "early_z",
)  # fmt: skip
LOAD_STATS = ("chosen", "assigned")

#: Head of the vector of sums; behind it the sum of P and the counts, one for each expert.
_TOKENS, _ROWS, _ENTROPY, _LSE2, _TOP, _MARGIN, _OVER, _DROPPED, _LIMITED, HEAD = range(10)

#: What a model's own limit of capacity left out, in the vector of sums.
LIMITS = slice(_DROPPED, _LIMITED + 1)

#: Capacity of an expert over its share in perfect balance: Fedus et al. (2021), Switch Transformers, section 2.2.
FACTOR = 1.25

Vector = Tensor | np.ndarray


def router_sums(chosen: Tensor, experts: int, z: Tensor | None) -> np.ndarray:
    """The sums of one call of a router on a CPU, ``(HEAD + 2·experts,)``.

    Args:
        chosen: ``(token, k)`` int64, the experts of each token; read only.
        experts: how many there are.
        z: ``(row, experts)`` scores before the softmax of all tokens or of some; log-probabilities do where only those
            are known. None if neither is.

    Returns:
        float64: tokens, rows, sum of the entropies, sum of squares of the log-sum-exp, largest score, sum of the
        margins of the first over the second score, assignments over capacity, two places for `limits`, sum of P, times
        each expert was chosen.

    Cost: one read of ``chosen`` and ``z``, a few temporaries of the size of ``z``.
    """
    counts = np.bincount(chosen.numpy().reshape(-1), minlength=experts)
    values, p = [0.0, 0.0, -np.inf, 0.0], np.zeros(experts)
    if z is not None and len(z):
        with np.errstate(all="ignore"):
            values, p = _rows(np.ascontiguousarray(z.float().numpy().T))
    rows = 0 if z is None else len(z)
    head = [chosen.shape[0], rows, *values, _over(counts, chosen.numel()), 0, 0]
    return np.concatenate((head, p, counts)).astype(np.float64)


def on_device(chosen: Sequence[Tensor], experts: int, z: Sequence[Tensor] | None) -> Tensor:
    """`router_sums` of several calls at once, without waiting for the device: ``(call, HEAD + 2·experts)`` float32.

    Args:
        chosen: of each call, all of one shape.
        experts: how many there are.
        z: of each call, all of one shape; None if they are not known.

    Cost: about 30 operations, however many calls; a few temporaries of the size of all ``z``.
    """
    calls, flat = len(chosen), torch.stack(tuple(chosen)).flatten(1)
    one, first = _constants(flat.device, calls, experts)
    counts = one.new_zeros(calls * experts)
    # of one dimension, for which torch has a way that is always the same, where that is asked for
    counts = counts.scatter_add_(0, (flat + first).view(-1), one.expand(flat.numel())).view(calls, experts)
    over = (counts - _capacity(flat.shape[1], experts)).clamp_min_(0).sum(1)
    tokens, none = counts.new_full((calls,), len(chosen[0])), counts.new_zeros(calls)
    if z is None or not len(z[0]):
        head = torch.stack((tokens, none, none, none, none - torch.inf, none, over, none, none), 1)
        return torch.cat((head, torch.zeros_like(counts), counts), 1)
    scores = torch.stack(tuple(z)).float()
    rows = counts.new_full((calls,), scores.shape[1])
    top, at = scores.max(-1)
    p = scores.softmax(-1)
    lse = top - p.amax(-1).log_()
    margin = (top - scores.scatter(-1, at.unsqueeze(-1), -torch.inf).amax(-1)).sum(1)
    mass = p.sum(1)
    entropy = torch.xlogy(p, p, out=p).sum((1, 2)).neg_()
    head = torch.stack((tokens, rows, entropy, lse.square_().sum(1), top.amax(1), margin, over, none, none), 1)
    return torch.cat((head, mass, counts), 1)


@lru_cache(maxsize=32)
def _constants(device: torch.device, calls: int, experts: int) -> tuple[Tensor, Tensor]:
    """A one, ``(1,)``, and the number of experts of the calls before each, ``(call, 1)``."""
    before = torch.arange(calls).unsqueeze(1) * experts
    return torch.ones(1, dtype=torch.float32).to(device, non_blocking=True), before.to(device, non_blocking=True)


def _capacity(assigned: int, experts: int) -> int:
    return math.ceil(FACTOR * assigned / experts)


def _over(counts: np.ndarray, assigned: int) -> float:
    """Assignments beyond ``⌈1.25 · assigned / E⌉`` of an expert."""
    return np.clip(counts - _capacity(assigned, len(counts)), 0, None).sum()


def limits(sums: np.ndarray, chosen: Tensor, wanted: Tensor, room: Tensor) -> None:
    """Add what a model's own capacity limit left out to the sums of a call on a CPU.

    Args:
        sums: of `router_sums`; changed.
        chosen: ``(token, k)`` int64, as given there.
        wanted: ``(token, expert)``, 1 where the model asked for an expert in one of its queues.
        room: ``(token, expert)`` bool, where the place in that queue is within the capacity.
    """
    sums[LIMITS] += left_out(chosen, wanted, room).numpy()


def left_out(chosen: Tensor, wanted: Tensor, room: Tensor) -> Tensor:
    """``(2,)`` int64, to be added to `LIMITS`: assignments that were dropped, and those that were asked for."""
    asked = wanted.gather(1, chosen) != 0
    return torch.stack((asked > room.gather(1, chosen), asked)).flatten(1).sum(1)


def add_choice(sums: np.ndarray, other: np.ndarray, assigned: int) -> None:
    """Count another choice of the same tokens, such as the second of a router that takes one maximum after another.

    Args:
        sums: of `router_sums` on a CPU; changed.
        other: those of the other choice.
        assigned: assignments of both together.
    """
    counts = sums[HEAD + (len(sums) - HEAD) // 2 :]
    counts += other[HEAD + (len(sums) - HEAD) // 2 :]
    sums[_OVER] = _over(counts, assigned)


def z_of(sums: Vector) -> Any:
    """The z-loss, ``()``; NaN without rows."""
    with np.errstate(all="ignore"):
        return sums[_LSE2] / sums[_ROWS]


def _rows(z: np.ndarray) -> tuple[list[Any], Any]:
    """``[sum of entropies, of squared lse, largest, sum of margins]`` and the sum of P, of ``(expert, row)`` scores.

    Experts are few: along the rows numpy is twenty times faster than across them.
    """
    top = np.amax(z, axis=0)
    d = z - top
    e = np.exp(d)
    total = e.sum(axis=0)
    log = np.log(total)
    # the clip keeps scores of -inf (experts that were masked) out of 0 * inf
    entropy = log - (e * np.clip(d, -200, None)).sum(axis=0) / total
    return [entropy.sum(), np.square(top + log).sum(), np.amax(top), _margins(d)], (e / total).sum(axis=1)


def _margins(d: np.ndarray) -> Any:
    """Sum over rows of largest minus second largest; ``d`` is ``(expert, row)``, less its largest."""
    top = d == 0
    second = np.amax(np.where(top, -np.inf, d), axis=0)
    return -np.where(top.sum(axis=0) > 1, 0.0, second).sum()


def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sums of two micro-batches on a CPU as if they had been one."""
    with np.errstate(all="ignore"):
        total = a + b
    total[_TOP] = np.maximum(a[_TOP], b[_TOP])
    return total


def joined_on_device(sums: Sequence[Sequence[Tensor]]) -> Tensor:
    """``(router, HEAD + 2·experts)``: of each router the sums of its micro-batches, of which all have as many."""
    each = torch.stack([vector for parts in sums for vector in parts]).unflatten(0, (len(sums), -1))
    if each.shape[1] == 1:
        return each[:, 0]
    total = each.sum(1)
    total[:, _TOP] = each[:, :, _TOP].amax(1)
    return total


def balance(s: np.ndarray, early: Any = math.nan) -> tuple[np.ndarray, np.ndarray]:
    """The statistics of a router and of its experts.

    Args:
        s: the sums of `router_sums` on a CPU.
        early: its z-loss at an earlier step, ``()``.

    Returns:
        ``(len(STATS),)`` and ``(experts, 2)`` (`LOAD_STATS`).
    """
    experts = (len(s) - HEAD) // 2
    with np.errstate(all="ignore"):
        p, counts = s[HEAD : HEAD + experts], s[HEAD + experts :]
        assigned = counts.sum()
        load = counts / assigned
        mean = p / p.sum()
        # a mask that does not account for every assignment is not the one that limits them
        limited = s[_LIMITED] if s[_LIMITED] == assigned else 0.0
        values = (
            s[_TOKENS], s[_ROWS], experts, assigned, s[_ENTROPY], _entropy(mean), s[_LSE2], s[_TOP],
            np.square(load).sum(), np.amax(load), _entropy(load), s[_MARGIN], s[_OVER], s[_DROPPED], limited, early,
        )  # fmt: skip
        return np.stack(values), np.stack((counts, np.zeros_like(counts) + assigned), 1)


def _entropy(p: np.ndarray) -> Any:
    """Nats; 0 ln 0 is 0, and NaN stays NaN."""
    return -(p * np.log(np.where(p == 0, np.ones_like(p), p))).sum()


def balance_on_device(sums: Tensor, early: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same of several routers at once: ``(router, len(STATS))`` and ``(router, experts, 2)``.

    Args:
        sums: of `joined_on_device`.
        early: ``(router,)``.

    Cost: 14 operations.
    """
    both = sums[:, HEAD:].unflatten(1, (2, -1))  # P and the counts: (router, 2, expert)
    total = both.sum(2, keepdim=True)
    share = both / total
    load, assigned = share[:, 1], total[:, 1, 0]
    entropy = torch.xlogy(share, share).sum(2).neg_()
    s = sums.unbind(1)
    limited = s[_LIMITED] * (s[_LIMITED] == assigned)
    values = (
        s[_TOKENS], s[_ROWS], torch.full_like(assigned, both.shape[2]), assigned, s[_ENTROPY], entropy[:, 0], s[_LSE2],
        s[_TOP], load.square().sum(1), load.amax(1), entropy[:, 1], s[_MARGIN], s[_OVER], s[_DROPPED], limited,
        torch.full_like(assigned, math.nan) if early is None else early,
    )  # fmt: skip
    return torch.stack(values, 1), torch.stack((both[:, 1], total[:, 1].expand_as(both[:, 1])), 2)
