"""Attention on an accelerator: calls read together give what each gives a CPU alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import monitor
from monitor.record.passes import attention, attention_together
from monitor.record.passes.attention import all_rows, attention_rows, score_rows
from monitor.record.passes.attention_together import Bound, Reader, Rows, read
from monitor.record.sites import attention as site
from tests.record.test_attention import MASKS, Attend, Multi, Two, dense, train
from tests.record.test_written_attention import Written

HOWS = ["plain", "causal", "scaled", *MASKS, "padding of heads"]


def options_of(how: str, g: torch.Generator) -> dict[str, Any]:
    mask = MASKS[how](g) if how in MASKS else None
    if how == "padding of heads":
        mask = MASKS["padding"](g).expand(-1, 4, -1, -1).clone()
        mask[0, 2, :, 0] = False
    return {"causal": how == "causal", "scale": 0.7 if how == "scaled" else None, "mask": mask}


def drawn(g: torch.Generator, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """Random queries or keys as three models leave them in memory."""
    b, h, t, d = shape
    if layout == "heads":
        x = torch.randn(b, h, t, d, generator=g)
    elif layout == "tokens":
        x = torch.randn(b, t, h, d, generator=g).transpose(1, 2)
    else:
        x = torch.randn(b, t, 3, h, d, generator=g)[:, :, 1].transpose(1, 2)
    return x.to(dtype) if dtype != torch.float32 else x


def equal(got: Tensor, want: list[np.ndarray], rtol: float = 2e-5) -> None:
    np.testing.assert_allclose(got.numpy(), np.concatenate(want), rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("known", [False, True], ids=["rows", "lse"])
@pytest.mark.parametrize(
    ("layout", "shared", "dtype"),
    [
        ("heads", 1, torch.float32),
        ("tokens", 2, torch.float32),
        ("split", 1, torch.float64),
        ("split", 4, torch.bfloat16),
    ],
)
def test_several_calls_as_one_at_a_time(how: str, known: bool, layout: str, shared: int, dtype: torch.dtype) -> None:
    """Oracle: invariance. Three calls, one with a NaN and an infinity in two of its heads, and one alone."""
    g = torch.Generator().manual_seed(0)
    options = options_of(how, g)
    reader, calls, want, at = Reader(), [], [], range(1, 18, 5)
    for i in range(3):
        q, k = drawn(g, (2, 4, 9, 8), layout, dtype), drawn(g, (2, 4 // shared, 11, 8), layout, dtype)
        if i == 1:
            q[0, 1, 2, 3], q[1, 2, 5, 0] = math.nan, math.inf
        own: dict[str, Any] = options | {"lse": dense(q, k, **options).logsumexp(-1).float() if known else None}
        want.append(attention_rows(q, k, at, **own))
        calls.append(reader.fused(q, k, at, **own))
    assert len({c.kind for c in calls}) == 1
    equal(read(calls), want)
    equal(read(calls[2:]), want[2:])
    mixed = read([calls[0], calls[2]]).numpy()  # what is not finite stays where it is
    assert np.isfinite(mixed[:, attention.STATS.index("sum_entropy")]).all()


@pytest.mark.parametrize("known", [False, True])
def test_more_sequences_than_rows(known: bool) -> None:
    """Oracle: invariance. Then the keys of those rows alone are looked at; all rows may be read, and none be left."""
    g = torch.Generator().manual_seed(0)
    for shape, at in (((40, 4, 3, 8), range(2, 120, 17)), ((40, 4, 1, 8), range(40)), ((1, 4, 30, 8), range(0, 30, 7))):
        reader, calls, want = Reader(), [], []
        for _ in range(2):
            q, k = drawn(g, shape, "split", torch.float32), drawn(g, (shape[0], 2, 5, 8), "split", torch.float32)
            lse = dense(q, k).logsumexp(-1).float() if known else None
            want.append(attention_rows(q, k, at, lse=lse))
            calls.append(reader.fused(q, k, at, lse=lse))
        equal(read(calls), want)


@pytest.mark.parametrize("how", ["plain", "causal", "scaled", "bool", "padding", "no row"])
@pytest.mark.parametrize("shared", [1, 2])
def test_all_rows_together(how: str, shared: int) -> None:
    """Oracle: invariance. One more call of the kernel for each, the rest at once; no random number is drawn."""
    g = torch.Generator().manual_seed(0)
    options, reader, calls, want = options_of(how, g), Reader(), [], []
    for _ in range(2):
        q, k = (
            drawn(g, (2, 4, 9, 8), "tokens", torch.float32),
            drawn(g, (2, 4 // shared, 11, 8), "heads", torch.float32),
        )
        lse = dense(q, k, **options).logsumexp(-1).float()
        alone = attention_rows(q, k, range(4), **options, lse=lse)
        alone[:, attention.OF_ROWS] = all_rows(q, k, lse, **options)
        want.append(alone)
        calls.append(reader.fused(q, k, range(4), **options, lse=lse, whole=True))
    before = torch.get_rng_state()
    equal(read(calls), want)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("known", [False, True])
def test_autocast_does_not_narrow(known: bool) -> None:
    """Oracle: invariance. Under autocast to 16 bits, the logits of rows stay in 32."""
    q, k = torch.randn(2, 4, 9, 8) * 5, torch.randn(2, 4, 9, 8) * 5
    lse = dense(q, k).logsumexp(-1).float() if known else None
    want = attention_rows(q, k, range(18), lse=lse)
    with torch.autocast("cpu", torch.bfloat16):
        got = read([Reader().fused(q, k, range(18), lse=lse, whole=known)])
    equal(got, [want], rtol=1e-4)


def test_bounds_together() -> None:
    """Oracle: closed form. The largest of each head, NaN where there is one."""
    lse = torch.randn(3, 2, 4, 5)
    lse[1, 1, 2, 3] = math.nan
    np.testing.assert_array_equal(read([Bound(x) for x in lse])[:, 0], lse.amax((1, 3)).flatten())


@pytest.mark.parametrize("scale", [None, -0.3, torch.tensor(0.3), torch.tensor(-0.5, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_by_hand_together(scale: Any, dtype: torch.dtype) -> None:
    """Oracle: invariance. Rows that see nothing or one key, masks of three kinds, NaN and inf in one call."""
    g = torch.Generator().manual_seed(0)
    reader, calls, want = Reader(), [], []
    for i in range(3):
        s = torch.randn(2, 4, 9, 11, generator=g) * 3
        s[0, 1, :, 4:], s[1, :, 3], s[0, 0, 4, 1:], s[0, 2, 4, 2:] = -math.inf, -1e9, -math.inf, -1e4
        if i == 1:
            s[0, 0, 0, 3], s[1, 3, 8, 1] = math.nan, math.inf
        s = s.to(dtype)
        norms = None
        if scale is not None:
            norms = torch.randn(2, 4, 9, 8, generator=g), torch.randn(2, 4, 8, 11, generator=g), scale
        want.append(score_rows(s, range(0, 18, 4), norms=norms))
        calls.append(reader.scores(s, range(0, 18, 4), norms))
    assert len({c.kind for c in calls}) == 1
    equal(read(calls), want)


def test_learned_temperatures_differ() -> None:
    """Oracle: invariance. Scales that are tensors of the device are those of their calls."""
    g = torch.Generator().manual_seed(0)
    s, q, k = torch.randn(2, 4, 9, 11, generator=g), torch.randn(2, 4, 9, 8, generator=g), torch.randn(2, 4, 8, 11)
    calls = [
        attention_together.Scores(c.rows, c.largest, c.limit, c.norms, torch.tensor(x))
        for x in (0.5, -2.0)
        for c in [Reader().scores(s, range(3), (q, k, 1.0))]
    ]
    want = [score_rows(s, range(3), norms=(q, k, x)) for x in (0.5, -2.0)]
    equal(read(calls), want)


def test_in_parts_where_logits_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. With room for the logits of two calls, five are read in three parts."""
    g = torch.Generator().manual_seed(0)
    x = [(torch.randn(2, 4, 9, 8, generator=g), torch.randn(2, 4, 9, 8, generator=g)) for _ in range(5)]
    reader = Reader()
    calls = [reader.fused(q, k, range(6)) for q, k in x]
    whole = read(calls)
    monkeypatch.setattr(attention_together, "MOST", 2 * calls[0].size)
    torch.testing.assert_close(read(calls), whole, equal_nan=True)


def test_a_shared_mask_is_read_once_and_a_changed_one_again() -> None:
    """Oracle: planted fault. The rows of a mask are shared while it is the same tensor, unchanged."""
    q = k = torch.randn(1, 2, 6, 8)
    mask, reader = torch.ones(6, 6, dtype=torch.bool), Reader()
    mask[:, 5] = False
    a, b = (reader.fused(q, k, range(6), mask=mask.detach()) for _ in range(2))
    assert isinstance(a, Rows) and isinstance(b, Rows) and a.mask is b.mask
    mask[:, 4] = False
    changed = reader.fused(q, k, range(6), mask=mask)
    other = reader.fused(q, k, range(6), mask=mask.clone())
    for call, seen in ((a, 5), (changed, 4), (other, 4)):
        assert isinstance(call, Rows) and call.mask is not None
        assert call.mask.sum() == 6 * seen
    equal(read([other]), [attention_rows(q, k, range(6), mask=mask)])


class Launched(TorchDispatchMode):
    """Counts what is not a mere view."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("known", "each", "once"), [(False, 5, 50), (True, 5, 60)])
def test_launches(known: bool, each: int, once: int) -> None:
    """Oracle: definition. So many operations for each call, and so many for all of them, however many there are."""

    def launched(count: int) -> int:
        g = torch.Generator().manual_seed(0)
        x = [
            (drawn(g, (2, 4, 9, 8), "split", torch.float32), drawn(g, (2, 4, 9, 8), "split", torch.float32))
            for _ in range(count)
        ]
        lse = torch.randn(2, 4, 9) if known else None
        with Launched() as mode:
            reader = Reader()
            read([reader.fused(q, k, range(0, 18, 5), causal=True, lse=lse) for q, k in x])
        return mode.found.total()

    few, many = launched(2), launched(12)
    assert many - few == 10 * each
    assert few < 2 * each + once


# ---- in modules


def blocks(kind: str) -> Callable[[], list[nn.Module]]:
    return {
        "causal": lambda: [Attend(is_causal=True) for _ in range(3)],
        "two kinds": lambda: [Attend(), Attend(heads=2, is_causal=True), Attend(), Attend(shared=2, enable_gqa=True)],
        "dropout": lambda: [Attend(is_causal=True, dropout_p=0.3) for _ in range(2)],
        "multi-head": lambda: [Multi(), Multi()],
        "weights": lambda: [Multi(weights=True), Multi()],
        "by hand": lambda: [Written(), Written(), Attend()],
        "called twice": lambda: [block := Attend(), block],
    }[kind]  # fmt: skip


REFS = (
    "attn_logit_max.lse_max", "attn_logit_max.found", "attn_logit_max.certified", "attn_entropy.entropy",
    "attn_entropy.normalised", "attn_entropy.rows", "attn_sink_mass.mass", "qk_norm_bound.bound",
    "qk_norm_bound.k_norm",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "micro"),
    [("causal", 1), ("two kinds", 2), ("dropout", 2), ("multi-head", 2), ("weights", 1), ("by hand", 2),
     ("called twice", 1)],
)  # fmt: skip
def test_trained_as_on_an_accelerator(kind: str, micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. The same modules and numbers as a CPU's, in forwards of one or two micro-batches."""
    runs = []
    for there in (False, True):
        torch.manual_seed(0)
        model = Two(blocks(kind)())
        if there:
            monkeypatch.setattr(site, "_alone", lambda t: False)
        runs.append(train(model, tmp_path / str(there), steps=16, micro=micro))
    here, there = runs
    for ref in REFS:
        assert there.modules(ref) == here.modules(ref), ref
        for where in here.modules(ref):
            (steps, want), (same, got) = (run.series(ref, where) for run in runs)
            assert steps.tolist() == same.tolist()
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6, err_msg=f"{ref} {where}")


def test_kernels_that_save_it_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. A log-sum-exp with one more dimension, as cuDNN's, or with padded rows is the same."""
    original, runs = site._log_sum_exp, []
    for name in ("plain", "more", "padded"):

        def saved(node: Any, name: str = name) -> Tensor | None:
            lse = original(node)
            if lse is None or name == "plain":
                return lse
            return lse[..., None] if name == "more" else nn.functional.pad(lse, (0, 26), value=math.inf)

        torch.manual_seed(0)
        monkeypatch.setattr(site, "_log_sum_exp", saved)
        runs.append(train(Two([Attend(is_causal=True)]), tmp_path / name, steps=3))
    for ref in REFS:
        for where in runs[0].modules(ref):
            values = [run.series(ref, where)[1] for run in runs]
            np.testing.assert_array_equal(values[1], values[0])
            np.testing.assert_array_equal(values[2], values[0])
    assert len(runs[1].modules("attn_logit_max.lse_max")) == 4


class Sometimes(nn.Module):
    """A block that attends in every other forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = Attend(is_causal=True), 0

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, 16)`` to the same."""
        self.calls += 1
        return self.inner(x) if self.calls % 2 else x


def test_micro_batches_that_call_other_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. What was read together with others in one micro-batch joins what was not in the next."""
    runs: list[monitor.Run] = []
    for there in (False, True):
        torch.manual_seed(0)
        if there:
            monkeypatch.setattr(site, "_alone", lambda t: False)
        runs.append(train(Two([Attend(), Sometimes(), Attend()]), tmp_path / str(there), steps=4, micro=3))
    for ref in REFS:
        for where in runs[0].modules(ref):
            (_, want), (_, got) = (run.series(ref, where) for run in runs)
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6, err_msg=f"{ref} {where}")
    assert set(runs[1].series("attn_entropy.rows", "blocks.1.inner[0]")[1]) == {12, 24}


def test_nothing_of_a_forward_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. After a forward that nobody trains on, queries and keys are kept no longer."""
    monkeypatch.setattr(site, "_alone", lambda t: False)
    model = Two([Attend(), Attend()])
    kept: list[Any] = []
    original = site.AttentionSite._settle

    def settle(self: site.AttentionSite) -> None:
        kept.append([c.values for c in self._pending])
        original(self)
        assert not any(isinstance(c.values, attention_together.Kept) for c in self._pending)

    monkeypatch.setattr(site.AttentionSite, "_settle", settle)
    with monitor.attach(model, tmp_path / "run"):
        model(torch.randn(2, 6, 16))
    assert len(kept) == 1 and len(kept[0]) == 2
    assert all(isinstance(x, attention_together.Fused) for x in kept[0])
