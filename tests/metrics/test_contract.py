"""What every metric promises, whatever it measures; a new file in ``monitor/metrics`` needs no line here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import monitor.metrics
from monitor.block import ABSENT, ColumnBlock, Layout, RawBlock, Segment, apply, evaluate
from monitor.errors import MetricError
from monitor.metric import Block, Metric, load_metrics
from tests.metrics.blocks import copy, random_block, select, stats_of

METRICS = load_metrics()
every_metric = pytest.mark.parametrize("m", METRICS.values(), ids=list(METRICS))

UNITS = {
    "1", "1/lr", "count", "fraction", "hash", "loss", "loss/weight", "loss/weight²", "nats", "robust sigma", "s",
    "steps",
}  # fmt: skip

#: The passes and what they record: pass -> statistics.
PASSES = {
    "loss": "value micro_steps",
    "attention": "lse_max lse_lower found unread qk_bound q_norm k_norm n n_many sum_entropy sum_normalised sum_sink",
    "autocast": "stale",
    "batch_norm": "examples samples calls",
    "binary_logits": "n sum min max squashed",
    "birthplace": "count",
    "evaluation_mode": "losses dropouts norms evaluated",
    "input": "n sumsq max_abs nonfinite fingerprint",
    "logit_rows": "n classes u_nats sum_norm max_norm sum_cnorm max_cnorm sum_rowstd sumsq sum_z max_z min_z "
    "sum_margin sum_true_margin sum_lse sumsq_lse sum_entropy sum_top1 collapsed collapsed_any "
    "sum_rate sum_zscore headroom_q05 headroom_q50",
    "loss_rows": "n zero correct sum_top1 looked",
    "alignment": "dot grad_norm param_norm",
    "odd_fraction": "n odd even",
    "optimizer_age": "updates remembers",
    "optimizer_overlap": "shared twice",
    "optimizer_resumed": "counted since",
    "linear_fit": "n residual total",
    "local_complexity": "n cut units",
    "fourier": "restricted excluded excluded_one train test keys key_share",
    "embedding_gini": "gini",
    "gradient": "norm max_abs nonfinite spikes spike_ratio",
    "gradient_reuse": "left norm backwards n",
    "update": "update_norm param_norm",
    "rounding": "n asked lost elements still",
    "underflow": "n rest least coarse elements",
    "distance": "sumsq sumsq_var exact",
    "learning_rate": "lr",
    "clip": "coefficient",
    "loss_scale": "scale skipped",
    "clock": "step_seconds monitor_seconds",
    "labels": "labels within mean_within pooled looks",
    "logged": "value",
    "mode": "modules evaluating left",
    "router": "tokens rows experts assigned sum_entropy mean_entropy sumsq_lse max_z sumsq_load max_load load_entropy "
    "sum_margin over dropped limited early_z",
    "router_load": "chosen assigned",
    "stream": "rms max_abs std kurtosis median massive nonfinite rows",
    "units": "dead dormant before still saturated units rows role",
    "norm": "rms_mean rms_max rms_median sigma_mean sigma_std sigma_first firsts tokens gain_min gain_median gain_max",
    "embedding": "rows never",
    "adam_state": "rms eps",
    "expert": "norm",
    "experts": "mean_cosine max_cosine entries",
    "example": "examples visits negative earlier whole",
    "memorisation": "memorised judged median_step threshold sum_loss samples",
    "pathway_distance": "distance half_distance chosen_distance characters samples pairs",
    "pathway_consistency": "inconsistency mean_cosine samples undefined",
    "pathway_churn": "changed assigned steps lr_part",
    "routing_dimension": "dimension samples experts",
    "batch_sharpness": "value gradient_norm examples",
    "block_sharpness": "value residual converged",
    "edge_of_stability": "ratio threshold stable_lr converged",
    "gradient_alignment": "cosine norm other_norm",
    "hessian_eigenvalue": "value residual converged",
    "hessian_trace": "trace stderr frobenius frobenius_stderr samples",
    "jacobian_spectrum": "rows rank effective_rank condition largest smallest",
    "opposing_signals": "rows up down up_mean down_mean typical cancelled",
    "preconditioned_sharpness": "value threshold converged",
    "sgd_stability": "ratio stderr",
    "sharpness": "value residual converged products examples parameters loss of_step",
    "spectral_density": "negative_ratio negative_weight negative smallest smallest_residual nodes",
    "trajectory_kl": "kl changed steps temperature rows",
}

#: Every column, as it is written into runs. Renaming one breaks old runs.
COLUMNS = {
    "activation_nonfinite": "count",
    "attn_entropy": "entropy normalised rows",
    "attn_logit_max": "lse_max found certified lower",
    "attn_sink_mass": "mass rows",
    "autocast_cache": "stale",
    "batch_norm": "examples samples calls",
    "batch_sharpness": "value gradient_norm examples",
    "block_sharpness": "value residual converged",
    "binary_logits": "mean min max squashed elements",
    "clip": "coefficient",
    "distance_from_start": "distance stderr",
    "edge_of_stability": "ratio threshold stable_lr converged",
    "evaluation_mode": "losses dropouts norms evaluated",
    "example_margin": "negative earlier whole visits examples",
    "expert_norm": "norm",
    "expert_similarity": "mean largest entries",
    "gini": "gini",
    "gradient_alignment": "cosine norm other_norm",
    "gradient_reuse": "share backwards elements",
    "grad_norm": "norm max_abs nonfinite",
    "grad_norm_total": "norm nonfinite max_abs",
    "grad_norm_z": "z",
    "gradient_zeros": "zero coarse least looked elements",
    "hessian_eigenvalue": "value residual converged",
    "hessian_trace": "trace stderr frobenius frobenius_stderr samples",
    "input_rms": "rms max_abs nonfinite fingerprint",
    "jacobian_spectrum": "rows rank effective_rank condition largest smallest",
    "label_mixing": "within mean_within pooled excess labels looks",
    "learning_rate": "lr",
    "linear_r2": "r2",
    "local_complexity": "cut share",
    "log_z": "mean std z_loss excess",
    "logged": "value",
    "logit_norm": "mean max centred_mean centred_max rows",
    "logit_scale": "rms row_std max_abs mean margin true_margin max min",
    "loss": "value micro_steps",
    "loss_scale": "scale skipped",
    "loss_z": "z",
    "loss_zero_frac": "frac rows",
    "lost_updates": "frac still asked looked elements",
    "nlm_cos": "cos total",
    "nlm_rate": "rate",
    "odd_fraction": "omega samples",
    "optimizer_age": "updates remembers",
    "optimizer_overlap": "shared twice",
    "optimizer_resumed": "counted since",
    "restricted_loss": "restricted excluded excluded_one train test keys key_share",
    "opposing_signals": "rows up down up_mean down_mean typical cancelled",
    "param_norm": "norm",
    "memorisation": "fraction median_step threshold loss samples",
    "pathway_churn": "churn steps lr_part",
    "pathway_consistency": "inconsistency consistency mean_cosine undefined samples",
    "pathway_distance": "distance half_distance chosen_distance characters samples pairs",
    "routing_dimension": "dimension samples experts",
    "preconditioned_sharpness": "value threshold converged",
    "pred_entropy": "entropy normalised top1_mass",
    "router_balance": "cv max_violation effective entropy normalised mean_normalised z max_logit experts top_k "
    "tokens rows margin mutual_information over_capacity dropped early_z",
    "router_load": "load",
    "qk_norm_bound": "bound alignment q_norm k_norm",
    "saturation": "share",
    "sc_headroom": "q05 q50",
    "sgd_stability": "ratio stderr",
    "sharpness": "value residual converged products examples parameters loss of_step",
    "softmax_collapse_frac": "frac any_frac rows",
    "spectral_density": "negative_ratio negative_weight negative smallest smallest_residual nodes",
    "residual_stream": "rms max_abs kurtosis peak massive nonfinite rows",
    "norm_layer": "rms max_rms peak nonlinearity first_ratio gain_min gain_median gain_max tokens",
    "embedding_rows": "frac never rows",
    "eps_ratio": "ratio grad_rms",
    "spam_spike": "count ratio",
    "step_time": "seconds monitor_seconds",
    "training_mode": "share left modules",
    "train_accuracy": "accuracy top1_mass rows",
    "trajectory_kl": "kl changed steps temperature rows",
    "update_ratio": "ratio update_norm",
    "zscore_target": "mean",
}


def by_name(blocks: list[ColumnBlock]) -> dict[str, ColumnBlock]:
    return {b.column: b for b in blocks}


def assert_same(a: ColumnBlock, b: ColumnBlock, rows: slice = slice(None)) -> None:
    np.testing.assert_array_equal(a.has[rows], b.has)
    np.testing.assert_array_equal(np.where(a.has, a.values, 0)[rows], np.where(b.has, b.values, 0))


def test_columns_are_those_that_runs_contain():
    """Oracle: golden. Metrics may be added; a recorded column keeps its name and its place."""
    for name, columns in COLUMNS.items():
        assert " ".join(c.name for c in METRICS[name].columns) == columns, name


@every_metric
def test_definition(m: Metric):
    """Oracle: planted fault. Known units, a docstring that explains, statistics that the pass records."""
    assert {c.unit for c in m.columns} <= UNITS
    summary, *rest = m.doc.splitlines()
    assert summary.endswith(".") and not rest[0]
    for word in ("Healthy", "nhealthy", "\nSource: "):
        assert word in m.doc, f"the docstring of {m.id} lacks {word!r}"
    assert m.lookback == 0 or m.derived
    if m.derived:
        assert all(METRICS[n.split(".")[0]].column(n.split(".")[1]) for n in m.needs)
        assert stats_of(m) == sorted(m.needs)
    elif m.reads in PASSES:
        assert set(stats_of(m)) <= set(PASSES[m.reads].split())


def test_loading_needs_neither_torch_nor_pandas():
    """Oracle: planted fault. A process of its own, which nothing else can have imported them into."""
    code = (
        "import sys; from monitor.metric import load_metrics; assert load_metrics(); import monitor.robust;"
        "assert not {'torch', 'pandas', 'scipy', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(monitor.metrics.__path__[0]).parents[1])


@every_metric
def test_a_formula_does_not_look_beyond_its_lookback(m: Metric):
    """Oracle: invariance. Cut along the steps, with the declared overlap, every row is bitwise the same."""
    block = random_block(m)
    whole = by_name(apply(m, block))
    for first, last in ((0, 1), (1, 30), (30, 31), (31, 117), (117, 130)):
        start = max(0, first - m.lookback)
        for name, part in by_name(apply(m, select(block, slice(start, last)))).items():
            fresh = ColumnBlock(
                m.id,
                name,
                block.steps[first:last],
                part.modules,
                part.values[first - start :],
                part.has[first - start :],
            )
            assert_same(whole[name], fresh, slice(first, last))


@every_metric
def test_modules_do_not_mix(m: Metric):
    """Oracle: invariance. Permuted modules give permuted columns; a column of the whole run does not change."""
    block, order = random_block(m), [2, 0, 1]
    before, after = by_name(apply(m, block)), by_name(apply(m, select(block, modules=order)))
    for name, b in before.items():
        if b.modules == ("",):
            np.testing.assert_array_equal(b.has, after[name].has)
            # sums in another order: three float64 roundings
            np.testing.assert_allclose(after[name].values, b.values, rtol=1e-15)
        else:
            assert after[name].modules == tuple(block.modules[i] for i in order)
            moved = ColumnBlock(m.id, name, b.steps, b.modules, b.values[:, order], b.has[:, order])
            assert_same(moved, after[name])


def changed_by(
    m: Metric, stat: str, change: Callable[[Block, str], Block]
) -> tuple[list[ColumnBlock], list[ColumnBlock]]:
    full = {name: np.ones((130, 3), dtype=np.bool_) for name in stats_of(m)}
    block = random_block(m)
    block = copy(block, {n: np.where(block.has(n), block[n], 3.0) for n in block.names}, full)
    return apply(m, block), apply(m, change(block, stat))


@every_metric
def test_nan_stays_nan(m: Metric):
    """Oracle: planted fault. A NaN statistic makes the columns it enters NaN: recorded, and never 0 or absent."""

    def plant(block: Block, stat: str) -> Block:
        values = block[stat].copy()
        values[125, 1] = np.nan
        return copy(block, {stat: values})

    touched: set[str] = set()
    for stat in stats_of(m):
        for before, after in zip(*changed_by(m, stat, plant), strict=True):
            module = 1 if len(before.modules) > 1 else 0
            assert after.has[125, module]
            if after.values[125, module] != before.values[125, module]:
                assert np.isnan(after.values[125, module]), f"{m.id}.{before.column} hides a NaN of {stat}"
                touched.add(before.column)
    assert touched == {c.name for c in m.columns}


@every_metric
def test_absent_stays_absent(m: Metric):
    """Oracle: planted fault. A statistic not recorded makes the columns it enters absent at that step alone."""

    def remove(block: Block, stat: str) -> Block:
        has, values = block.has(stat).copy(), block[stat].copy()
        has[125], values[125] = False, np.nan
        return copy(block, {stat: values}, {stat: has})

    touched: set[str] = set()
    for stat in stats_of(m):
        for before, after in zip(*changed_by(m, stat, remove), strict=True):
            if after.has[125].any():  # this column does not depend on the statistic
                np.testing.assert_array_equal(after.values[125], before.values[125])
            else:
                touched.add(before.column)
            np.testing.assert_array_equal(after.has[:125], before.has[:125])
            np.testing.assert_array_equal(after.values[:125], before.values[:125])
    assert touched == {c.name for c in m.columns}


@pytest.mark.parametrize("m", [m for m in METRICS.values() if "n" in stats_of(m)], ids=lambda m: m.id)
def test_counting_nothing_gives_no_mean(m: Metric):
    """Oracle: closed form. A mean over 0 rows does not exist; only counts and hashes are left."""
    block = random_block(m)
    nothing = Block(block.steps, block.modules, {n: np.zeros((130, 3)) for n in block.names})
    for b in apply(m, nothing):
        counted = m.column(b.column).unit in ("count", "hash")
        assert b.has.all() if counted else not b.has.any(), b.ref


@pytest.mark.parametrize("m", [m for m in METRICS.values() if not m.derived], ids=lambda m: m.id)
def test_columns_come_out_of_recorded_rows(m: Metric):
    """Oracle: naive transcription. `evaluate` on a float32 row with absent statistics equals the formula on a block."""
    block = random_block(m, steps=3)
    names = stats_of(m)
    rows = np.full((3, 1 + 3 * len(names)), ABSENT, dtype=np.float32)
    for i, name in enumerate(names):
        at = rows[:, 1 + i :: len(names)]
        at[block.has(name)] = block[name][block.has(name)].astype(np.float32)
    layout = Layout(0, (Segment(m.reads, tuple(names), ("a", "b", "c"), 1),))
    single = copy(block, {n: block[n].astype(np.float32).astype(np.float64) for n in names})
    wanted, got = apply(m, single), evaluate(RawBlock(layout, block.steps, rows), [m])
    assert len(got) == len(wanted)
    for w, g in zip(wanted, got, strict=True):
        assert (g.ref, g.modules) == (w.ref, w.modules)
        assert_same(w, g)


NEW = '''
"""Largest element over norm: 1 if one element is everything.

    ratio = max |g| / norm

Healthy, unhealthy: nobody knows.

Source: definition.
"""

from monitor.metric import Case, Column, Metric, Plot


def compute(block):
    return {"ratio": block["max_abs"] / block["norm"]}


METRIC = Metric(
    id="peakedness",
    title="Peakedness",
    site="gradient",
    columns=(Column("ratio", "1", "largest element over norm"),),
    compute=compute,
    source="definition",
    cost="nothing",
    plot=Plot("ratio"),
    oracle=lambda: [Case({"max_abs": 4, "norm": 5}, {"ratio": 0.8}, "(3, 4)")],
    reads="gradient",
    doc=__doc__,
)
'''


def test_one_file_adds_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Oracle: planted fault. A file in another folder, and nothing else, is found, evaluated and explained."""
    (tmp_path / "peakedness.py").write_text(NEW)
    monkeypatch.setattr(monitor.metrics, "__path__", [*monitor.metrics.__path__, str(tmp_path)])
    try:
        found = load_metrics()
        assert set(found) == {*METRICS, "peakedness"}
        assert found["peakedness"].doc.startswith("Largest element")
        segment = Segment("gradient", ("norm", "max_abs"), ("a", "b"), 0)
        rows = np.array([[5, 4, 2, 2]], dtype=np.float32)
        raw = RawBlock(Layout(0, (segment,)), np.zeros(1, dtype=np.int64), rows)
        [block] = evaluate(raw, [found["peakedness"]])
        assert (block.ref, block.modules) == ("peakedness.ratio", ("a", "b"))
        np.testing.assert_array_equal(block.values, [[0.8, 1.0]])
    finally:
        sys.modules.pop("monitor.metrics.peakedness", None)
    monkeypatch.undo()
    assert "peakedness" not in load_metrics()


@pytest.mark.parametrize(
    ("change", "clause"),
    [
        (('id="peakedness"', 'id="other"'), "differs from the file name"),
        (("METRIC = ", "OTHER = "), "METRIC is NoneType"),
        (('"1"', '""'), "unit"),
        (('site="gradient"', 'site="nowhere"'), "site"),
        (('Plot("ratio")', 'Plot("rate")'), "plot"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], clause: str):
    """Oracle: planted fault. The message names the file and what is wrong with it."""
    (tmp_path / "peakedness.py").write_text(NEW.replace(*change))
    monkeypatch.setattr(monitor.metrics, "__path__", [*monitor.metrics.__path__, str(tmp_path)])
    try:
        with pytest.raises(MetricError, match=clause) as caught:
            load_metrics()
        assert "peakedness.py" in str(caught.value)
    finally:
        sys.modules.pop("monitor.metrics.peakedness", None)
