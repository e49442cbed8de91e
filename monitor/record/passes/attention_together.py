"""The statistics of `monitor.record.passes.attention` on an accelerator, of many calls at once.

There it is launching an operation that costs, hardly what it computes. So no more is asked for of each call than what
needs its queries and keys (their norms and some rows of logits), and all that follows is asked for once for the calls
that are alike. Of a call whose log-sum-exp is known even that waits until they are read, since autograd keeps its
queries and keys as well; of any other nothing of their size is kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from monitor.record.passes.attention import BELOW, TOP, lowest, unseen_below
from monitor.record.passes.dtype import sum_dtype

#: Most logits of several calls that are in memory at once: 32 MiB. One call has what its rows need.
MOST = 1 << 23


class Kept(ABC):
    """What is kept of one call until it is read."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Logits that it has in memory while it is read."""

    @property
    def held(self) -> int:
        """Logits that it has in memory until then."""
        return self.size

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """Calls of one kind can be read together."""

    @classmethod
    @abstractmethod
    def read(cls, calls: Sequence[Any]) -> Tensor:
        """The statistics ``(call, head, statistic)`` of calls of one kind."""


def read(calls: Sequence[Kept]) -> Tensor:
    """The statistics of several calls of one kind.

    Returns:
        ``(call and head, statistic)`` float32 on their device: all of `STATS`, or the first alone of a `Bound`.

    Cost: a number of launches that does not grow with the calls, and those of the rows of each `Fused` call; `MOST`
    logits at a time; no host sync.
    """
    together = max(1, MOST // max(1, calls[0].size))
    parts = [type(calls[0]).read(calls[i : i + together]) for i in range(0, len(calls), together)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(0, 1)


@dataclass(frozen=True)
class Bound(Kept):
    """The log-sum-exp ``(batch, head, query)`` of every row."""

    lse: Tensor

    @property
    def size(self) -> int:
        """None."""
        return 0

    @property
    def kind(self) -> Hashable:
        """Shape and device."""
        return self.lse.device, self.lse.shape

    @classmethod
    def read(cls, calls: Sequence[Bound]) -> Tensor:
        """The largest of each head."""
        return _stack([c.lse for c in calls]).amax((1, 3))[..., None].float()


@dataclass(frozen=True)
class _At:
    """Some rows, as indices by batch element, head and query that broadcast to ``(head, row)``."""

    batch: Tensor
    head: Tensor
    query: Tensor


@dataclass(frozen=True)
class _How:
    """How the logits of a call are made from queries and keys, and which rows are sampled."""

    shape: tuple[int, int, int, int]  # batch elements, heads, queries, keys
    at: range
    scale: float
    causal: bool
    masked: bool | None  # True if the mask is one, False if it is added, None without one
    limit: float  # of an added mask, at and below which the key is not seen


@dataclass(frozen=True)
class Rows(Kept):
    """Sampled rows of a call without a log-sum-exp.

    Attributes:
        device: where they are.
        how: what the call asks for.
        where: the rows.
        logits: ``(head, row, key)`` float32, neither scaled nor masked.
        mask: of them, ``(head or 1, row, key)``.
        norms: of queries ``(batch, head, query)`` and of keys ``(batch, key head, key)``.
    """

    device: torch.device
    how: _How
    where: _At
    logits: Tensor
    mask: Tensor | None
    norms: tuple[Tensor, Tensor]

    @property
    def size(self) -> int:
        """Of the rows."""
        return self.logits.numel()

    @property
    def kind(self) -> Hashable:
        """What they must have in common to be stacked."""
        return self.device, self.how, self.norms[1].shape, None if self.mask is None else self.mask.shape

    @classmethod
    def read(cls, calls: Sequence[Rows]) -> Tensor:
        """All but the bound, which is NaN."""
        how, first = calls[0].how, calls[0]
        with torch.autocast(first.device.type, enabled=False):
            s = _seen(how, [c.logits for c in calls], [c.mask for c in calls], first.where.query)
            found, norms = s.amax((2, 3)), _norms([c.norms for c in calls])
            far = torch.full_like(found, math.inf)
            unread = -far if len(how.at) == how.shape[0] * how.shape[2] else far
            product = norms[0] * norms[1] * abs(how.scale)
            return _joined((far * math.nan, -far, found, unread, product, *norms), _row_sums(s))


@dataclass(frozen=True)
class Fused(Kept):
    """A call whose log-sum-exp ``(batch, head, query)`` is known, with its queries, keys and mask.

    Attributes:
        whole: the statistics of rows are asked for of all of them.
    """

    how: _How
    q: Tensor
    k: Tensor
    mask: Tensor | None
    lse: Tensor
    whole: bool

    @property
    def size(self) -> int:
        """Of the rows that will be read."""
        return self.how.shape[1] * (len(self.how.at) + TOP) * self.how.shape[3]

    @property
    def held(self) -> int:
        """None."""
        return 0

    @property
    def kind(self) -> Hashable:
        """What they must have in common to be stacked."""
        return self.q.device, self.how, self.k.shape, None if self.mask is None else self.mask.shape, self.whole

    @classmethod
    def read(cls, calls: Sequence[Fused]) -> Tensor:
        """All statistics."""
        how, device = calls[0].how, calls[0].q.device
        batch, heads, queries, keys = how.shape
        n = len(how.at)
        with torch.autocast(device.type, enabled=False):
            lse = _stack([c.lse for c in calls])
            most = lse.transpose(1, 2).flatten(2).topk(min(TOP + 1, batch * queries), dim=2)
            sampled = torch.arange(how.at.start, how.at.stop, how.at.step, device=device).expand(
                *lse.shape[:1], heads, -1
            )
            rows = torch.cat((sampled, most.indices[..., :TOP]), 2)
            head = torch.arange(heads, device=device)[:, None]
            in_batch, query = rows // queries, rows % queries
            found: list[tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]] = []
            for i, c in enumerate(calls):
                at = _At(in_batch[i], head, query[i])
                found.append((_logits(c.q, c.k, at), _rows_of_mask(c.mask, how, at), _norms_of(c.q, c.k)))
            s = _seen(how, [f[0] for f in found], [f[1] for f in found], query)
            largest, norms = s.amax((2, 3)), _norms([f[2] for f in found])
            far = torch.full_like(largest, math.inf)
            unread = -far if n == batch * queries or most.values.shape[2] <= TOP else most.values[..., TOP]
            counts = torch.arange(1, queries + 1, device=device, dtype=torch.float32).clamp(max=keys)
            seen = counts.log() if how.causal else math.log(keys)
            lower = (lse - seen).amax((1, 3))
            maxima = (most.values[..., 0], lower, largest, unread, norms[0] * norms[1] * abs(how.scale), *norms)
            return _joined(maxima, _whole(how, calls, lse) if calls[0].whole else _row_sums(s[:, :, :n]))


@dataclass(frozen=True)
class Scores(Kept):
    """A call by hand: sampled rows of logits, and what is reduced of all of them.

    Attributes:
        rows: ``(head, row, key)`` float32.
        largest: ``(batch, head)`` logit.
        limit: at and below which a logit is one of a key that is not seen.
        norms: as those of `Rows`; None if they are not known.
        scale: of the product that they are factors of: a number, or a tensor.
    """

    rows: Tensor
    largest: Tensor
    limit: float
    norms: tuple[Tensor, Tensor] | None
    scale: Any

    @property
    def size(self) -> int:
        """Of the rows."""
        return self.rows.numel()

    @property
    def kind(self) -> Hashable:
        """What they must have in common to be stacked."""
        shapes = None if self.norms is None else tuple(x.shape for x in self.norms)
        scale = None if isinstance(self.scale, Tensor) else self.scale
        return self.rows.device, self.rows.shape, self.largest.shape, self.limit, shapes, scale

    @classmethod
    def read(cls, calls: Sequence[Scores]) -> Tensor:
        """All but the bound; without norms those are NaN."""
        first = calls[0]
        with torch.autocast(first.rows.device.type, enabled=False):
            s, found = _stack([c.rows for c in calls]), _stack([c.largest for c in calls]).amax(1).float()
            out = (s <= first.limit) | (s - s.amax(3, keepdim=True) <= -BELOW)
            top = found.masked_fill(found <= first.limit, -math.inf)
            far = torch.full_like(found, math.inf)
            product = q_norm = k_norm = far * math.nan
            if first.norms is not None:
                q_norm, k_norm = _norms([c.norms for c in calls if c.norms is not None])
                scale: Any = first.scale
                if isinstance(scale, Tensor):
                    scale = _stack([c.scale for c in calls])[:, None].float()
                product = q_norm * k_norm * abs(scale)
            maxima = (far * math.nan, -far, top, -far, product, q_norm, k_norm)
            return _joined(maxima, _row_sums(s.masked_fill(out, -math.inf)))


@dataclass
class Reader:
    """Begins to read the calls of one forward; what they have in common is made once."""

    _at: dict[Hashable, _At] = field(default_factory=dict)
    _mask: tuple[Tensor, int, Hashable, Tensor] | None = None

    def fused(
        self,
        q: Tensor,
        k: Tensor,
        at: range,
        *,
        scale: float | None = None,
        causal: bool = False,
        mask: Tensor | None = None,
        lse: Tensor | None = None,
        whole: bool = False,
    ) -> Rows | Fused:
        """A call of fused attention.

        Args:
            q: as in `attention_rows`.
            k: the same.
            at: the same, evenly spaced.
            scale: the same.
            causal: the same.
            mask: the same.
            lse: the same.
            whole: ask for the statistics of all rows (`all_rows`); with ``lse`` only.

        Returns:
            What to `read` within the same forward, and before anything of it is changed in place.

        Cost: nothing with ``lse``; else one read of q, two of k, or of a copy of it in 32 bits.
        """
        (batch, heads, queries, d), keys = q.shape, k.shape[2]
        masked = None if mask is None else mask.dtype == torch.bool
        limit = -math.inf if mask is None else unseen_below(mask)
        scale = 1 / math.sqrt(d) if scale is None else scale
        how = _How((batch, heads, queries, keys), at, scale, causal, masked, limit)
        if lse is not None:
            return Fused(how, q, k, mask, lse, whole)
        with torch.autocast(q.device.type, enabled=False):
            where = self._rows(how, q.device)
            return Rows(q.device, how, where, _logits(q, k, where), self._of_mask(mask, how, where), _norms_of(q, k))

    def scores(self, s: Tensor, at: range, norms: tuple[Tensor, Tensor, Any] | None = None) -> Scores:
        """A call of attention by hand; arguments as those of `score_rows`.

        Cost: one read of ``s``, queries and keys; a copy of the sampled rows.
        """
        scale: Any = None if norms is None else norms[2]
        if isinstance(scale, Tensor) and scale.is_cpu:
            scale = float(scale)
        batch, heads, queries, keys = s.shape
        with torch.autocast(s.device.type, enabled=False):
            where = self._rows(_How((batch, heads, queries, keys), at, 1.0, False, None, -math.inf), s.device)
            rows = s[where.batch, where.head, where.query].float()
            lengths = None if norms is None else (_norm(norms[0], -1), _norm(norms[1], -2))
            return Scores(rows, s.amax((2, 3)), lowest(s.dtype), lengths, scale)

    def _rows(self, how: _How, device: torch.device) -> _At:
        key = device, how.shape, how.at
        if key not in self._at:
            _, heads, queries, _ = how.shape
            rows = torch.arange(how.at.start, how.at.stop, how.at.step, device=device)[None]
            self._at[key] = _At(rows // queries, torch.arange(heads, device=device)[:, None], rows % queries)
        return self._at[key]

    def _of_mask(self, mask: Tensor | None, how: _How, at: _At) -> Tensor | None:
        """Layers that share a mask are given the same tensor, mostly."""
        if mask is None:
            return None
        known, key = self._mask, (how.shape, how.at, mask.shape, mask.stride())
        if known is None or known[0].data_ptr() != mask.data_ptr() or known[1:3] != (mask._version, key):
            rows = _rows_of_mask(mask, how, at)
            assert rows is not None
            # the mask itself is held, so that nothing else can be where it is
            known = self._mask = mask, mask._version, key, rows
        return known[3]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _norm(x: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(x, dim=dim, dtype=sum_dtype(x))


def _norms_of(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return _norm(q, -1), _norm(k, -1)


def _norms(norms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The largest norm of a query and of a key, each ``(call, head)``."""
    q, k = (_stack([pair[i] for pair in norms]).amax((1, 3)).float() for i in (0, 1))
    return q, k[..., None].expand(*k.shape, q.shape[1] // k.shape[1]).flatten(1)


def _logits(q: Tensor, k: Tensor, at: _At) -> Tensor:
    """Rows of logits ``(head, row, key)``, neither scaled nor masked, float32."""
    (batch, heads, _, d), (_, key_heads, keys, _) = q.shape, k.shape
    group, count = heads // key_heads, at.query.shape[-1]
    if batch > count * group:  # keys of the rows alone are fewer than all
        of_rows = k[at.batch, at.head // group].float()
        return (of_rows @ q[at.batch, at.head, at.query].float()[..., None])[..., 0]
    # each row meets the keys of all batch elements, of which those of its own are taken
    k, own = k.float(), at.batch.expand(heads, count)
    if k.stride(0) == keys * k.stride(2):  # as projections leave them: batch and key are one dimension
        rows = q[at.batch, at.head, at.query].float().reshape(key_heads, group * count, d)
        s = torch.bmm(rows, k.transpose(0, 1).flatten(1, 2).transpose(1, 2)).view(heads, count, batch, keys)
        return s[:, :, 0] if batch == 1 else s.gather(2, own[..., None, None].expand(-1, -1, 1, keys))[:, :, 0]
    rows = q[own.expand(batch, -1, -1), at.head, at.query].float().reshape(batch, key_heads, group * count, d)
    s = torch.matmul(rows, k.transpose(2, 3)).view(batch, heads, count, keys)
    return s[0] if batch == 1 else s.gather(0, own[None, ..., None].expand(-1, -1, -1, keys))[0]


def _rows_of_mask(mask: Tensor | None, how: _How, at: _At) -> Tensor | None:
    """The mask of rows, ``(head or 1, row, key)``."""
    if mask is None:
        return None
    batch, heads, queries, keys = how.shape
    if mask.dim() > 2 and mask.shape[-3] > 1:
        return mask.expand(batch, heads, queries, keys)[at.batch, at.head, at.query]
    return mask.expand(batch, 1, queries, keys)[at.batch, 0, at.query]


def _seen(how: _How, logits: Sequence[Tensor], masks: Sequence[Tensor | None], query: Tensor) -> Tensor:
    """The logits ``(call, head, row, key)`` as the softmax has them, with -inf for keys that are not seen."""
    s = _stack(logits) * how.scale
    if how.causal:
        s.masked_fill_(torch.arange(how.shape[3], device=s.device) > query[..., None], -math.inf)
    given = [m for m in masks if m is not None]
    if given:
        mask = given[0][None] if all(m is given[0] for m in given) else _stack(given)
        if how.masked:
            s.masked_fill_(~mask, -math.inf)
        else:
            s.add_(mask).masked_fill_(mask <= how.limit, -math.inf)
    return s


def _row_sums(s: Tensor) -> Tensor:
    """`OF_ROWS` ``(statistic, call, head)`` of logits ``(call, head, row, key)``, -inf for keys not seen."""
    p, seen = s.softmax(3), (s != -math.inf).sum(3)
    entropy = torch.xlogy(p, p).sum(3).neg_().clamp_min_(0)
    return _sums(seen, entropy, p[..., 0], (2,))


def _sums(seen: Tensor, entropy: Tensor, sink: Tensor, over: tuple[int, ...]) -> Tensor:
    """`OF_ROWS` of rows, each given alike, summed over dimensions ``over``; a row that sees no key is no row."""
    no, single = seen < 1, seen < 2
    parts = torch.stack((entropy, entropy / seen.clamp(min=2).float().log(), sink))
    parts.masked_fill_(torch.stack((no, single, no)), 0.0)
    return torch.cat((~torch.stack((no, single)), parts)).sum([d + 1 for d in over])


def _whole(how: _How, calls: Sequence[Fused], lse: Tensor) -> Tensor:
    """`OF_ROWS` ``(statistic, call, head)`` over every row: what `all_rows` is of one call."""
    _, heads, queries, keys = how.shape
    mean, first, seen, sees_first = [], [], [], []
    for c in calls:
        group = heads // c.k.shape[1]
        shared = {"enable_gqa": True} if group > 1 else {}
        of_keys = F.scaled_dot_product_attention(
            c.q, c.k, c.k, attn_mask=c.mask, is_causal=how.causal, scale=how.scale, **shared
        )
        mean.append((c.q * of_keys).sum(-1))
        one = c.k[:, :, :1]
        first.append((c.q * (one.repeat_interleave(group, 1) if group > 1 else one)).sum(-1))
        if c.mask is not None:
            seen.append(c.mask.sum(-1).expand(lse.shape[1:]))
            sees_first.append(c.mask[..., 0].expand(lse.shape[1:]))
    entropy = (lse - how.scale * _stack(mean)).clamp_min_(0)
    sink = (how.scale * _stack(first) - lse).exp_()
    if seen:
        counts = _stack(seen)
        sink.masked_fill_(~_stack(sees_first), 0.0)
    elif how.causal:
        counts = torch.arange(1, queries + 1, device=lse.device).clamp(max=keys).expand(lse.shape)
    else:
        counts = torch.full_like(lse, keys)
    return _sums(counts, entropy, sink, (1, 3)).float()


def _joined(maxima: Sequence[Tensor], sums: Tensor) -> Tensor:
    """``(call, head, statistic)`` of statistics that are ``(call, head)`` each."""
    return torch.cat((torch.stack([m.float() for m in maxima]), sums)).movedim(0, 2)
