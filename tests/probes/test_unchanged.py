"""Probes that run the model leave no trace in any kind of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.probes import Curvature, JacobianSpectrum, TrajectoryKL
from tests.record import trainings
from tests.record.trainings import Digest, Watch

QUICK = ("plain", "accumulation", "scaler", "two_optimizers")
#: Trainings of which a probe cannot be measured, and what is said about them.
REFUSED = {
    ("checkpointing_reentrant", "jacobian_spectrum"): "use_reentrant",
    ("two_optimizers", "jacobian_spectrum"): "pass loss=",
    ("two_optimizers", "trajectory_kl"): "pass inputs=",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "training",
    [pytest.param(t, marks=() if t.__name__ in QUICK else pytest.mark.slow, id=t.__name__) for t in trainings.ALL],
)
def test_bitwise_equal(training: Callable[[Watch], str], tmp_path: Path) -> None:
    """Oracle: invariance. Hash of parameters, optimizer state, losses, buffers and all random generators."""
    control = training(lambda _: None)
    handles: list[monitor.Handle] = []
    probes = [TrajectoryKL(every=2), JacobianSpectrum(rows=8, every=3)]
    assert training(lambda m: handles.append(monitor.attach(m, tmp_path / "run", probes=probes))) == control
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    absent = {a["what"]: a["why"] for a in run.info["absent"]}
    for probe, column in ((probes[0], "kl"), (probes[1], "rank")):
        why = REFUSED.get((training.__name__, probe.name))
        if why is None:
            assert len(run.series(f"{probe.name}.{column}")[0]) >= 2
        else:
            assert why in absent[probe.name]


class _Noisy(nn.Module):
    """Noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.generator = nn.Linear(12, 5), torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + 0.1 * torch.randn(x.shape, generator=self.generator))


def _drawing(model: nn.Module, watch: Watch) -> str:
    g, digest = torch.Generator().manual_seed(1), Digest()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    watch(model)
    for _ in range(7):
        opt.zero_grad()
        z = model(torch.randn(8, 12, generator=g))
        loss = F.cross_entropy(z, torch.randint(0, 5, (8,), generator=g))
        loss.backward()
        opt.step()
        digest.add((loss, g.get_state()))
    return digest.finish(model, opt)


@pytest.mark.parametrize("inside", [False, True])
def test_generators_of_the_users_own(inside: bool, tmp_path: Path) -> None:
    """Oracle: invariance. Labels drawn after the model was called; noise inside it, which cannot be had again."""

    def train(watch: Watch) -> str:
        torch.manual_seed(0)
        return _drawing(_Noisy() if inside else nn.Linear(12, 5), watch)

    control = train(lambda _: None)
    handles: list[monitor.Handle] = []
    probes = [TrajectoryKL(every=2), Curvature(every=3)]
    assert train(lambda m: handles.append(monitor.attach(m, tmp_path / "run", probes=probes))) == control
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    assert len(run.series("trajectory_kl.kl")[0]) == 3
    assert len(run.modules("sharpness.value")) == (not inside)


class _Unseen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def test_what_was_not_seen_is_not_taken_for_data(tmp_path: Path) -> None:
    """Oracle: planted fault. A function between model and loss: played again without it, scores would never change."""
    torch.manual_seed(0)
    model = nn.Linear(12, 5)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    with monitor.attach(model, tmp_path / "run", probes=[TrajectoryKL(every=2), Curvature(every=1)]):
        for _ in range(6):
            opt.zero_grad()
            F.cross_entropy(
                cast("Tensor", _Unseen.apply(model(torch.randn(8, 12)))), torch.randint(0, 5, (8,))
            ).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    absent = {a["what"]: a["why"] for a in run.info["absent"]}
    assert "a torch.autograd.Function" in absent["trajectory_kl"]
    assert "the loss does not depend on the selected parameters" in absent["curvature"]
    assert not run.modules("trajectory_kl.kl") and not run.modules("sharpness.value")
