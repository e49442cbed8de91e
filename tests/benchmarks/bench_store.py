"""What storing costs, and what reading costs, as ratios: ``python tests/benchmarks/bench_store.py [steps] [series]``.

Writes one run of synthetic norms (300 series by default), then reads it in fresh processes, whose CPU time includes
the imports. Ratios are printed, not asserted: absolute times belong to the machine.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from monitor.block import ColumnBlock, Layout, Segment
from monitor.store.writer import RunWriter

READERS = {
    "imports alone": "import numpy, pyarrow, pyarrow.parquet",
    "open + summary": "from monitor.store.run import open_run; assert len(open_run({path!r}).summary()) == {series}",
    "open + one curve": "from monitor.store.run import open_run; assert len(open_run({path!r}).series('a.v', 'm7')[0])",
    "open + heat map of all": "from monitor.store.run import open_run; open_run({path!r}).block('a.v')",
    "duckdb, the same summary": (
        'import duckdb; duckdb.sql("select series, count(*), min(value), max(value), avg(value), last(value), '
        "quantile_cont(value, 0.5) from '{path}/rank0/series/*.parquet' group by series\").fetchall()"
    ),
}


def cpu(code: str) -> float:
    """CPU seconds of a fresh Python process running ``code``, the best of three."""
    program = f"{code}\nimport resource; r = resource.getrusage(resource.RUSAGE_SELF); print(r.ru_utime + r.ru_stime)"
    return min(
        float(
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()[
                -1
            ]
        )
        for _ in range(3)
    )


def main(steps: int = 20_000, series: int = 300) -> None:
    rng = np.random.default_rng(0)
    modules = tuple(f"m{i}" for i in range(series))
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter.create(Path(folder) / "run", script="bench_store.py")
        # norms: positive, of very different sizes, drifting slowly under noise
        level, scale = np.exp(rng.standard_normal(series) * 3), np.exp(rng.standard_normal(series) * 0.5 - 3)
        spent = 0.0
        for first in range(0, steps, 50):
            at = np.arange(first, min(first + 50, steps))
            drift = 1 + 0.5 * np.sin(at[:, None] / (1000 + np.arange(series)))
            values = level * drift * np.exp(scale * rng.standard_normal((len(at), series)))
            block = ColumnBlock("a", "v", at, modules, values, np.ones(values.shape, dtype=np.bool_))
            start = time.process_time()
            writer.append([block])
            writer.flush()
            spent += time.process_time() - start
        start = time.process_time()
        writer.close("finished")
        closing = time.process_time() - start
        parts = list((writer.path / "rank0/series").iterdir())
        bytes_of = {
            room: sum(f.stat().st_size for f in (writer.path / "rank0" / room).iterdir())
            for room in ("series", "summary")
        }
        rows = steps * series
        print(f"{rows:,} values in {len(parts)} parts: {bytes_of['series'] / rows:.2f} bytes a value")
        print(f"summaries: {bytes_of['summary'] / bytes_of['series']:.1%} of that")
        print(f"writing: {spent / steps * 1e6:.0f} µs of CPU a step, closing {closing / (spent + closing):.0%} more")
        print(f"one frame of the tail: {_frame(writer, series):.1f} times a bare os.write of the same bytes")
        seconds = {name: cpu(code.format(path=str(writer.path), series=series)) for name, code in READERS.items()}
        base = seconds["imports alone"]
        for name in READERS:
            print(f"{name:26} {seconds[name]:6.2f} s of CPU, {seconds[name] / base:5.2f} times the imports")


def _frame(writer: RunWriter, series: int, n: int = 5000) -> float:
    """CPU of a tail row over that of a bare write of as many bytes."""
    payload = np.zeros(series, dtype=np.float32).tobytes()
    tail = RunWriter.create(writer.path.with_name("tail"), script="").tail
    tail.layout(Layout(0, (Segment("a", ("v",), tuple(f"m{i}" for i in range(series)), 0),)))
    start = time.process_time()
    for step in range(n):
        tail.row(step, 0, payload)
    framed = time.process_time() - start
    fd = os.open(writer.path.with_name("bare"), os.O_WRONLY | os.O_CREAT)
    frame = struct.pack("25x") + payload
    start = time.process_time()
    for _ in range(n):
        os.write(fd, frame)
    bare = time.process_time() - start
    os.close(fd)
    tail.close()
    return framed / bare


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
