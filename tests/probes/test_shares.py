"""Probes stay inside their share of the time, and leave no memory behind, in real trainings."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.curvature import Hessian, LossClosure
from monitor.probes import Curvature, JacobianSpectrum, TrajectoryKL
from monitor.record.probe import Moment, Probe

#: The rule looks ahead by what the last measurement took, so only a slower one than the last can exceed the share.
SLACK = 1.5


class Slow(nn.Module):
    """Steps whose time hardly depends on what else this machine does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(2e-3)
        return self.layers(x)


def train(probe: Probe, folder: Path, steps: int) -> monitor.Run:
    """Record it."""
    torch.manual_seed(0)
    model = Slow()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(16, 12), torch.randint(0, 5, (16,))
    with monitor.attach(model, folder, probes=[probe]):
        for _ in range(steps):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    return monitor.open(folder)


@pytest.mark.parametrize(
    ("probe", "ref"),
    [
        (Curvature(budget=0.2), "batch_sharpness.value"),
        (TrajectoryKL(), "trajectory_kl.kl"),
        (JacobianSpectrum(rows=8), "jacobian_spectrum.rank"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_share_of_the_time_is_kept(probe: Probe, ref: str, tmp_path: Path) -> None:
    """Oracle: the run's own clock. Measured again and again without `every`, all in all for its share of the time."""
    train(Curvature(every=1, full=1), tmp_path / "first", 3)  # what is imported at first use counts for nobody
    if not isinstance(probe, Curvature):
        probe.share = 0.2  # so that a short training has room for several
    run = train(probe, tmp_path / "run", 500)
    assert len(run.series(ref)[0]) >= 2
    assert 0.02 < run.info["overhead"]["probes"] <= SLACK * 0.2


class _Info(ctypes.Structure):
    """What glibc's mallinfo2 answers."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    )


def _in_use() -> Callable[[], int] | None:
    """Bytes that this process has asked for and not given back: of tensors, graphs and everything else."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return None
    ask.restype = _Info

    def now() -> int:
        info = ask()
        return info.uordblks + info.hblkhd

    return now


def _deep() -> nn.Sequential:
    hidden = [f for _ in range(6) for f in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(64, 5))


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(1000, 64), torch.randint(0, 5, (1000,))


class _Keeps(Probe):
    """Holds on to the graph of its Hessian."""

    name = "keeps"
    every = 1

    def measure(self, moment: Moment) -> None:
        self.hessian = Hessian(LossClosure(moment.model, F.cross_entropy, _batch()), way="cached")
        self.hessian(torch.ones(self.hessian.n))


def _grown(probe: Probe | None, folder: Path, now: Callable[[], int], steps: int = 3) -> int:
    """Bytes more in use, as one of the updates after the first begins, than before the recording."""
    torch.manual_seed(0)
    model, (x, y) = _deep(), _batch()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen: list[int] = []
    gc.collect()
    before = now()
    with monitor.attach(model, folder, probes=[probe] if probe else []):
        opt.register_step_pre_hook(lambda *_: seen.append(now()))  # runs after the measurement
        for _ in range(steps):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    assert not monitor.open(folder).warnings
    return min(seen[1:], default=before) - before


@pytest.mark.skipif(_in_use() is None, reason="needs mallinfo2 of glibc")
def test_memory_is_given_back_before_the_update(tmp_path: Path) -> None:
    """Oracle: planted fault and invariance. Bytes in use as the update begins, beyond those of a run without probes.

    A full measurement holds 40 vectors of 25,000 numbers and a graph of some 5 MB; what stays is the start vector of
    the next. A probe that keeps its graph is seen.
    """
    now = _in_use()
    assert now is not None
    probes = [Curvature(every=1, full=1), JacobianSpectrum(every=1), TrajectoryKL(every=1)]
    for i, probe in enumerate((probes[0], None)):  # what is imported at first use counts for nobody
        _grown(probe, tmp_path / f"first{i}", now, steps=1)
    none = _grown(None, tmp_path / "none", now)
    more = {probe.name: _grown(probe, tmp_path / probe.name, now) - none for probe in probes}
    assert _grown(_Keeps(), tmp_path / "keeps", now) - none > 3e6
    assert all(value < 5e5 for value in more.values()), more
