"""Statistics of attention per head: how large its logits are, how sharp its rows, how much goes to the first key.

The logits s are what the softmax is given: scaled, with an additive mask or bias, without the keys that are masked out.
With lse_i the log-sum-exp of row i over its n_i keys, ``max_i (lse_i - ln n_i) <= max s <= max_i lse_i``. A row's
largest logit is at most its lse; so if the largest logit of the rows read is at least the lse of every row
that was not read, it is the largest of all. Entropy and sink mass come from an evenly spaced sample of rows, and n
says of how many; or from all rows, where the fused kernel can be asked for them: with keys in the place of values it
gives ``Σ_j p_ij k_j``, so that ``H_i = lse_i − scale · ⟨q_i, Σ_j p_ij k_j⟩`` needs no logit.

Attention written by hand has all its logits in memory. Reading them for the largest one costs a sixteenth of their
softmax, so it is that of all rows; the rest is a sample too.

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
_LOWEST, _BELOW = -1e8, 5e3
# exp(-200) is 0 in every sum here; the clip keeps -inf logits (masked keys) out of 0 * inf
_DEEP = -200

Rows = Tensor | np.ndarray


def lse_max(lse: Tensor) -> Rows:
    """The bound alone: the largest log-sum-exp of each head.

    Args:
        lse: ``(batch, head, query)``, at least one query; read only.

    Returns:
        ``(head,)``: an array on a CPU, a tensor elsewhere. NaN where there is one.

    Cost: one read of ``lse``; no host sync.
    """
    return np.amax(lse.numpy(), axis=(0, 2)) if lse.device.type == "cpu" else lse.amax((0, 2))


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
) -> Rows:
    """The statistics `STATS` of each head.

    Args:
        q: ``(batch, head, query, d)``, any floating dtype; read only.
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
        ``(head, len(STATS))``: float64 array on a CPU, float32 tensor on ``q.device`` elsewhere.

    Cost: one read of q and k, and of k again in slices of one batch element for each row read; never a copy of all of k
    (in 16-bit formats on a CPU: one copy of q and k); no host sync.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, heads, queries, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax((0, 2)) for x in (q, k))
    values, order = None, None
    if lse is not None:
        largest = lse.transpose(0, 1).flatten(1).topk(min(TOP + 1, batch * queries), dim=1)
        values, order = largest.values, largest.indices
    limit = -math.inf if mask is None or mask.dtype == torch.bool else _MASKED * torch.finfo(mask.dtype).min
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
    # the same formulas in numpy on a CPU, where a call costs a fifth of one of torch's, and in torch elsewhere
    xp: Any = np if q.device.type == "cpu" else torch
    given: list[Any] = [q, k, mask, lse, values, order, q_norm, k_norm]
    if xp is np:
        given = [None if t is None else _array(t) for t in given]
    q_, k_, mask_, lse_, values_, order_, q_norm_, k_norm_ = given
    look = _Look(xp, q_, k_, mask_, causal, scale, limit)
    with np.errstate(all="ignore"):
        sampled, top = look.rows(at)
        all_read, far = len(at) == batch * queries, xp.full_like(top, math.inf)
        bound, lower, unread = far * math.nan, -far, -far if all_read else far
        if lse_ is not None:
            top = xp.maximum(top, look.largest(order_[:, :TOP]))
            bound = values_[:, 0]
            unread = values_[:, TOP] if values_.shape[1] > TOP and not all_read else -far
            seen = xp.arange(1, queries + 1, device=q_.device).clip(None, keys) if causal else keys
            lower = xp.amax(lse_ - (xp.log(seen) if causal else math.log(keys)), axis=(0, 2))
        k_norm_ = xp.broadcast_to(k_norm_[:, None], (len(k_norm_), group)).reshape(heads)
        columns = (bound, lower, top, unread, q_norm_ * k_norm_ * abs(scale), q_norm_, k_norm_, *sampled)
        return xp.stack([c.astype(np.float64) if xp is np else c.float() for c in columns], 1)


def all_rows(
    q: Tensor, k: Tensor, lse: Tensor, *, scale: float | None = None, causal: bool = False, mask: Tensor | None = None
) -> Rows:
    """The statistics `OF_ROWS` of each head over every row, from one more call of the fused kernel.

    Args:
        q: ``(batch, head, query, d)`` float32 or float64; read only.
        k: ``(batch, key head, key, d)`` of the same dtype.
        lse: ``(batch, head, query)`` log-sum-exp of every row, from a call with the same arguments.
        scale: as in `attention_rows`.
        causal: as in `attention_rows`.
        mask: bool, with True for keys that are seen, as in `attention_rows`; an added one would enter the entropy.

    Returns:
        ``(head, 5)``: float64 array on a CPU, float32 tensor on ``q.device`` elsewhere. An entropy is off by about
        1e-7 of the row's largest logit.

    Cost: one forward of fused attention, without a graph; no logits in memory; no random number; no host sync.
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
        torch.where(many, entropy / seen.clamp(min=2).log(), nothing),
        torch.where(some, sink, nothing),
    )
    sums = torch.stack([p.sum((0, 2), dtype=torch.float32) for p in parts], 1)
    return sums.double().numpy() if q.device.type == "cpu" else sums


def score_rows(s: Tensor, at: Sequence[int], *, norms: tuple[Tensor, Tensor, Any] | None = None) -> Rows:
    """The statistics `STATS` of each head of an attention whose logits are in memory.

    Args:
        s: ``(batch, head, query, key)`` logits, any floating dtype; masked keys are -inf or very low; read only.
        at: rows to sample, as ``batch * queries + query``, at least one.
        norms: queries ``(batch, head, query, d)``, keys ``(batch, head, d, key)`` and the scale of their product, if
            it is known what the logits are made from.

    Returns:
        ``(head, len(STATS))``: float64 array on a CPU, float32 tensor on ``s.device`` elsewhere. ``found`` is the
        largest logit of all rows, ``unread`` -inf, ``lse_max`` NaN, ``lse_lower`` -inf; without ``norms``
        ``qk_bound``, ``q_norm`` and ``k_norm`` are NaN.

    Cost: one read of ``s``, and of queries and keys; a copy of the sampled rows; no host sync.
    """
    queries = s.shape[2]
    limit = max(_LOWEST, _MASKED * torch.finfo(s.dtype).min)
    rows = torch.stack([s[number // queries, :, number % queries] for number in at]).float()
    found = s.amax((2, 3)).amax(0).float()
    xp: Any = np if s.device.type == "cpu" else torch
    if norms is None:
        bound = q_norm = k_norm = torch.full_like(found, math.nan)
    else:
        q, k, scale = norms
        q_norm = torch.linalg.vector_norm(q, dim=-1, dtype=torch.float32).amax((0, 2))
        k_norm = torch.linalg.vector_norm(k, dim=-2, dtype=torch.float32).amax((0, 2))
        bound = q_norm * k_norm * abs(scale)
    given: list[Any] = [rows, found, bound, q_norm, k_norm]
    if xp is np:
        given = [_array(t) for t in given]
    rows_, found_, bound_, q_norm_, k_norm_ = given
    with np.errstate(all="ignore"):
        out = (rows_ <= limit) | (rows_ - xp.amax(rows_, axis=2)[:, :, None] <= -_BELOW)
        sums, _ = _row_sums(xp, xp.where(out, -math.inf, rows_))
        far = xp.full_like(found_, math.inf)
        top = xp.where(found_ <= limit, -far, found_)
        columns = (far * math.nan, -far, top, -far, bound_, q_norm_, k_norm_, *sums)
        return xp.stack([c.astype(np.float64) if xp is np else c.float() for c in columns], 1)


class _Look:
    """The rows of logits of one call, asked for by number."""

    def __init__(self, xp: Any, q: Any, k: Any, mask: Any, causal: bool, scale: float, limit: float) -> None:
        self.xp, self.q, self.k, self.mask = xp, q, k, mask
        self.causal, self.scale, self.limit = causal, scale, limit
        self.heads, self.queries, self.keys = q.shape[1], q.shape[2], k.shape[2]
        self.group = self.heads // k.shape[1]

    def rows(self, at: Sequence[int]) -> tuple[Any, Any]:
        """`OF_ROWS`, each ``(head,)``, over rows ``at``; the largest logit."""
        xp, rows = self.xp, []
        for number in at:
            b, i = divmod(number, self.queries)
            q = _wide(self.q[b, :, i]).reshape(-1, self.group, self.q.shape[3])
            s = (q @ _wide(self.k[b]).swapaxes(1, 2)).reshape(self.heads, self.keys) * self.scale
            if self.causal:
                s[:, i + 1 :] = -math.inf
            rows.append(self._masked(s, None if self.mask is None else self.mask[b, :, i]))
        return _row_sums(xp, xp.stack(rows))

    def largest(self, order: Any) -> Any:
        """The largest logit of each head among its rows ``order``, ``(head, row)``."""
        xp, found = self.xp, []
        head = xp.arange(self.heads, device=order.device)
        for number in order.swapaxes(0, 1):
            b, i = number // self.queries, number % self.queries
            k, q = _wide(self.k[b, head // self.group]), _wide(self.q[b, head, i])
            s = (k @ q[:, :, None])[:, :, 0] * self.scale
            if self.causal:
                s = xp.where(xp.arange(self.keys, device=order.device) > i[:, None], -math.inf, s)
            s = self._masked(s, None if self.mask is None else self.mask[b, head, i])
            found.append(xp.amax(s, axis=1))
        return xp.amax(xp.stack(found), axis=0)

    def _masked(self, s: Any, mask: Any) -> Any:
        if mask is None:
            return s
        if mask.dtype in (np.bool_, torch.bool):
            return self.xp.where(mask, s, -math.inf)
        return self.xp.where(mask <= self.limit, -math.inf, s + mask)


def _row_sums(xp: Any, s: Any) -> tuple[list[Any], Any]:
    """`OF_ROWS`, each ``(head,)``, of ``(row, head, key)`` logits with -inf for masked keys; the largest logit."""
    m = xp.amax(s, axis=2)
    empty = m == -math.inf  # a row that sees no key is no row
    d = xp.clip(s - xp.where(empty, 0.0 * empty, m)[:, :, None], _DEEP, None)
    e = xp.exp(d)
    total = e.sum(axis=2)
    entropy = xp.clip(xp.log(total) - (e * d).sum(axis=2) / total, 0, None)
    seen = xp.clip((~(s == -math.inf)).sum(axis=2), 2, None)
    many = (~(s == -math.inf)).sum(axis=2) > 1
    nothing = 0 * total
    parts = (
        ~empty,
        many,
        xp.where(empty, nothing, entropy),
        xp.where(many, entropy / xp.log(seen), nothing),
        xp.where(empty, nothing, e[:, :, 0] * (s[:, :, 0] != -math.inf) / total),
    )
    return [p.sum(axis=0) for p in parts], xp.amax(m, axis=0)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) else x


def _array(t: Tensor) -> np.ndarray:
    return (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t).numpy()
