"""What evaluating all metrics costs: `python tests/benchmarks/bench_metrics.py`.

A model of 90 parameters, blocks of 50 steps, every pass recorded at every step (distances every tenth). Prints the CPU
time of the writer thread per step and per value, part by part, and of the rolling robust baselines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from monitor.block import ABSENT, Layout, RawBlock, Segment, apply, evaluate
from monitor.metric import Block, load_metrics
from monitor.robust import WINDOW, robust_z

STEPS, PARAMETERS, REPEATS = 50, 90, 200

parameters = tuple(f"blocks.{i // 12}.layer{i % 12}.weight" for i in range(PARAMETERS))
MODULES = {
    "gradient": parameters,
    "update": parameters,
    "distance": parameters,
    "input": ("input[0]",),
    "logit_rows": ("cross_entropy",),
    "loss_rows": ("cross_entropy",),
    "learning_rate": ("group[0]",),
    "logged": ("val_loss",),
}


def cpu_us(work: Callable[[], object]) -> tuple[float, float]:
    """Median and 90 % quantile of the CPU time of a call, in microseconds."""
    taken = []
    for _ in range(REPEATS):
        start = time.process_time_ns()
        work()
        taken.append((time.process_time_ns() - start) / 1e3)
    return statistics.median(taken), statistics.quantiles(taken, n=10)[-1]


def record() -> RawBlock:
    """Rows of every pass that a metric reads, filled with random numbers."""
    rng = np.random.default_rng(0)
    stats: dict[str, list[str]] = {}
    for m in load_metrics().values():
        for case in () if m.derived else m.oracle():
            stats[m.reads] = sorted({*stats.get(m.reads, ()), *case.stats})
    segments, offset = [], 0
    for reads, names in stats.items():
        segments.append(Segment(reads, tuple(names), MODULES.get(reads, ("",)), offset))
        offset += segments[-1].size
    rows = rng.lognormal(size=(STEPS, offset)).astype(np.float32)
    for s in segments:
        if s.reads == "distance":
            rows[np.arange(STEPS) % 10 != 0, s.offset : s.offset + s.size] = ABSENT
    return RawBlock(Layout(0, tuple(segments)), np.arange(STEPS, dtype=np.int64), rows)


def main() -> None:
    """Print the table."""
    metrics = load_metrics()
    raw = record()
    values = sum(int(b.has.sum()) for b in evaluate(raw, metrics.values()))
    print(
        f"{PARAMETERS} parameters, {STEPS} steps, {raw.layout.size} statistics and {values / STEPS:.0f} values a step"
    )
    print(f"{'':34}{'µs a step':>12}{'p90':>8}{'ns a value':>12}")

    def line(name: str, per_block: tuple[float, float], count: int) -> None:
        median, p90 = (t / STEPS for t in per_block)
        print(f"{name:34}{median:12.2f}{p90:8.2f}{median * STEPS * 1e3 / max(count, 1):12.1f}")

    line("evaluate, all metrics", cpu_us(lambda: evaluate(raw, metrics.values())), values)
    for m in metrics.values():
        if not m.derived:
            count = sum(int(b.has.sum()) for b in evaluate(raw, [m]))
            line(f"  {m.id} alone", cpu_us(lambda m=m: evaluate(raw, [m])), count)

    x = np.random.default_rng(0).lognormal(size=(STEPS + WINDOW, PARAMETERS))
    has = np.ones(x.shape, dtype=np.bool_)
    line("robust_z, fresh steps only", cpu_us(lambda: robust_z(x, has, first=WINDOW)), STEPS * PARAMETERS)
    block = Block(np.arange(len(x), dtype=np.int64), parameters, {"grad_norm.norm": x})
    line("grad_norm_z, with its lookback", cpu_us(lambda: apply(metrics["grad_norm_z"], block)), STEPS * PARAMETERS)
    block = Block(np.arange(len(x), dtype=np.int64), ("",), {"loss.value": x[:, :1].copy()})
    line("loss_z, with its lookback", cpu_us(lambda: apply(metrics["loss_z"], block)), STEPS)


if __name__ == "__main__":
    main()
