"""How a router chose: how often each expert was chosen, and how sure of it the router was.

    n_e  assignments to expert e,   f_e = n_e / Σ n,   P_t = softmax(z_t), z_t the scores of a token,   p = mean_t P_t

A router is joined over micro-batches as one vector of sums (`joined`) and reduced at the end, because neither the
largest load nor an entropy of means can be put together from those of parts. What is over capacity is counted in each
call, as a model with a limit does: ``Σ_e max(0, n_e − ⌈1.25 · k T / E⌉)``.

Source: definition; Zoph et al. (2022), ST-MoE, arXiv 2202.08906, eq. 5, for the z-loss; OLMo-core for the violation.
"""

from __future__ import annotations

import math
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

#: Capacity of an expert over its share in perfect balance: Fedus et al. (2021), Switch Transformers, section 2.2.
FACTOR = 1.25

Vector = Tensor | np.ndarray


def router_sums(chosen: Tensor, experts: int, z: Tensor | None) -> Vector:
    """The sums of one call of a router, ``(HEAD + 2·experts,)``.

    Args:
        chosen: ``(token, k)`` int64, the experts of each token; read only.
        experts: how many there are.
        z: ``(row, experts)`` scores before the softmax of all tokens or of some; log-probabilities do where only those
            are known. None if neither is.

    Returns:
        A float64 array on a CPU, a float32 tensor on the device elsewhere: tokens, rows, sum of the entropies, sum of
        squares of the log-sum-exp, largest score, sum of the margins of the first over the second score, assignments
        over capacity, two places for `limits`, sum of P, times each expert was chosen.

    Cost: one read of ``chosen`` and ``z``, a few temporaries of the size of ``z``; no host sync on an accelerator.
    """
    if chosen.device.type == "cpu":
        counts = np.bincount(chosen.numpy().reshape(-1), minlength=experts)
        values, p = [0.0, 0.0, -np.inf, 0.0], np.zeros(experts)
        if z is not None and len(z):
            with np.errstate(all="ignore"):
                values, p = _rows(np, np.ascontiguousarray(z.float().numpy().T))
        rows = 0 if z is None else len(z)
        head = [chosen.shape[0], rows, *values, _over(np, counts, chosen.numel()), 0, 0]
        return np.concatenate((head, p, counts)).astype(np.float64)
    return on_device(chosen, experts, z)


def on_device(chosen: Tensor, experts: int, z: Tensor | None) -> Tensor:
    """The same without a host sync, as `router_sums` does on an accelerator."""
    counts = torch.zeros(experts, device=chosen.device)
    flat = chosen.reshape(-1)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.float32))
    head = counts.new_zeros(HEAD)
    head[_TOKENS] += chosen.shape[0]
    head[_TOP] -= torch.inf
    p = torch.zeros_like(counts)
    if z is not None and len(z):
        values, p = _rows(torch, z.float().T.contiguous())
        head[_ROWS] += len(z)
        head[_ENTROPY : _MARGIN + 1] = torch.stack(values)
    head[_OVER] += _over(torch, counts, chosen.numel())
    return torch.cat((head, p, counts))


def _over(xp: Any, counts: Any, assigned: int) -> Any:
    """Assignments beyond ``⌈1.25 · assigned / E⌉`` of an expert."""
    return xp.clip(counts - math.ceil(FACTOR * assigned / len(counts)), 0, None).sum()


def limits(sums: Vector, chosen: Tensor, wanted: Tensor, room: Tensor) -> None:
    """Add what a model's own capacity limit left out to the sums of a call.

    Args:
        sums: of `router_sums`; changed.
        chosen: ``(token, k)`` int64, as given there.
        wanted: ``(token, expert)``, 1 where the model asked for an expert in one of its queues.
        room: ``(token, expert)`` bool, where the place in that queue is within the capacity.
    """
    asked = wanted.gather(1, chosen) != 0
    lost = asked & ~room.gather(1, chosen)
    if isinstance(sums, np.ndarray):
        sums[[_DROPPED, _LIMITED]] += int(lost.sum()), int(asked.sum())
    else:
        sums[_DROPPED : _LIMITED + 1] += torch.stack((lost.sum(), asked.sum()))


def add_choice(sums: Vector, other: Vector, assigned: int) -> None:
    """Count another choice of the same tokens, such as the second of a router that takes one maximum after another.

    Args:
        sums: of `router_sums`; changed.
        other: those of the other choice.
        assigned: assignments of both together.
    """
    x: Any = sums
    y: Any = other
    counts = x[HEAD + (len(x) - HEAD) // 2 :]
    counts += y[HEAD + (len(x) - HEAD) // 2 :]
    x[_OVER] = _over(np if isinstance(sums, np.ndarray) else torch, counts, assigned)


def z_of(sums: Vector) -> Any:
    """The z-loss, ``()``; NaN without rows."""
    with np.errstate(all="ignore"):
        return sums[_LSE2] / sums[_ROWS]


def _rows(xp: Any, z: Any) -> tuple[list[Any], Any]:
    """``[sum of entropies, of squared lse, largest, sum of margins]`` and the sum of P, of ``(expert, row)`` scores.

    ``xp`` is numpy or torch. Experts are few: along the rows numpy is twenty times faster than across them.
    """
    top = xp.amax(z, axis=0)
    d = z - top
    e = xp.exp(d)
    total = e.sum(axis=0)
    log = xp.log(total)
    # the clip keeps scores of -inf (experts that were masked) out of 0 * inf
    entropy = log - (e * xp.clip(d, -200, None)).sum(axis=0) / total
    return [entropy.sum(), xp.square(top + log).sum(), xp.amax(top), _margins(xp, d)], (e / total).sum(axis=1)


def _margins(xp: Any, d: Any) -> Any:
    """Sum over rows of largest minus second largest; ``d`` is ``(expert, row)``, less its largest."""
    top = d == 0
    second = xp.amax(xp.where(top, -xp.inf, d), axis=0)
    return -xp.where(top.sum(axis=0) > 1, 0.0, second).sum()


def joined(a: Vector, b: Vector) -> Vector:
    """The sums of two micro-batches as if they had been one."""
    x: Any = a
    y: Any = b
    with np.errstate(all="ignore"):
        total = x + y
    total[_TOP] = np.maximum(x[_TOP], y[_TOP]) if isinstance(a, np.ndarray) else torch.maximum(x[_TOP], y[_TOP])
    return total


def balance(sums: Vector, early: Any = math.nan) -> tuple[Vector, Vector]:
    """The statistics of a router and of its experts.

    Args:
        sums: of `router_sums`.
        early: its z-loss at an earlier step, ``()``.

    Returns:
        ``(len(STATS),)`` and ``(experts, 2)`` (`LOAD_STATS`).
    """
    with np.errstate(all="ignore"):
        return _balance(np if isinstance(sums, np.ndarray) else torch, sums, early)


def _balance(xp: Any, s: Any, early: Any) -> tuple[Vector, Vector]:
    experts = (len(s) - HEAD) // 2
    p, counts = s[HEAD : HEAD + experts], s[HEAD + experts :]
    assigned = counts.sum()
    load = counts / assigned
    mean = p / p.sum()
    number = xp.zeros_like(assigned) + experts
    # a mask that does not account for every assignment is not the one that limits them
    limited = xp.where(s[_LIMITED] == assigned, s[_LIMITED], xp.zeros_like(assigned))
    values = (
        s[_TOKENS], s[_ROWS], number, assigned, s[_ENTROPY], _entropy(xp, mean), s[_LSE2], s[_TOP],
        xp.square(load).sum(), xp.amax(load), _entropy(xp, load), s[_MARGIN], s[_OVER], s[_DROPPED], limited,
        xp.zeros_like(assigned) + early,
    )  # fmt: skip
    return xp.stack(values), xp.stack((counts, xp.zeros_like(counts) + assigned), 1)


def _entropy(xp: Any, p: Any) -> Any:
    """Nats; 0 ln 0 is 0, and NaN stays NaN."""
    return -(p * xp.log(xp.where(p == 0, xp.ones_like(p), p))).sum()
