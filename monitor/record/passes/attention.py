"""Statistics of attention per head: how large its logits are, how sharp its rows, how much goes to the first key.

The logits s are what the softmax is given: scaled, with an additive mask or bias, without the keys that are masked out.
With lse_i the log-sum-exp of row i over its n_i keys, ``max_i (lse_i - ln n_i) <= max s <= max_i lse_i``. A row's
largest logit is at most its lse; so if the largest logit of the rows read is at least the lse of every row
that was not read, it is the largest of all. Entropy and sink mass come from an evenly spaced sample of rows, and n
says of how many; or from all rows, where the fused kernel can be asked for them: with keys in the place of values it
gives ``Σ_j p_ij k_j``, so that ``H_i = lse_i − scale · ⟨q_i, Σ_j p_ij k_j⟩`` needs no logit.

Attention written by hand has all its logits in memory. Reading them for the largest one costs a sixteenth of their
softmax, so it is that of all rows; the rest is a sample too.

Here is what a CPU computes, in numpy, where a call costs a fifth of one of torch's; what an accelerator does is in
`monitor.record.passes.attention_together`.

Source: Wortsman et al. (2023), Small-scale proxies for large-scale Transformer training instabilities, sec. 3, for the
largest logit; the rest by definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from monitor.record.passes.dtype import sum_dtype

STATS = (
    "lse_max", "lse_lower", "found", "unread", "qk_bound", "q_norm", "k_norm", "n", "n_many", "sum_entropy",
    "sum_normalised", "sum_sink",
)  # fmt: skip
MERGE = ("max",) * 7 + ("sum",) * 5
_MAXIMA = MERGE.count("max")

#: Which of them describe rows: ``(n, n_many, Σ entropy, Σ normalised, Σ sink)``.
OF_ROWS = slice(_MAXIMA, None)
#: Rows of each head with the largest log-sum-exp that are read.
TOP = 16
#: Additive masks at or below this share of the most negative number of their dtype mask the key out.
_MASKED = 0.5
#: Where only logits are there, a key is masked out if its logit is at or below this (a mask of -1e9 or of the lowest
#: number is in it), or so far below the largest of its row (an old mask of -1e4) that its share is 0 in any format.
_LOWEST, BELOW = -1e8, 5e3
# exp(-200) is 0 in every sum here; the clip keeps -inf logits (masked keys) out of 0 * inf
_DEEP = -200


def unseen_below(mask: Tensor) -> float:
    """At and below which a number of a mask takes the key out; -inf for one that is bool."""
    return -math.inf if mask.dtype == torch.bool else _MASKED * torch.finfo(mask.dtype).min


def lowest(dtype: torch.dtype) -> float:
    """At and below which a logit of this dtype is one of a key that is masked out."""
    return max(_LOWEST, _MASKED * torch.finfo(dtype).min)


def lse_max(lse: Tensor) -> np.ndarray:
    """The bound alone: the largest log-sum-exp of each head.

    Args:
        lse: ``(batch, head, query)``, at least one query, on a CPU; read only.

    Returns:
        ``(head,)``. NaN where there is one.

    Cost: one read of ``lse``.
    """
    return np.amax(lse.numpy(), axis=(0, 2))


def merge(old: Any, new: Any) -> Any:
    """Statistics ``(head, statistic)`` of two micro-batches as those of both."""
    xp: Any = np if isinstance(old, np.ndarray) else torch
    largest = xp.maximum(old[:, :_MAXIMA], new[:, :_MAXIMA])
    return xp.concatenate((largest, old[:, _MAXIMA:] + new[:, _MAXIMA:]), axis=1)


def attention_rows(
    q: Tensor,
    k: Tensor,
    at: Sequence[int],
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    lse: Tensor | None = None,
) -> np.ndarray:
    """The statistics `STATS` of each head.

    Args:
        q: ``(batch, head, query, d)``, any floating dtype, on a CPU; read only.
        k: ``(batch, key head, key, d)``; the number of heads is a multiple of that of key heads, which serve
            neighbouring heads.
        at: rows to sample, as ``batch * queries + query``, at least one.
        scale: of the products; default ``1 / sqrt(d)``.
        causal: query i sees keys 0…i.
        mask: ``(batch or 1, head or 1, query, key)`` (or just the last two), bool with True for keys that are seen, or
            floating and added.
        lse: ``(batch, head, query)`` log-sum-exp of every row, if it is known: then the `TOP` rows of each head
            where it is largest are read as well. Without it, ``lse_max`` is NaN, ``lse_lower`` -inf, and ``unread``
            +inf (unless ``at`` is every row).

    Returns:
        ``(head, len(STATS))`` float64.

    Cost: one read of q and k, and of k again in slices of one batch element for each row read; never a copy of all of k
    (in 16-bit formats: one copy of q and k).
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1, dtype=sum_dtype(x)).amax((0, 2)).numpy() for x in (q, k))
    limit = -math.inf if mask is None else unseen_below(mask)
    given = None if mask is None else _array(mask.expand(batch, heads, queries, keys))
    look = _Look(_array(q), _array(k), given, causal, scale, limit)
    with np.errstate(all="ignore"):
        sampled, top = look.rows(at)
        all_read, far = len(at) == batch * queries, np.full_like(top, math.inf)
        bound, lower, unread = far * math.nan, -far, -far if all_read else far
        if lse is not None:
            largest = lse.transpose(0, 1).flatten(1).topk(min(TOP + 1, batch * queries), dim=1)
            values, order, lse_ = largest.values.numpy(), largest.indices.numpy(), _array(lse)
            top = np.maximum(top, look.largest(order[:, :TOP]))
            bound = values[:, 0]
            unread = values[:, TOP] if values.shape[1] > TOP and not all_read else -far
            seen = np.arange(1, queries + 1).clip(None, keys) if causal else keys
            lower = np.amax(lse_ - (np.log(seen) if causal else math.log(keys)), axis=(0, 2))
        k_norm = np.broadcast_to(k_norm[:, None], (len(k_norm), group)).reshape(heads)
        columns = (bound, lower, top, unread, q_norm * k_norm * abs(scale), q_norm, k_norm, *sampled)
        return np.stack([c.astype(np.float64) for c in columns], 1)


def all_rows(
    q: Tensor, k: Tensor, lse: Tensor, *, scale: float | None = None, causal: bool = False, mask: Tensor | None = None
) -> np.ndarray:
    """The statistics `OF_ROWS` of each head over every row, from one more call of the fused kernel.

    Args:
        q: ``(batch, head, query, d)`` float32 or float64, on a CPU; read only.
        k: ``(batch, key head, key, d)`` of the same dtype.
        lse: ``(batch, head, query)`` log-sum-exp of every row, from a call with the same arguments.
        scale: as in `attention_rows`.
        causal: as in `attention_rows`.
        mask: bool, with True for keys that are seen, as in `attention_rows`; an added one would enter the entropy.

    Returns:
        ``(head, 5)`` float64. An entropy is off by about 1e-7 of the row's largest logit.

    Cost: one forward of fused attention, without a graph; no logits in memory; no random number.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    queries, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    shared = {"enable_gqa": True} if group > 1 else {}
    mean = F.scaled_dot_product_attention(q, k, k, attn_mask=mask, is_causal=causal, scale=scale, **shared)
    entropy = (lse - scale * (q * mean).sum(-1)).clamp_min(0)
    first = k[:, :, 0].repeat_interleave(group, 1) if group > 1 else k[:, :, 0]
    sink = (scale * (q @ first[..., None])[..., 0] - lse).exp()
    seen = torch.full_like(lse, keys)
    if causal:
        seen = torch.arange(1, queries + 1, device=q.device).clamp(max=keys).expand(lse.shape)
    if mask is not None:
        seen, sink = mask.sum(-1).expand(lse.shape), torch.where(mask[..., 0], sink, 0.0)
    # a row that sees no key is no row
    some, many, nothing = seen > 0, seen > 1, torch.zeros_like(entropy)
    parts = (
        some,
        many,
        torch.where(some, entropy, nothing),
        torch.where(many, entropy / seen.clamp(min=2).float().log(), nothing),
        torch.where(some, sink, nothing),
    )
    return torch.stack([p.sum((0, 2), dtype=torch.float32) for p in parts], 1).double().numpy()


def score_rows(s: Tensor, at: Sequence[int], *, norms: tuple[Tensor, Tensor, Any] | None = None) -> np.ndarray:
    """The statistics `STATS` of each head of an attention whose logits are in memory.

    Args:
        s: ``(batch, head, query, key)`` logits, any floating dtype, on a CPU; masked keys are -inf or very low; read
            only.
        at: rows to sample, as ``batch * queries + query``, at least one.
        norms: queries ``(batch, head, query, d)``, keys ``(batch, head, d, key)`` and the scale of their product, if
            it is known what the logits are made from.

    Returns:
        ``(head, len(STATS))`` float64. ``found`` is the largest logit of all rows, ``unread`` -inf, ``lse_max`` NaN,
        ``lse_lower`` -inf; without ``norms`` ``qk_bound``, ``q_norm`` and ``k_norm`` are NaN.

    Cost: one read of ``s``, and of queries and keys; a copy of the sampled rows.
    """
    queries = s.shape[2]
    limit = lowest(s.dtype)
    rows = torch.stack([s[number // queries, :, number % queries] for number in at]).float().numpy()
    found = s.amax((2, 3)).amax(0).float().numpy()
    if norms is None:
        bound = q_norm = k_norm = np.full_like(found, math.nan)
    else:
        q, k, scale = norms
        lengths = (torch.linalg.vector_norm(x, dim=d, dtype=sum_dtype(x)).amax((0, 2)) for x, d in ((q, -1), (k, -2)))
        q_norm, k_norm = (x.numpy() for x in lengths)
        bound = q_norm * k_norm * abs(float(scale))
    with np.errstate(all="ignore"):
        out = (rows <= limit) | (rows - np.amax(rows, axis=2)[:, :, None] <= -BELOW)
        sums, _ = _row_sums(np.where(out, -math.inf, rows))
        far = np.full_like(found, math.inf)
        top = np.where(found <= limit, -far, found)
        columns = (far * math.nan, -far, top, -far, bound, q_norm, k_norm, *sums)
        return np.stack([c.astype(np.float64) for c in columns], 1)


class _Look:
    """The rows of logits of one call, asked for by number."""

    def __init__(
        self, q: np.ndarray, k: np.ndarray, mask: np.ndarray | None, causal: bool, scale: float, limit: float
    ) -> None:
        self.q, self.k, self.mask = q, k, mask
        self.causal, self.scale, self.limit = causal, scale, limit
        self.heads, self.queries, self.keys = q.shape[1], q.shape[2], k.shape[2]
        self.group = self.heads // k.shape[1]

    def rows(self, at: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """`OF_ROWS`, each ``(head,)``, over rows ``at``; the largest logit."""
        rows = []
        for number in at:
            b, i = divmod(number, self.queries)
            q = self.q[b, :, i].reshape(-1, self.group, self.q.shape[3])
            s = (q @ self.k[b].swapaxes(1, 2)).reshape(self.heads, self.keys) * self.scale
            if self.causal:
                s[:, i + 1 :] = -math.inf
            rows.append(self._masked(s, None if self.mask is None else self.mask[b, :, i]))
        return _row_sums(np.stack(rows))

    def largest(self, order: np.ndarray) -> np.ndarray:
        """The largest logit of each head among its rows ``order``, ``(head, row)``."""
        found, head = [], np.arange(self.heads)
        for number in order.swapaxes(0, 1):
            b, i = number // self.queries, number % self.queries
            k, q = self.k[b, head // self.group], self.q[b, head, i]
            s = (k @ q[:, :, None])[:, :, 0] * self.scale
            if self.causal:
                s = np.where(np.arange(self.keys) > i[:, None], -math.inf, s)
            s = self._masked(s, None if self.mask is None else self.mask[b, head, i])
            found.append(np.amax(s, axis=1))
        return np.amax(np.stack(found), axis=0)

    def _masked(self, s: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return s
        if mask.dtype == np.bool_:
            return np.where(mask, s, -math.inf)
        return np.where(mask <= self.limit, -math.inf, s + mask)


def _row_sums(s: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """`OF_ROWS`, each ``(head,)``, of ``(row, head, key)`` logits with -inf for masked keys; the largest logit."""
    m = np.amax(s, axis=2)
    empty = m == -math.inf  # a row that sees no key is no row
    d = np.clip(s - np.where(empty, 0.0 * empty, m)[:, :, None], _DEEP, None)
    e = np.exp(d)
    total = e.sum(axis=2)
    entropy = np.clip(np.log(total) - (e * d).sum(axis=2) / total, 0, None)
    seen = np.clip((~(s == -math.inf)).sum(axis=2), 2, None)
    many = (~(s == -math.inf)).sum(axis=2) > 1
    nothing = 0 * total
    parts = (
        ~empty,
        many,
        np.where(empty, nothing, entropy),
        np.where(many, entropy / np.log(seen), nothing),
        np.where(empty, nothing, e[:, :, 0] * (s[:, :, 0] != -math.inf) / total),
    )
    return [p.sum(axis=0) for p in parts], np.amax(m, axis=0)


def _array(t: Tensor) -> np.ndarray:
    return (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t).numpy()
