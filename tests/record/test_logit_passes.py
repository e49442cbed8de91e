"""The fused reductions of logits and losses against closed forms and dense float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from monitor.record.passes import logit_rows, loss_rows


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
