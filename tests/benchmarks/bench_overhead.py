"""What recording costs: two equal models stepped in turn, one recorded, the order swapped.

    python tests/benchmarks/bench_overhead.py [cnn] [gpt] [moe] [--pairs N] [--every N]

Per pair the CPU time of the whole process (training thread and writer thread) of the recorded step over that of the
plain one; the median over pairs is quoted, with its quartiles, from step `WARM` on. It says little of what is measured
at every tenth step only; "mean" does, the sum over these pairs, with more noise. In its first ten steps a run measures
everything at every step ("first 10"). "own" is what the run says of itself, to be compared with "all": the mean over
all pairs, first steps included. The A/A row, both plain, is the noise of each. The floor is what six statistics of
every tensor must read, 16 bytes a parameter, at the bandwidth measured in the same process. Losses of both models are
compared bit for bit. One thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.probe import Probe
from monitor.record.site import START
from monitor.record.sites.probe import DEFAULT

#: Pairs before those that are quoted: the cadences are the usual ones then, and what was made at first is there.
WARM = 25

Batch = Callable[[int], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, d)`` to the same."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))


class Experts(nn.Module):
    """Two of eight experts for each token."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(d, 8, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d)) for _ in range(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, d)`` to the same."""
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, place = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return out.view_as(x)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, d: int, heads: int, feed: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.feed = nn.LayerNorm(d), Attention(d, heads), nn.LayerNorm(d), feed

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, d)`` to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Language(nn.Module):
    """Decoder-only language model with an untied head."""

    def __init__(self, vocabulary: int, length: int, d: int, blocks: list[Block]) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, d), nn.Embedding(length, d)
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, token)`` int64 to ``(batch, token, vocabulary)``."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text(vocabulary: int, length: int, batch: int) -> Batch:
    """Zipf-distributed tokens, eight fixed batches."""
    g = torch.Generator().manual_seed(0)
    p = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float)
    rows = torch.multinomial(p, 8 * batch * (length + 1), replacement=True, generator=g).view(8, batch, length + 1)
    return lambda i: (rows[i % 8, :, :-1], rows[i % 8, :, 1:])


def cnn() -> tuple[nn.Module, Batch]:
    """0.37 M parameters in 12 tensors, 64 images of 32 x 32."""
    layers: list[nn.Module] = []
    for a, b, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(a, b, 3, stride, 1), nn.ReLU()]
    head = [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10)]
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 64, 1, 32, 32, generator=g), torch.randint(0, 10, (8, 64), generator=g)
    return nn.Sequential(*layers, *head), lambda i: (x[i % 8], y[i % 8])


def gpt() -> tuple[nn.Module, Batch]:
    """9 M parameters in 77 tensors, 2,048 tokens, vocabulary 8,192."""
    d = 256
    blocks = [Block(d, 8, nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))) for _ in range(6)]
    return Language(8192, 256, d, blocks), text(8192, 256, 8)


def moe() -> tuple[nn.Module, Batch]:
    """1.3 M parameters in 87 tensors, 1,024 tokens, two of eight experts."""
    return Language(512, 64, 128, [Block(128, 4, Experts(128, 256)) for _ in range(2)]), text(512, 64, 16)


WORKLOADS = {"cnn": (cnn, 100), "gpt": (gpt, 20), "moe": (moe, 100)}


class Training:
    """A model, its optimizer and its batches."""

    def __init__(self, build: Callable[[], tuple[nn.Module, Batch]]) -> None:
        torch.manual_seed(0)
        self.model, self.batch = build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step = 0

    def timed(self) -> tuple[float, float]:
        """CPU seconds of one step, and its loss."""
        begin = time.process_time()
        x, y = self.batch(self.step)
        self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        out = self.model(x)
        loss = F.cross_entropy(out.flatten(0, -2), y.flatten())
        loss.backward()
        self.optimizer.step()
        return time.process_time() - begin, loss.item()


def compare(name: str, pairs: int, every: int, record: bool) -> str:
    """One row: ratio, quartiles, what the run says of itself, floor."""
    build, default = WORKLOADS[name]
    plain, watched = Training(build), Training(build)
    pairs = pairs or default
    pair_of: list[tuple[float, float]] = []
    same = True
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "run"
        handle = monitor.attach(watched.model, where, every=every, probes=probes()) if record else None
        for i in range(WARM + pairs):
            first, second = (plain, watched) if i % 2 else (watched, plain)
            a, b = first.timed(), second.timed()
            p, w = (a, b) if i % 2 else (b, a)
            pair_of.append((p[0], w[0]))
            same &= w[1] == p[1]
        whole, mean = (sum(w for _, w in some) / sum(p for p, _ in some) - 1 for some in (pair_of, pair_of[WARM:]))
        said = f"mean {100 * mean:+.2f} %  all {100 * whole:+.2f} %  "
        if handle is not None:
            handle.close()
            # the run compares its cost with the time that remains without it, here that of two models
            own = 2 * monitor.open(where).info["overhead"]["fraction"]
            burst = statistics.median(w / p for p, w in pair_of[1:START]) - 1  # the first step makes what the rest uses
            said += f"own {100 * own:+.2f} %  first {START} {100 * burst:+.1f} %  "
    ratios, base = [w / p for p, w in pair_of[WARM:]], [p for p, _ in pair_of[WARM:]]
    low, middle, high = statistics.quantiles(ratios, n=4)
    n = sum(p.numel() for p in plain.model.parameters())
    floor = 16 * n / bandwidth() / statistics.median(base)
    label = f"{name} {'recorded' if record else 'A/A'}"
    return (
        f"{label:14} {1e3 * statistics.median(base):8.1f} ms  {100 * (middle - 1):+6.2f} %  [{100 * (low - 1):+.2f}, "
        f"{100 * (high - 1):+.2f}]  floor {100 * floor:.2f} %  {said}losses {'equal' if same else 'DIFFER'}"
    )


def probes() -> list[Probe]:
    """The probes that run by themselves, with half their share: the run's time is that of two models here."""
    found = [kind() for kind in DEFAULT]
    for probe in found:
        probe.share /= 2
    return found


def bandwidth() -> float:
    """Bytes per second of reading, one thread, from a norm over 64 MB."""
    x = torch.ones(1 << 24)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        torch.linalg.vector_norm(x)
        times.append(time.perf_counter() - begin)
    return 4 * x.numel() / min(times)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=list(WORKLOADS), metavar="name", help=", ".join(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="as of monitor.attach")
    a = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, every {a.every} steps")
    stderr = sys.stderr
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    for name in a.names:
        print(compare(name, a.pairs, a.every, record=False), flush=True)
        print(compare(name, a.pairs, a.every, record=True), flush=True)
    sys.stderr = stderr


if __name__ == "__main__":
    main()
