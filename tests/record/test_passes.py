"""The fused reductions against closed forms and dense float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from monitor.block import ABSENT, ABSENT_BITS
from monitor.record.passes import distance, logit_rows, loss_rows, side_by_side
from monitor.record.passes.gradient import THETA, TURNS, GradientReader, History
from monitor.record.passes.gradient_device import SpikeReader, gradient_norms
from monitor.record.passes.input import fingerprints, input_stats
from monitor.record.passes.input import sizes as input_sizes
from monitor.record.passes.parameter import ParameterReader, on_device
from monitor.record.passes.side_by_side import SideBySide, norms


def stats(z: Tensor, y: Tensor | None = None, dtype: torch.dtype = torch.float32, valid: Tensor | None = None) -> dict:
    values = logit_rows.logit_rows(z, y, dtype, valid)
    return dict(zip(logit_rows.STATS, values.tolist(), strict=True))


def reference(z: Tensor, y: Tensor, u: float) -> dict[str, float]:
    """A naive float64 transcription of the definitions, one row after another."""
    out: dict[str, float] = dict.fromkeys(
        ("sum_norm", "sum_cnorm", "sum_rowstd", "sum_margin", "sum_true_margin", "sum_lse", "sumsq_lse", "sum_entropy",
         "sum_top1", "sum_rate", "sum_zscore", "collapsed", "collapsed_any", "sumsq", "sum_z"), 0.0
    )  # fmt: skip
    heads = []
    for row, target in zip(z.double(), y.tolist(), strict=True):
        order = row.sort(descending=True).values
        p = row.softmax(0)
        rest = torch.cat((row[: row.argmax()], row[row.argmax() + 1 :]))
        residual = (rest - row.max()).exp().sum().item()
        others = torch.cat((row[:target], row[target + 1 :]))
        lse = row.logsumexp(0).item()
        out["sum_norm"] += row.norm().item()
        out["sum_cnorm"] += (row - row.mean()).norm().item()
        out["sum_rowstd"] += row.std(unbiased=False).item()
        out["sumsq"] += row.square().sum().item()
        out["sum_z"] += row.sum().item()
        out["sum_margin"] += (order[0] - order[1]).item()
        out["sum_true_margin"] += (row[target] - others.max()).item()
        out["sum_lse"] += lse
        out["sumsq_lse"] += lse**2
        out["sum_entropy"] += -(p * p.clamp_min(1e-300).log()).sum().item()
        out["sum_top1"] += p.max().item()
        out["sum_rate"] += (row[target] - (p * row).sum()).item()
        out["sum_zscore"] += ((row[target] - row.mean()) / row.std(unbiased=False)).item()
        out["collapsed"] += residual <= u and int(row.argmax()) == target
        out["collapsed_any"] += residual <= u
        heads.append(math.log(residual) - math.log(u) if residual else -math.inf)
    out["headroom_q50"] = sorted(heads)[math.ceil(0.5 * len(heads)) - 1]
    out["headroom_q05"] = sorted(heads)[math.ceil(0.05 * len(heads)) - 1]
    return out


@pytest.mark.parametrize(("rows", "classes"), [(7, 3), (64, 10), (33, 513), (300, 2000)])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_logit_rows_against_float64(rows: int, classes: int, scale: float) -> None:
    """Oracle: naive transcription. float32 sums of up to 2,000 terms: 1e-5 relative, 1e-4 absolute near zero."""
    g = torch.Generator().manual_seed(rows)
    z, y = torch.randn(rows, classes, generator=g) * scale, torch.randint(0, classes, (rows,), generator=g)
    got, want = stats(z, y), reference(z, y, 2.0**-24)
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-5, abs=2e-4 * rows), name
    assert got["max_norm"] == pytest.approx(z.double().norm(dim=1).max().item(), rel=1e-6)
    assert (got["max_z"], got["min_z"]) == (z.max().item(), z.min().item())
    assert (got["n"], got["classes"]) == (rows, classes)


def test_logit_norm_of_three_four() -> None:
    """Oracle: closed form. The norm of (3, 4) is 5; of (3, 4) minus its mean, sqrt(1/2)."""
    s = stats(torch.tensor([[3.0, 4.0]]))
    assert s["sum_norm"] == 5
    assert s["sum_cnorm"] == pytest.approx(math.sqrt(0.5), rel=1e-6)
    assert math.isnan(s["sum_true_margin"])


def test_scale_family() -> None:
    """Oracle: closed form. z = (3, 0, 0, 0): row std 1.299038, margin 3, rms 1.5; (ln 3, 0): entropy 0.562335."""
    s = stats(torch.tensor([[3.0, 0, 0, 0]]), torch.tensor([0]))
    assert s["sum_rowstd"] == pytest.approx(1.2990381, rel=1e-6)
    assert s["sum_margin"] == s["sum_true_margin"] == 3
    assert math.sqrt(s["sumsq"] / 4) == pytest.approx(1.5)
    assert stats(torch.tensor([[math.log(3), 0.0]]))["sum_entropy"] == pytest.approx(0.562335, abs=1e-6)
    assert stats(torch.zeros(1, 50257))["sum_lse"] == pytest.approx(10.824905, rel=1e-6)
    assert stats(torch.tensor([[3.0, 0, 0, 0]]), torch.tensor([0]))["sum_zscore"] == pytest.approx(3**0.5, rel=1e-6)
    assert stats(torch.full((1, 5), 7.0), torch.tensor([2]))["sum_zscore"] == 0


def test_rate_of_two_zero() -> None:
    """Oracle: closed form. z = (2, 0), class 0: p = (0.880797, 0.119203), rate 2 - 1.761594."""
    assert stats(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))["sum_rate"] == pytest.approx(0.23840584, rel=1e-6)


def test_rate_is_what_every_layer_would_gain_by_growing() -> None:
    """Oracle: independent computation. Euler: -<g, W> of each layer of a bias-free ReLU network is the rate."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 15, bias=False), nn.ReLU(), nn.Linear(15, 7, bias=False)
    ).double()
    x, y = torch.randn(64, 10, dtype=torch.float64), torch.randint(0, 7, (64,))
    z = net(x)
    F.cross_entropy(z, y).backward()
    rate = stats(z.detach(), y)["sum_rate"] / 64
    for w in net.parameters():
        assert w.grad is not None
        assert -(w.grad * w).sum().item() == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "two", "many"),
    [(torch.float64, 36.75, 41.4553), (torch.float32, 16.65, 21.3540), (torch.float16, 7.65, 12.3431),
     (torch.bfloat16, 5.55, 10.2637)],
)  # fmt: skip
def test_collapse_begins_where_the_format_absorbs(dtype: torch.dtype, two: float, many: float) -> None:
    """Oracle: closed form. Two classes (d, 0) collapse iff d >= p ln 2; 113 equal rivals iff d >= ln 112 + p ln 2."""

    def collapsed(d: float, classes: int) -> float:
        z = torch.zeros(1, classes, dtype=torch.float64)
        z[0, 0] = d
        return stats(z, torch.tensor([0]), dtype)["collapsed"]

    grid = [round(0.05 * i, 2) for i in range(900)]
    assert next(d for d in grid if collapsed(d, 2)) == pytest.approx(two)
    assert collapsed(many - 1e-3, 113) == 0
    assert collapsed(many + 1e-3, 113) == 1
    assert stats(torch.tensor([[50.0, 0.0]]), torch.tensor([1]))["collapsed"] == 0
    assert stats(torch.tensor([[50.0, 0.0]]), torch.tensor([1]))["collapsed_any"] == 1


def test_headroom_in_each_dtype() -> None:
    """Oracle: closed form. z = (10, 0): R = 4.53999e-5, headroom 6.6355 (fp32), -2.3754 (fp16), -4.4548 (bf16)."""
    z = torch.tensor([[10.0, 0.0]])
    for dtype, want in ((torch.float32, 6.6355), (torch.float16, -2.3754), (torch.bfloat16, -4.4548)):
        assert stats(z, dtype=dtype)["headroom_q50"] == pytest.approx(want, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 30), st.integers(0, 2**31), st.floats(-1e3, 1e3))
def test_logit_rows_invariances(rows: int, classes: int, seed: int, shift: float) -> None:
    """Oracle: invariance. A shift of a row changes no probability; ignored rows, order of rows neither."""
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(rows, classes, generator=g, dtype=torch.float64), torch.randint(0, classes, (rows,), generator=g)
    base = stats(z, y)
    shifted = stats(z + shift, y)
    for name in (
        "sum_entropy", "sum_margin", "sum_true_margin", "sum_top1", "sum_rate", "sum_zscore", "headroom_q50",
        "sum_cnorm", "collapsed",
    ):  # fmt: skip
        assert shifted[name] == pytest.approx(base[name], rel=1e-6, abs=1e-6), name
    assert stats(8 * z, y)["sum_zscore"] == pytest.approx(base["sum_zscore"], rel=1e-9)
    noise = torch.cat((z, 100 * torch.randn(3, classes, generator=g, dtype=torch.float64)))
    kept = torch.arange(rows + 3) < rows
    masked = stats(noise, torch.cat((y, torch.tensor([-100] * 3))), valid=kept)
    assert masked == pytest.approx(base, rel=1e-6)
    assert stats(z.flip(0), y.flip(0)) == pytest.approx(base, rel=1e-6)


def test_tiles_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. Cutting the rows into tiles gives the same statistics."""
    z, y = torch.randn(50, 40), torch.randint(0, 40, (50,))
    whole = stats(z, y)
    monkeypatch.setattr(logit_rows, "TILE", 120)
    assert stats(z, y) == pytest.approx(whole, rel=1e-6)


def test_infinite_and_nan_logits() -> None:
    """Oracle: definition. A class masked with -inf is one that is not there; a NaN logit makes NaN, never 0."""
    z = torch.randn(4, 6)
    masked = torch.cat((z, torch.full((4, 2), -math.inf)), 1)
    a, b = stats(z), stats(masked)
    for name in ("sum_entropy", "sum_lse", "sum_top1", "headroom_q50", "sum_margin"):
        assert b[name] == pytest.approx(a[name], rel=1e-6), name
    assert math.isinf(b["sum_norm"])
    z[0, 0] = math.nan
    assert math.isnan(stats(z)["sum_entropy"])
    assert math.isnan(stats(z)["max_z"])


def test_loss_rows_reads_what_the_kernel_did() -> None:
    """Oracle: independent library. Zeros and right answers as torch's own unreduced loss and argmax give them."""
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(500, 59, generator=g) * 12, torch.randint(0, 59, (500,), generator=g)
    z[torch.arange(200), y[:200]] += 40
    y[::7] = -100
    n, zero, correct, top1, looked = loss_rows.loss_rows(z.log_softmax(1), y, -100, z)
    kept = y != -100
    assert n == looked == kept.sum()
    assert zero == ((F.cross_entropy(z, y, reduction="none") == 0) & kept).sum()
    assert correct == ((z.argmax(1) == y) & kept).sum()
    assert top1 == pytest.approx(z.softmax(1).amax(1)[kept].sum().item(), rel=1e-5)


def test_loss_rows_of_many_logits_are_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: independent computation. All rows are asked for their loss, every fifth for its first choice."""
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(64, 50, generator=g), torch.randint(0, 50, (64,), generator=g)
    z[:9, :] -= 200 * (1 - F.one_hot(y[:9], 50))
    monkeypatch.setattr(loss_rows, "ALL", 700)
    monkeypatch.setattr(loss_rows, "TILE", 200)
    n, zero, correct, top1, looked = loss_rows.loss_rows(z.log_softmax(1), y, -100, z)
    assert (n, zero, looked) == (64, 9, 13)
    assert correct == (z.argmax(1) == y)[::5].sum()
    assert top1 == pytest.approx(z.softmax(1).amax(1)[::5].sum().item(), rel=1e-5)


TIES = {
    "zero head": torch.zeros(60, 7),
    "few levels": torch.randint(0, 3, (60, 40), generator=torch.Generator().manual_seed(0)).float(),
    "float16": (torch.randn(60, 5, generator=torch.Generator().manual_seed(1)) * 2e-4 + 1).half(),
    "bfloat16": (torch.randn(60, 300, generator=torch.Generator().manual_seed(2))).bfloat16(),
    "masked": torch.full((60, 9), -math.inf).index_fill(1, torch.tensor([3, 5]), 0.0),
    "image": torch.randint(0, 3, (4, 6, 5, 3), generator=torch.Generator().manual_seed(3)).float(),
    "NaN": torch.tensor([[math.nan, 0.0, 0.0]] * 30 + [[0.0, 1.0, 1.0]] * 30),
}


@pytest.mark.parametrize("dims", [0, 1], ids=["rows", "image"])
@pytest.mark.parametrize("z", TIES.values(), ids=TIES)
def test_of_equal_logits_the_first_is_the_choice(z: Tensor, dims: int) -> None:
    """Oracle: independent library. Right answers are those of torch's argmax, which is what a script prints."""
    z = z[(..., *[None] * dims)]
    y = torch.randint(0, z.shape[1], (len(z), *z.shape[2:]), generator=torch.Generator().manual_seed(4))
    valid = torch.rand(y.shape, generator=torch.Generator().manual_seed(5)) < 0.8
    y = torch.where(valid, torch.where(y % 2 == 0, z.argmax(1), y), -100)
    right = ((z.argmax(1) == y) & ~z.isnan().any(1)).sum()
    assert 0 < right < valid.sum()
    assert loss_rows.right(z, y, valid) == right
    assert loss_rows.loss_rows(z.log_softmax(1), y, -100, z)[2] == right


def test_where_only_some_rows_are_looked_at_the_choice_is_still_near() -> None:
    """Oracle: independent library. Of 16,384 rows with ties 256 say how often the first is meant."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (64, 256), generator=g)
    every = torch.ones_like(y, dtype=torch.bool)
    z = torch.randn(64, 5, 256, generator=g)
    assert loss_rows.right(z, y, every) == (z.argmax(1) == y).sum()
    z = torch.randint(0, 2, (64, 5, 256), generator=g).float()
    hits = (z.amax(1) == z.gather(1, y.unsqueeze(1)).squeeze(1)).sum()
    share = ((z.argmax(1) == y).sum() / hits).item()
    got = loss_rows.right(z, y, every) / hits
    assert abs(got - share) < 4 * math.sqrt(share * (1 - share) / loss_rows.TIED)


LOGITS = {
    "rows": (torch.float32, 3.0),
    "small": (torch.float32, 0.01),
    "collapsed": (torch.float32, 60.0),
    "float64": (torch.float64, 10.0),
    "float16": (torch.float16, 3.0),
    "bfloat16": (torch.bfloat16, 30.0),
}


@pytest.mark.parametrize("tile", [1 << 24, 60])
@pytest.mark.parametrize("ignored", [0, 23, 40], ids=["all count", "some count", "none counts"])
@pytest.mark.parametrize(("dtype", "scale"), LOGITS.values(), ids=LOGITS)
def test_logits_on_an_accelerator(
    dtype: torch.dtype, scale: float, ignored: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: independent computation. Batched torch, run on a CPU, against numpy; equal logits, masked classes, NaN.

    The rows with NaN and infinity once count and once do not.
    """
    monkeypatch.setattr(logit_rows, "TILE_DEVICE", tile)
    g = torch.Generator().manual_seed(0)
    z, y = (torch.randn(40, 17, generator=g) * scale).to(dtype), torch.randint(0, 17, (40,), generator=g)
    z[30:38].scatter_(1, y[30:38, None], 100.0)
    z[1] = 3
    z[2, 4] = z[2].max()
    for broken in ("nothing", "masked", "NaN", "inf"):
        if broken == "masked":
            z[39, y[39] :] = -math.inf
            z[39, y[39]] = z[38, y[38]] = 1
        elif broken == "NaN":
            z[0, 7] = math.nan
        elif broken == "inf":
            z[0, 7] = math.inf
        left_out = torch.arange(40) < ignored
        classes = torch.where(left_out, -100, y)
        wanted = np.asarray(logit_rows.logit_rows(z, classes, torch.float32, ~left_out))
        wanted[[4, 6]] = np.maximum(wanted[[4, 6]], 0)  # the largest norm of no row is 0 there
        got = logit_rows.on_device(z, classes, torch.float32, left_out)
        _alike(got, wanted, broken == "inf" and ignored == 0)
        if ignored == 0:
            _alike(logit_rows.on_device(z, y, torch.float32, None), wanted, broken == "inf")
            none = logit_rows.on_device(z, None, torch.float32, None)
            _alike(none[:13], wanted[:13], broken == "inf")
            assert none[[13, 20, 21]].isnan().all()


def _alike(got: Tensor, wanted: np.ndarray, infinite: bool) -> None:
    """Equal up to float32; of an infinite logit sums may be NaN on one side and infinite on the other."""
    a, b = got.numpy().astype(np.float64), wanted
    if infinite:
        assert (np.isfinite(a) == np.isfinite(b)).all()
        a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-4)


@pytest.mark.parametrize("ignore", [-100, 1], ids=["no class", "a class"])
@pytest.mark.parametrize("dims", [0, 1], ids=["rows", "image"])
@pytest.mark.parametrize("z", TIES.values(), ids=TIES)
def test_losses_on_an_accelerator(z: Tensor, dims: int, ignore: int) -> None:
    """Oracle: independent computation. Nine operations, run on a CPU, against torch's own loss and argmax."""
    z = z[(..., *[None] * dims)].clone()
    y = torch.randint(0, z.shape[1], (len(z), *z.shape[2:]), generator=torch.Generator().manual_seed(4))
    y = torch.where(torch.rand(y.shape, generator=torch.Generator().manual_seed(5)) < 0.2, ignore, y)
    z[:9] = z[:9].scatter(1, torch.where(y == ignore, 0, y)[:9].unsqueeze(1), 500.0)
    valid = y != ignore
    logp = z.log_softmax(1)
    n, zero, correct, top1, looked = loss_rows.on_device(logp, y, ~valid, z).tolist()
    assert n == looked == valid.sum()
    losses = F.nll_loss(logp, torch.where(valid, y, -100), ignore_index=-100, reduction="none")
    assert zero == ((losses == 0) & valid).sum() > 0
    assert correct == ((z.argmax(1) == y) & valid & ~z.isnan().any(1)).sum()
    assert top1 == pytest.approx(logp.float().exp().amax(1)[valid].sum().item(), rel=1e-5, nan_ok=True)


def gradient_stats(*grads: Tensor) -> list[list[float]]:
    return GradientReader(grads).read(grads, 0).tolist()


@pytest.mark.parametrize(
    ("value", "count"), [(1e-24, 1000), (1e-38, 7), (1e30, 50), (3.0, 4), (0.0, 4), (1e-24, 30000)]
)
def test_gradient_norm_over_the_whole_range(value: float, count: int) -> None:
    """Oracle: closed form. The norm of n equal elements x is sqrt(n) x, also where squares under- or overflow."""
    norm, peak, bad, *_ = gradient_stats(torch.full((count,), value))[0]
    assert norm == pytest.approx(math.sqrt(count) * value, rel=1e-5)
    assert peak == pytest.approx(value, rel=1e-6)
    assert bad == 0


@pytest.mark.parametrize("size", [100, 100_000], ids=["small", "large"])
def test_gradient_non_finite_is_counted_and_kept(size: int) -> None:
    """Oracle: planted fault. Two NaN and one inf are three, whether or not it was the turn of their tensors."""
    g = torch.ones(size)
    g[3] = g[5] = math.nan
    inf = torch.ones(size)
    inf[7] = -math.inf
    grads = [g, inf, torch.ones(size), torch.ones(4)]
    (n1, p1, b1, *_), (n2, p2, b2, *_), (n3, _, b3, *_), (_, p4, *_) = (
        GradientReader(grads).read(grads, 3, extremes=False).tolist()
    )
    assert math.isnan(n1)
    assert math.isnan(p1)
    assert (b1, n2, p2, b2, b3, p4) == (2, math.inf, math.inf, 1, 0, 1)
    assert n3 == pytest.approx(math.sqrt(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradient_statistics_in_every_dtype(dtype: torch.dtype) -> None:
    """Oracle: dense float64 reference. 16-bit gradients, 16-bit accumulation would be off by per cents."""
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=g).to(dtype) for s in ((7,), (60, 90), (30_000,), (1,), (300, 400))]
    grads.append(grads[-1].t())
    for values, x in zip(gradient_stats(*grads), grads, strict=True):
        assert values[0] == pytest.approx(x.double().norm().item(), rel=1e-5)
        assert values[1:3] == [pytest.approx(x.abs().max().item()), 0]


def test_gradient_absent_where_not_looked() -> None:
    """Oracle: definition. Large tensors have extremes when asked for, small ones always; absent is no number."""
    grads = [torch.ones(3), torch.ones(20_000), torch.full((20_000,), 2.0)]
    reader = GradientReader(grads)
    assert reader._turns[0] == ([2], [1])
    values = np.asarray(reader.read(grads, 0, extremes=False))
    absent = values.view(np.uint32) == ABSENT_BITS
    assert absent.tolist() == [[False] * 3 + [True] * 2, [False, True, False, True, True], [False] * 3 + [True] * 2]
    assert values[[0, 2], 1].tolist() == [1, 2]


def test_many_tiny_gradients() -> None:
    """Oracle: dense float64 reference. Groups are cut at their largest size; every tensor keeps its own numbers."""
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(int(n), generator=g) for n in torch.randint(1, 1500, (300,), generator=g)]
    found = np.asarray(GradientReader(grads).read(grads, 0))
    np.testing.assert_allclose(found[:, 0], [x.double().norm().item() for x in grads], rtol=1e-6)
    np.testing.assert_array_equal(found[:, 1], [x.abs().max().item() for x in grads])


def test_the_accelerator_sees_what_the_cpu_sees() -> None:
    """Oracle: independent computation. The way without a sync, run on a CPU, against the grouped one."""
    torch.manual_seed(0)
    grads = [torch.randn(50), torch.randn(200, 100) * 1e-25, torch.zeros(9), torch.randn(20_000), torch.randn(3, 4, 5)]
    grads[3][7] = math.inf
    grads[4] = grads[4].transpose(0, 2)
    seconds = [torch.rand_like(g) * (1e-4 if i != 1 else 1e-54) if i != 2 else None for i, g in enumerate(grads)]
    remembered, history = [v is not None for v in seconds], History(seconds, 0.99, 50)
    spikes = SpikeReader([g.numel() for g in grads], remembered)
    found = np.full((len(grads), 2), ABSENT)
    wanted = found.copy()
    for turn in range(TURNS):
        close_up = np.asarray(GradientReader(grads, remembered).read(grads, turn, history))
        np.testing.assert_allclose(gradient_norms(grads, True), close_up[:, :2], rtol=1e-6)
        np.testing.assert_array_equal(gradient_norms(grads, False)[:, 0], gradient_norms(grads, True)[:, 0])
        seen = close_up[:, 3].view(np.uint32) != ABSENT_BITS
        wanted[seen] = close_up[seen, 3:]
        at, got = spikes.read(grads, turn, history)
        assert got is not None
        found[at] = got
    np.testing.assert_allclose(found, wanted, rtol=1e-4)  # v before the step is a difference
    assert wanted[0, 0] > 0


def test_spikes_on_the_accelerator_of_what_has_no_history_and_across_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: independent computation. First gradients, enormous spikes and tensors larger than a buffer."""
    monkeypatch.setattr(side_by_side, "MOST", 1 << 10)
    torch.manual_seed(0)
    beta2, n = 0.999, 2000
    before = [torch.rand(size) + 0.5 for size in (700, 5000, 300, 40)]
    grads = [torch.randn(len(v)) for v in before]
    before[0][:10] = 0  # their first gradient
    before[2].zero_()  # nothing was ever there
    grads[1][4321], grads[0][3], grads[3][5] = 1e3, 1e3, 1e9
    seconds = [beta2 * v + (1 - beta2) * g * g for v, g in zip(before, grads, strict=True)]
    history = History(seconds, beta2, n)
    wanted = np.asarray(GradientReader(grads, [True] * 4).read(grads, 0, history))[:, 3:]
    at, got = SpikeReader([len(v) for v in before], [True] * 4).read(grads, 0, history)
    assert list(at) == [0, 1, 2, 3] and got is not None
    assert wanted[:, 0].tolist() == [1, 1, 0, 1]
    np.testing.assert_allclose(got, wanted, rtol=2e-3)


@pytest.mark.parametrize("most", [64, 1000, 1 << 24])
def test_side_by_side(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: dense float64 reference. Every element once, in order, whatever the buffers; what is empty stays it."""
    monkeypatch.setattr(side_by_side, "MOST", most)
    torch.manual_seed(0)
    tensors = [torch.randn(s) for s in ((), (0,), (70,), (30, 25), (1000,), (5,))]
    others = [t.double() for t in tensors]
    layout = SideBySide([t.numel() for t in tensors])
    sums, seen = [], []
    for sizes, a, b in layout.copies([*tensors[:3], tensors[3].T.contiguous().T, *tensors[4:]], others):
        assert len(a) == sum(sizes) <= most
        assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
        np.testing.assert_array_equal(a.double(), b)
        seen.append(a.clone())
        sums.append(norms(a.split(sizes), 1))
    np.testing.assert_array_equal(torch.cat(seen), torch.cat([t.reshape(-1) for t in tensors]))
    np.testing.assert_allclose(layout.joined(sums), [t.double().abs().sum() for t in tensors])


@pytest.mark.parametrize("beta2", [0.95, 0.99, 0.999])
def test_spikes_seen_after_the_step_are_those_before_it(beta2: float) -> None:
    """Oracle: naive transcription of SPAM's rule with the second moment before the step, bias-corrected, in float64."""
    torch.manual_seed(0)
    shapes = [(3000,), (60, 190), (7,)]
    params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    opt = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, beta2))
    reader, found = GradientReader(params, [True] * 3), 0
    for t in range(90):
        before = [opt.state[p]["exp_avg_sq"].double().clone() if t else None for p in params]
        for p in params:
            p.grad = torch.randn(p.shape)
            if t > 40 and t % 9 == 0:
                p.grad.view(-1)[:50] *= torch.logspace(0, 4, 50)[: p.numel()]
        opt.step()
        if t < 20:
            continue
        grads = [p.grad for p in params if p.grad is not None]
        got = reader.read(grads, 0, History([opt.state[p]["exp_avg_sq"] for p in params], beta2, t + 1))[:, 3:]
        for i, (g, v) in enumerate(zip(grads, before, strict=True)):
            assert v is not None
            ratio = g.double() ** 2 / (v / (1 - beta2**t))
            spiked = ratio > THETA
            found += int(spiked.sum())
            assert got[i, 0].item() == spiked.sum().item()
            if spiked.any():
                known = ratio[ratio < 1e6].max().item()  # beyond, v before the step is lost to rounding
                assert got[i, 1].item() >= known * 0.99
                if ratio.max() < 1e6:
                    assert got[i, 1].item() == pytest.approx(known, rel=1e-2)
    assert found > 40


@pytest.mark.parametrize("size", [10, 300_000], ids=["small", "in pieces"])
def test_spike_threshold_and_untouched_elements(size: int) -> None:
    """Oracle: closed form. v-hat = 1: 71 is spiked (5,041 > 5,000), 70 is not; a first gradient of 5 is not either."""
    beta2, n = 0.999, 10_001
    correction = 1 - beta2 ** (n - 1)
    for value, spiked in ((71.0, 1), (70.0, 0)):
        g = torch.zeros(size)
        g[-1], g[1] = value, 5.0
        v = torch.full((size,), correction)
        v[-1] = beta2 * correction + (1 - beta2) * value**2
        v[1] = (1 - beta2) * 25
        count, ratio = GradientReader([g], [True]).read([g], 0, History([v], beta2, n))[0, 3:].tolist()
        assert count == spiked
        assert ratio == pytest.approx(value**2 if spiked else 0, rel=1e-3)


def test_update_is_the_true_change() -> None:
    """Oracle: dense float64 reference. Small tensors, which are read side by side, and one that is read in pieces."""
    torch.manual_seed(0)
    now = [torch.randn(50, 40), torch.randn(9), torch.randn(101, 103).T, torch.randn(())]
    held = [w.clone(memory_format=torch.contiguous_format) for w in now]
    reader = ParameterReader(held, held)
    for _ in range(3):
        old = [w.double() for w in now]
        for w in now:
            w.add_(torch.randn_like(w) * 1e-3)
        got, aligned, moved = reader.read(now, [None] * 4, distances=False)
        assert aligned is None
        assert moved is None
        torch._foreach_copy_(held, now)
        for i, (a, b) in enumerate(zip(old, now, strict=True)):
            assert got[i, 0] == pytest.approx((b.double() - a).norm().item(), rel=1e-4)
            assert got[i, 1] == pytest.approx(b.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parameters_on_the_accelerator_as_on_the_cpu(dtype: torch.dtype) -> None:
    """Oracle: independent computation. Buffers in torch, run on a CPU, against rows and pieces in numpy."""
    torch.manual_seed(0)
    now = [torch.randn(s).to(dtype) for s in ((), (70,), (300, 257), (1 << 13,), (9000,), (50,), (0,))]
    before, start = ([w + 0.1 * torch.randn_like(w) for w in now] for _ in range(2))
    grads = [torch.randn_like(w) if i % 3 else None for i, w in enumerate(now)]
    samples = [distance.sample(w.view(-1)) for w in start]
    found = ParameterReader(before, samples).read(now, grads, distances=True)
    reference = on_device(now, before, grads, samples)
    rough = 1e-2 if dtype == torch.bfloat16 else 1e-5  # there the change is rounded to the parameters' own dtype
    for a, b in zip(found, reference, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rough, atol=1e-5)


def test_distance_of_small_tensors_is_exact() -> None:
    """Oracle: closed form. Every one of 1,000 elements moved by 0.5: squared distance 250, no variance."""
    p = torch.zeros(1000)
    start = distance.sample(p).clone()
    p += 0.5
    assert distance.distance_stats(distance.sample(p.numpy()), start.numpy(), 1000) == (250, 0, 1)
    moved = ParameterReader([p], [start]).read([p], [None], distances=True)[2]
    assert np.asarray(moved).tolist() == [[250, 0, 1]]


def test_distance_estimate_is_unbiased_and_knows_its_error() -> None:
    """Oracle: dense float64 reference. Mean error within 4 standard errors; stated error as scattered.

    60 draws fix a standard deviation to about 10 %, so 35 % is generous.
    """
    errors, stated = [], []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        start = np.zeros(400_000)
        now = torch.randn(400, 1000, generator=g) * torch.rand(400, 1, generator=g)
        moved = distance.sample(now.view(-1).numpy())
        sumsq, var, exact = distance.distance_stats(moved, distance.sample(start), now.numel())
        errors.append(sumsq - now.double().square().sum().item())
        stated.append(math.sqrt(var))
        assert exact == 0
    scatter = torch.tensor(errors).std().item()
    assert abs(sum(errors) / 60) < 4 * scatter / math.sqrt(60)
    assert sum(stated) / 60 == pytest.approx(scatter, rel=0.35)


def test_input_statistics_and_fingerprint() -> None:
    """Oracle: closed form, and invariance: equal batches have equal fingerprints, one changed element another."""
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    n, sumsq, peak, bad, mark = input_stats(x)
    assert (n, sumsq, peak, bad) == (4, 25, 4, 0)
    assert input_stats(x.clone())[4] == mark
    assert input_stats(x.flip(1))[4] != mark
    assert mark == int(mark) < 2**24
    tokens = torch.arange(12).view(3, 4)
    assert len(input_stats(tokens)) == 1
    x[0, 0] = math.nan
    assert input_stats(x)[3] == 1
    assert math.isnan(input_stats(x)[2])


def test_inputs_on_an_accelerator() -> None:
    """Oracle: independent computation. All inputs at once, run on a CPU, against numpy: dtypes, views, NaN."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(41, 60, generator=g) * 100
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    inputs = [x.to(d) for d in (*dtypes, torch.uint8, torch.bool)]
    inputs += [x.T, x[::2, 1:], x[0], x[0, 0], torch.randint(-9, 9, (3, 5, 7), generator=g), torch.randn(6, 3000)]
    assert fingerprints(inputs).tolist() == [input_stats(i)[-1] for i in inputs]
    assert fingerprints(inputs[:1]).tolist() == [input_stats(x)[-1]]
    x[3, 4], x[5, 6] = math.nan, -math.inf
    for i in (*inputs, x, x.T, x[5:], x[7:].bfloat16()):
        if i.is_floating_point():
            np.testing.assert_allclose(input_sizes(i).numpy(), input_stats(i)[1:4], rtol=1e-5)


def test_large_inputs_on_an_accelerator_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. Five elements that are not finite are five, however many parts."""
    monkeypatch.setattr("monitor.record.passes.input._SCRATCH", 100)
    x = torch.zeros(50, 30)
    x[::10, 3] = math.nan
    assert input_sizes(x)[2] == 5
    assert input_sizes(x[0])[2] == 1
    assert input_sizes(x[1:2])[2] == 0
