"""What the measurements of attention cost on the GPT of bench_overhead.py, fused and written by hand.

    python tests/benchmarks/bench_attention.py [--steps N]

CPU time inside the watchers of attention calls, by what is due in a step, over the CPU time of a step; then the share
of a run at the default cadences (the bound every 5 steps, rows every 10, all rows every 100). One thread. Writing the
numbers into the row is not in it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import monitor
from monitor.record.site import START
from monitor.record.sites import attention

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.benchmarks.bench_overhead import Attention, Training, gpt


class Written(Attention):
    """The same attention by hand."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, d)`` to the same."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        s = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).masked_fill(
            torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf")
        )
        return self.out((s.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))


def by_hand() -> tuple[nn.Module, Any]:
    """The GPT with attention written by hand."""
    model, batch = gpt()
    for module in model.modules():
        if type(module) is Attention:
            module.__class__ = Written
    return model, batch


def measure(build: Any, steps: int) -> dict[str, float]:
    """Seconds of a step, and seconds in the watchers by kind of step."""
    training = Training(build)
    spent, inside = [0.0], [False]

    def timed(watcher: Any) -> Any:
        def call(*given: Any) -> None:
            begin = time.process_time()
            watcher(*given)
            spent[0] += time.process_time() - begin

        return call

    def wrap(*_: Any) -> None:
        if not inside[0]:
            inside[0] = True
            (mode,) = _get_current_function_mode_stack()
            watchers: dict[Any, Any] = mode.after  # pyright: ignore[reportAttributeAccessIssue]
            for func in (nn.functional.scaled_dot_product_attention, *attention._SOFTMAX, *attention._PRODUCTS):
                watchers[func] = timed(watchers[func])

    next(training.model.children()).register_forward_pre_hook(wrap)
    took: dict[str, list[float]] = {}
    attention.ALL_EVERY = 20  # so that not many steps are needed
    kinds = (("all", attention.ALL_EVERY), ("rows", attention.EVERY), ("bound", attention.BOUND_EVERY))
    with tempfile.TemporaryDirectory() as folder, monitor.attach(training.model, Path(folder) / "run"):
        for step in range(steps):
            spent[0] = 0.0
            whole, _ = training.timed()
            if step >= START:
                took.setdefault("step", []).append(whole)
                kind = next((kind for kind, every in kinds if step % every == 0), "nothing")
                took.setdefault(kind, []).append(spent[0])
    return {kind: statistics.median(values) for kind, values in took.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=41)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    stderr, sys.stderr = sys.stderr, open(os.devnull, "w")  # noqa: PTH123, SIM115
    for name, build in (("fused", gpt), ("by hand", by_hand)):
        t = measure(build, steps)
        share = {kind: 100 * t[kind] / t["step"] for kind in ("nothing", "bound", "rows", "all")}
        bound = share["bound"] / attention.BOUND_EVERY
        total = share["nothing"] * 0.8 + share["bound"] * 0.1 + share["rows"] * 0.09 + share["all"] * 0.01
        print(
            f"{name:8} {1e3 * t['step']:7.1f} ms a step; when due: "
            + ", ".join(f"{kind} {percent:.2f} %" for kind, percent in share.items())
            + f"; averaged: bound {bound:.3f} %, everything {total:.3f} %",
            flush=True,
        )
    sys.stderr = stderr


if __name__ == "__main__":
    main()
