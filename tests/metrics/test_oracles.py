"""Are the numbers right? Every metric against its own cases and against a second kind of oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.block import apply
from monitor.metric import Array, Block, Case, Metric, load_metrics
from tests.metrics.blocks import case_block, values_and_mask

METRICS = load_metrics()
Labels = npt.NDArray[np.int64]
CASES = [pytest.param(m, case, id=f"{m.id}-{i}") for m in METRICS.values() for i, case in enumerate(m.oracle())]

P32 = 24 * math.log(2)


@pytest.mark.parametrize(("m", "case"), CASES)
def test_case(m: Metric, case: Case):
    """Oracle: closed form. The expected values stand in the metric's own file, each case with its reason."""
    assert case.why
    block = case_block(case)
    columns = {b.column: b for b in apply(m, block)}
    assert set(case.expected) == set(columns), "a case says something about every column"
    for name, data in case.expected.items():
        values, has = values_and_mask(data)
        b = columns[name]
        shape = b.values.shape
        if values.ndim == 1:
            values, has = values[:, None], has[:, None]
        np.testing.assert_array_equal(b.has, np.broadcast_to(has, shape), f"{b.ref}: recorded or not")
        expected = np.broadcast_to(values, shape)[b.has]
        np.testing.assert_allclose(b.values[b.has], expected, rtol=case.rtol, err_msg=f"{b.ref}: {case.why}")


def test_every_metric_has_a_case():
    """Oracle: planted fault. An oracle that yields nothing would pass every other test."""
    assert all(list(m.oracle()) for m in METRICS.values())


def measure(metric: str, stats: Mapping[str, object]) -> dict[str, float]:
    """One step and one module of a metric; absent columns are left out."""
    block = Block(np.zeros(1, dtype=np.int64), ("",), {n: np.array([[v]], dtype=np.float64) for n, v in stats.items()})
    return {b.column: float(b.values[0, 0]) for b in apply(METRICS[metric], block) if b.has[0, 0]}


# Logits ---------------------------------------------------------------------------------------------------------------


def transcribe_logit_rows(z: Array, y: Labels) -> dict[str, float]:
    """The statistics of the pass over logits, row by row and class by class as they are defined; float32 loss."""
    n, k = z.shape
    names = (
        "sum_norm sum_cnorm sum_rowstd sumsq sum_z sum_margin sum_true_margin sum_lse sumsq_lse sum_entropy sum_top1 "
        "sum_rate sum_zscore"
    )
    s = dict.fromkeys([*names.split(), "collapsed", "collapsed_any"], 0.0)
    top = {"max_norm": -math.inf, "max_cnorm": -math.inf, "max_z": -math.inf, "min_z": math.inf}
    heads = []
    for row, label in zip(z.tolist(), y.tolist(), strict=True):
        mean, best = sum(row) / k, max(range(k), key=row.__getitem__)
        norm = math.sqrt(sum(x * x for x in row))
        cnorm = math.sqrt(sum((x - mean) ** 2 for x in row))
        R = sum(math.exp(x - row[best]) for i, x in enumerate(row) if i != best)
        lse = row[best] + math.log1p(R)
        p = [math.exp(x - lse) for x in row]
        s["sum_norm"] += norm
        s["sum_cnorm"] += cnorm
        s["sum_rowstd"] += cnorm / math.sqrt(k)
        s["sumsq"] += norm**2
        s["sum_z"] += sum(row)
        s["sum_margin"] += row[best] - max(x for i, x in enumerate(row) if i != best)
        s["sum_true_margin"] += row[label] - max(x for i, x in enumerate(row) if i != label)
        s["sum_lse"] += lse
        s["sumsq_lse"] += lse**2
        s["sum_entropy"] -= sum(x * math.log(x) for x in p if x > 0)
        s["sum_top1"] += max(p)
        s["sum_rate"] += row[label] - sum(p_k * z_k for p_k, z_k in zip(p, row, strict=True))
        s["sum_zscore"] += (row[label] - mean) / (cnorm / math.sqrt(k))
        s["collapsed"] += R <= 2.0**-24 and best == label
        s["collapsed_any"] += R <= 2.0**-24
        heads.append(math.log(R) + P32 if R > 0 else -math.inf)
        top["max_norm"], top["max_cnorm"] = max(top["max_norm"], norm), max(top["max_cnorm"], cnorm)
        top["max_z"], top["min_z"] = max(top["max_z"], *row), min(top["min_z"], *row)
    heads.sort()
    quantiles = {f"headroom_q{q:02}": heads[max(0, math.ceil(q / 100 * n) - 1)] for q in (5, 50)}
    return {"n": n, "classes": k, "u_nats": P32, **s, **top, **quantiles}


def dense_logit_columns(z: Array, y: Labels) -> dict[str, dict[str, float]]:
    """The columns of every metric of logits straight from the logits, in the whole-array form of the definition."""
    n, k = z.shape
    centred = z - z.mean(axis=1, keepdims=True)
    norm, cnorm = np.linalg.norm(z, axis=1), np.linalg.norm(centred, axis=1)
    ordered = np.sort(z, axis=1)
    true = z[np.arange(n), y]
    others = z.copy()
    others[np.arange(n), y] = -np.inf
    lse = scipy.special.logsumexp(z, axis=1)
    p = scipy.special.softmax(z, axis=1)
    rivals = np.exp(ordered[:, :-1] - ordered[:, -1:]).sum(axis=1)
    lost = (np.float64(1) + rivals).astype(np.float32) == np.float32(1)
    entropy = scipy.special.entr(p).sum(axis=1).mean()
    head = np.log(rivals) + P32
    return {
        "logit_norm": {
            "mean": norm.mean(), "max": norm.max(), "centred_mean": cnorm.mean(), "centred_max": cnorm.max(), "rows": n,
        },
        "logit_scale": {
            "rms": np.sqrt(np.mean(z**2)), "mean": z.mean(), "max_abs": np.abs(z).max(),
            "row_std": z.std(axis=1).mean(), "margin": (ordered[:, -1] - ordered[:, -2]).mean(),
            "true_margin": (true - others.max(axis=1)).mean(), "max": z.max(), "min": z.min(),
        },
        "log_z": {"mean": lse.mean(), "std": lse.std(), "z_loss": np.mean(lse**2), "excess": lse.mean() - np.log(k)},
        "pred_entropy": {"entropy": entropy, "normalised": entropy / np.log(k), "top1_mass": p.max(axis=1).mean()},
        "softmax_collapse_frac": {
            "frac": (lost & (z.argmax(axis=1) == y)).mean(), "any_frac": lost.mean(), "rows": n,
        },
        "sc_headroom": {
            "q05": np.quantile(head, 0.05, method="inverted_cdf"), "q50": np.quantile(head, 0.5, method="inverted_cdf"),
        },
        "nlm_rate": {"rate": (true - (p * z).sum(axis=1)).mean()},
        "zscore_target": {"mean": ((true - z.mean(axis=1)) / z.std(axis=1)).mean()},
    }  # fmt: skip


LOGIT_METRICS = (
    "logit_norm", "logit_scale", "log_z", "pred_entropy", "softmax_collapse_frac", "sc_headroom", "nlm_rate",
    "zscore_target",
)  # fmt: skip


def measure_logits(z: Array, y: Labels) -> dict[str, dict[str, float]]:
    stats = transcribe_logit_rows(z, y)
    return {m: measure(m, stats) for m in LOGIT_METRICS}


@pytest.mark.parametrize(("n", "k", "scale"), [(1, 2, 1.0), (37, 5, 3.0), (64, 113, 10.0), (200, 3, 25.0)])
def test_logit_metrics_against_dense_arrays(n: int, k: int, scale: float):
    """Oracle: dense reference and independent library (scipy), from raw logits; the sums by naive transcription.

    Tolerance: float64 toys; the standard deviation of log Z is a difference of nearly equal sums.
    """
    rng = np.random.default_rng(n)
    z, y = scale * rng.normal(size=(n, k)) + 2, rng.integers(0, k, n)
    want = dense_logit_columns(z, y)
    got = measure_logits(z, y)
    for m in LOGIT_METRICS:
        assert set(got[m]) == set(want[m])
        for column, value in want[m].items():
            assert got[m][column] == pytest.approx(value, rel=1e-9, abs=1e-7), (m, column)
    if scale == 25.0:
        assert 0 < got["softmax_collapse_frac"]["frac"] < got["softmax_collapse_frac"]["any_frac"] < 1


logits = st.integers(0, 2**32 - 1).map(
    lambda seed: (
        np.random.default_rng(seed).normal(size=(9, 6)) * np.random.default_rng(seed).choice([0.1, 1, 8, 16]),
        np.random.default_rng(seed + 1).integers(0, 6, 9),
    )
)


@settings(max_examples=30, deadline=None)
@given(logits, st.floats(-50, 50))
def test_a_constant_on_every_row_changes_only_what_the_softmax_cannot_see(zy: tuple[Array, Labels], c: float):
    """Oracle: invariance. log Z moves by c and the mean logit too; probabilities, margins and headroom stay."""
    z, y = zy
    a, b = measure_logits(z, y), measure_logits(z + c, y)
    same = {
        "logit_norm": ("centred_mean", "centred_max", "rows"),
        "logit_scale": ("row_std", "margin", "true_margin"),
        "pred_entropy": ("entropy", "normalised", "top1_mass"),
        "sc_headroom": ("q05", "q50"),
        "nlm_rate": ("rate",),
        "zscore_target": ("mean",),
    }
    for m, columns in same.items():
        for column in columns:
            assert b[m][column] == pytest.approx(a[m][column], rel=1e-6, abs=1e-6), (m, column)
    assert b["log_z"]["mean"] - a["log_z"]["mean"] == pytest.approx(c, abs=1e-9)
    assert b["logit_scale"]["mean"] - a["logit_scale"]["mean"] == pytest.approx(c, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(logits, st.sampled_from([0.25, 2.0, 4.0]))
def test_scaling_laws(zy: tuple[Array, Labels], a: float):
    """Oracle: invariance. Norms, scales and margins are of degree 1; sharper logits have less headroom."""
    z, y = zy
    one, scaled = measure_logits(z, y), measure_logits(a * z, y)
    for m in ("logit_norm", "logit_scale"):
        for column, value in one[m].items():
            if column != "rows":
                assert scaled[m][column] == pytest.approx(a * value, rel=1e-9, abs=1e-12), (m, column)
    assert scaled["zscore_target"]["mean"] == pytest.approx(one["zscore_target"]["mean"], rel=1e-9)
    for m, column in (("sc_headroom", "q50"), ("sc_headroom", "q05"), ("pred_entropy", "entropy")):
        assert (scaled[m][column] - one[m][column]) * (a - 1) <= 1e-9, (m, column)


@settings(max_examples=20, deadline=None)
@given(logits, st.randoms(use_true_random=False))
def test_order_of_rows_and_classes_does_not_matter(zy: tuple[Array, Labels], random):
    """Oracle: invariance. Rows permuted, classes permuted with their labels."""
    z, y = zy
    rows, classes = random.sample(range(9), 9), random.sample(range(6), 6)
    permuted, labels = z[rows][:, classes], np.argsort(classes)[y[rows]]
    a, b = measure_logits(z, y), measure_logits(permuted, labels)
    for m in LOGIT_METRICS:
        assert b[m] == pytest.approx(a[m], rel=1e-9, abs=1e-7), m


@settings(max_examples=20, deadline=None)
@given(logits, st.integers(1, 8))
def test_means_over_micro_batches_weigh_rows_not_batches(zy: tuple[Array, Labels], cut: int):
    """Oracle: invariance. Sums of two parts, added, give the columns of the whole."""
    z, y = zy
    a, b = transcribe_logit_rows(z[:cut], y[:cut]), transcribe_logit_rows(z[cut:], y[cut:])
    merged = {name: a[name] + b[name] for name in a}
    for name in ("classes", "u_nats"):
        merged[name] = a[name]
    for name in ("max_norm", "max_cnorm", "max_z"):
        merged[name] = max(a[name], b[name])
    merged["min_z"] = min(a["min_z"], b["min_z"])
    whole = measure_logits(z, y)
    for m in LOGIT_METRICS:
        if m != "sc_headroom":  # quantiles do not merge
            assert measure(m, merged) == pytest.approx(whole[m], rel=1e-9, abs=1e-7), m


@pytest.mark.parametrize("k", [2, 113])
def test_headroom_and_collapse_meet_at_the_edge(k: int):
    """Oracle: closed form. K − 1 equal rivals at distance d: h = ln(K−1) + 24 ln 2 − d, collapsed iff h <= 0."""
    edge = math.log(k - 1) + P32
    assert edge == pytest.approx({2: 16.6355, 113: 21.3540}[k], abs=1e-4)
    for d in (edge - 0.01, edge + 0.01):
        z = np.zeros((1, k))
        z[0, 1] = d
        got = measure_logits(z, np.array([1]))
        assert got["sc_headroom"]["q50"] == pytest.approx(edge - d, abs=1e-9)
        assert got["softmax_collapse_frac"]["frac"] == (d > edge)
        assert measure_logits(z, np.array([0]))["softmax_collapse_frac"] == {"frac": 0, "any_frac": d > edge, "rows": 1}


def test_log_z_spread_below_rounding_is_zero():
    """Oracle: closed form. Equal rows have no spread; float32 sums leave a difference of either sign."""
    lse = np.float32(10.824905)
    for rounding in (-1e-7, 1e-7):
        square = np.float32(3) * lse**2 * np.float32(1 + rounding)
        assert measure("log_z", {"n": 3, "classes": 2, "sum_lse": np.float32(3) * lse, "sumsq_lse": square})["std"] == 0
    two = {"n": 2, "classes": 2, "sum_lse": 20.02, "sumsq_lse": 10.0**2 + 10.02**2}
    assert measure("log_z", two)["std"] == pytest.approx(0.01)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_of_the_loss(dtype: type):
    """Oracle: dense reference. Log-probabilities of a kernel in that dtype; counted row by row."""
    rng = np.random.default_rng(3)
    z = (rng.normal(size=(400, 7)) * 12).astype(dtype)
    y = rng.integers(0, 7, 400)
    logp = z - z.max(axis=1, keepdims=True)
    logp = logp - np.log(np.exp(logp).sum(axis=1, keepdims=True))
    stats = {"n": 0.0, "zero": 0.0, "correct": 0.0, "sum_top1": 0.0}
    for row, label in zip(logp, y, strict=True):
        stats["n"] += 1
        stats["zero"] += float(row[label]) == 0
        stats["correct"] += int(np.argmax(row)) == label
        stats["sum_top1"] += math.exp(max(row))
    true = np.take_along_axis(logp, y[:, None], axis=1)[:, 0]
    assert measure("loss_zero_frac", stats) == {"frac": pytest.approx((true == 0).mean()), "rows": 400}
    got = measure("train_accuracy", stats)
    assert got["accuracy"] == pytest.approx((z.argmax(axis=1) == y).mean())
    assert got["top1_mass"] == pytest.approx(
        scipy.special.softmax(z.astype(float), axis=1).max(axis=1).mean(), rel=1e-3
    )


# Inputs, gradients, parameters ----------------------------------------------------------------------------------------


def test_input_against_dense_arrays():
    """Oracle: dense reference. Two micro-batches of different sizes make one step."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(8, 5)), 100 * rng.normal(size=(3, 5))]
    stats = {
        "n": sum(x.size for x in parts),
        "sumsq": sum(float((x**2).sum()) for x in parts),
        "max_abs": max(float(np.abs(x).max()) for x in parts),
        "nonfinite": 0.0,
        "fingerprint": 7.0,
    }
    whole = np.concatenate(parts).ravel()
    got = measure("input_rms", stats)
    assert got["rms"] == pytest.approx(np.linalg.norm(whole) / math.sqrt(whole.size), rel=1e-12)
    assert got["max_abs"] == np.abs(whole).max()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(-37, 37))
def test_total_gradient_norm_is_the_norm_of_the_whole_gradient(seed: int, parameters: int, power: float):
    """Oracle: dense reference. numpy's norm of the concatenation, over the range of float32."""
    rng = np.random.default_rng(seed)
    grads = [10.0**power * rng.normal(size=rng.integers(1, 50)) for _ in range(parameters)]
    stats = {
        "norm": np.array([[np.linalg.norm(g) for g in grads]]),
        "max_abs": np.array([[np.abs(g).max() for g in grads]]),
        "nonfinite": np.zeros((1, parameters)),
    }
    block = Block(np.zeros(1, dtype=np.int64), tuple(map(str, range(parameters))), stats)
    got = {b.column: b for b in apply(METRICS["grad_norm_total"], block)}
    whole = np.concatenate(grads)
    assert got["norm"].modules == ("",)
    assert got["norm"].values[0, 0] == pytest.approx(np.linalg.norm(whole), rel=1e-12)
    assert got["max_abs"].values[0, 0] == np.abs(whole).max()
    assert got["nonfinite"].values[0, 0] == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2.0**-100, 0.5, 2.0**90]))
def test_update_ratio_of_plain_descent(seed: int, unit: float):
    """Oracle: closed form and invariance. θ' = θ − η g: the ratio is η‖g‖/‖θ'‖, whatever unit θ is measured in."""
    rng = np.random.default_rng(seed)
    theta, g = unit * rng.normal(size=40), unit * rng.normal(size=40)
    new = theta - 1e-3 * g
    stats = {"update_norm": np.linalg.norm(new - theta), "param_norm": np.linalg.norm(new)}
    got = measure("update_ratio", stats)
    assert got["ratio"] == pytest.approx(1e-3 * np.linalg.norm(g) / np.linalg.norm(new), rel=1e-9)
    assert measure("param_norm", stats)["norm"] == np.linalg.norm(new)


def test_standard_error_of_the_distance():
    """Oracle: dense reference by simulation. Cluster samples of a known vector: 4 of 40 blocks, drawn 3,000 times.

    Tolerance: the delta method leaves out terms of relative order Var(D)/D²; the spread of 3,000 draws is known to
    1/sqrt(6000), four of which are allowed.
    """
    rng = np.random.default_rng(0)
    blocks = (rng.normal(size=(40, 64)) ** 2).sum(axis=1)  # squared movement per block
    N, B = 40, 4
    variance = N * (N - B) / B * blocks.var(ddof=1)
    draws = np.array([N / B * rng.choice(blocks, B, replace=False).sum() for _ in range(3000)])
    got = measure("distance_from_start", {"sumsq": blocks.sum(), "sumsq_var": variance, "exact": 0})
    assert got["distance"] == pytest.approx(math.sqrt(blocks.sum()))
    relative = 4 / math.sqrt(6000) + variance / blocks.sum() ** 2
    assert got["stderr"] == pytest.approx(np.sqrt(draws).std(), rel=relative)


#: Columns that show a statistic as it was recorded.
UNCHANGED = {
    "clip": {"coefficient": "coefficient"},
    "grad_norm": {"norm": "norm", "max_abs": "max_abs", "nonfinite": "nonfinite"},
    "input_rms": {"nonfinite": "nonfinite", "fingerprint": "fingerprint"},
    "learning_rate": {"lr": "lr"},
    "logged": {"value": "value"},
    "loss": {"value": "value", "micro_steps": "micro_steps"},
    "loss_scale": {"scale": "scale", "skipped": "skipped"},
    "param_norm": {"norm": "param_norm"},
    "spam_spike": {"count": "spikes", "ratio": "spike_ratio"},
    "step_time": {"seconds": "step_seconds", "monitor_seconds": "monitor_seconds"},
    "update_ratio": {"update_norm": "update_norm"},
}


@pytest.mark.parametrize("metric", UNCHANGED)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_recorded_numbers_pass_unchanged(metric: str, seed: int):
    """Oracle: invariance. Any float32 whatever, NaN, inf and subnormal numbers included."""
    rng = np.random.default_rng(seed)
    m = METRICS[metric]
    names = sorted({name for case in m.oracle() for name in case.stats})
    with np.errstate(invalid="ignore"):  # widening a signalling NaN
        values = {
            name: rng.integers(0, 2**32, (50, 2), dtype=np.uint32).view(np.float32).astype(np.float64) for name in names
        }
    for name in values:
        values[name][::7] = rng.choice([np.nan, np.inf, -np.inf, 0.0], (8, 2))
    got = {b.column: b for b in apply(m, Block(np.arange(50), ("a", "b"), values))}
    for column, stat in UNCHANGED[metric].items():
        assert got[column].has.all()
        np.testing.assert_array_equal(got[column].values, values[stat])


# Robust z -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "needs"), [("loss_z", "loss.value"), ("grad_norm_z", "grad_norm.norm")])
def test_robust_z_of_a_planted_spike(metric: str, needs: str):
    """Oracle: planted fault. Noise of known spread, one point 12 standard deviations up: z is 12 within its error.

    The MAD of 100 normal points has a relative standard error of 0.117, the median one of 0.125 σ; 4 of each.
    """
    rng = np.random.default_rng(5)
    x = 3 + 0.1 * rng.normal(size=(400, 2))
    x[250] = 3 + 12 * 0.1
    x[300, 0] = np.nan
    [b] = apply(METRICS[metric], Block(np.arange(400), ("a", "b"), {needs: x}))
    assert (np.abs(b.values[250] - 12) < 12 * 4 * 0.117 + 4 * 0.125).all()
    assert np.isnan(b.values[300, 0]) and b.has[300, 0]
    rest = np.delete(b.values, [250, 300], axis=0)[20:]
    assert np.abs(rest).max() < 6
    np.testing.assert_array_equal(b.has[:, 0], np.arange(400) >= 20)
