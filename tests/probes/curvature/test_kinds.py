"""Losses as people write them: towers and temperatures, several losses of one forward, clipping by value, autocast."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.probes.curvature import Curvature
from tests.probes.curvature.runs import absent, column, dense
from tests.record import trainings

Loss = Callable[[dict[str, Tensor]], Tensor]


def sharpness(model: nn.Module, loss: Loss) -> float:
    """The largest eigenvalue of the dense Hessian in float64; ``loss`` is given the parameters by their names."""
    held = {name: p.detach() for name, p in model.named_parameters()}
    flat = torch.cat([p.reshape(-1) for p in held.values()])

    def at(v: Tensor) -> Tensor:
        parts = v.split([p.numel() for p in held.values()])
        return loss({k: part.view(p.shape) for (k, p), part in zip(held.items(), parts, strict=True)})

    return float(np.linalg.eigvalsh(dense(at, flat))[-1])


def agreement(u: Tensor, v: Tensor, log_scale: Tensor) -> Tensor:
    """The loss of CLIP: each picture's text among those of the batch, and the other way round."""
    z = log_scale.exp() * F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).T
    own = torch.arange(len(z))
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def test_two_towers_and_a_temperature(tmp_path: Path) -> None:
    """Oracle: dense float64 reference. A parameter without a dimension, and a container that nobody can call.

    From the first step on: the loss too, and the gradient.
    """
    trainings.seed()
    model = nn.ParameterDict({"log_scale": nn.Parameter(torch.tensor(2.0))})
    towers = nn.ModuleDict({"image": nn.Linear(6, 4), "text": nn.Linear(5, 4), "rest": model})
    opt = torch.optim.SGD(towers.parameters(), lr=0.01)
    wanted: list[float] = []
    losses: list[float] = []
    with monitor.attach(towers, tmp_path / "run", curvature=Curvature(every=2, full=2)):
        for _ in range(5):
            x, y = torch.randn(8, 6), torch.randn(8, 5)

            def at(p: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
                u = F.linear(x.double(), p["image.weight"], p["image.bias"])
                v = F.linear(y.double(), p["text.weight"], p["text.bias"])
                return agreement(u, v, p["rest.log_scale"])

            wanted.append(sharpness(towers, at))
            opt.zero_grad()
            loss = agreement(towers["image"](x), towers["text"](y), model["log_scale"])
            loss.backward()
            losses.append(loss.item())
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert run.series("sharpness.value")[0].tolist() == [0, 2, 4]
    assert column(run, "sharpness.value") == pytest.approx(wanted[::2], rel=1e-4)
    assert set(column(run, "sharpness.parameters")) == {28 + 24 + 1}
    assert column(run, "loss.value") == pytest.approx(losses)
    assert not run.warnings


class Heads(nn.Module):
    """Two answers of one body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(12, 8), nn.Linear(8, 5), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.body(x))
        return self.kind(z), self.size(z)


def added(a: Tensor, b: Tensor) -> None:
    """One call for the sum."""
    (a + b).backward()


def in_turn(a: Tensor, b: Tensor) -> None:
    """A call for each."""
    a.backward(retain_graph=True)
    b.backward()


def together(a: Tensor, b: Tensor) -> None:
    """One call for both."""
    torch.autograd.backward([a, b])


def weighted(a: Tensor, b: Tensor) -> None:
    """One call for both, with gradients of its own."""
    torch.autograd.backward((a, 2 * b), (torch.ones(()), torch.tensor(0.5)))


def test_several_losses_of_one_forward(tmp_path: Path) -> None:
    """Oracle: invariance. However backward is called on two losses, it is the sum that is trained on."""
    found = []
    for backward in (added, in_turn, together, weighted):
        trainings.seed()
        model = Heads()
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        folder = tmp_path / backward.__name__
        with monitor.attach(model, folder, curvature=Curvature(every=2, full=2)):
            for x, y in trainings.batches(5):
                opt.zero_grad()
                kind, size = model(x)
                backward(F.cross_entropy(kind, y), 0.3 * F.mse_loss(size, x[:, :1]))
                opt.step()
        run = monitor.open(folder)
        assert column(run, "sharpness.examples") == [16] * 3
        found.append(column(run, "sharpness.value"))
        assert not run.warnings
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(("limit", "noise", "measured"), [(0.05, 0.0, True), (0.05, 0.02, False), (1e-4, 0.0, False)])
def test_clipped_by_value(limit: float, noise: float, measured: bool, tmp_path: Path) -> None:
    """Oracle: dense float64 reference; planted faults: another gradient below the limit, or too little left of it."""
    trainings.seed()
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    wanted: list[float] = []
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=1, full=9)):
        for x, y in trainings.batches(4):

            def at(p: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
                z = torch.tanh(F.linear(x.double(), p["0.weight"], p["0.bias"]))
                return F.cross_entropy(F.linear(z, p["2.weight"], p["2.bias"]), y)

            wanted.append(sharpness(model, at))
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.add_(noise * torch.randn_like(p.grad))
            before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).abs().max()
            assert before > limit
            nn.utils.clip_grad_value_(model.parameters(), limit)
            opt.step()
    run = monitor.open(tmp_path / "run")
    if measured:
        assert column(run, "sharpness.value") == pytest.approx(wanted, rel=1e-4)
    else:
        assert "sharpness.value" not in run.refs()
        assert "cosine" in absent(run)["curvature"]


class ByHand(nn.Sequential):
    """Turns autocast on inside its forward, as scripts for one device do."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Narrowed(ByHand):
    """Needs the autocast: what it hands on is in 16 bits already."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.bfloat16())


def decorated(model: nn.Module) -> tuple[nn.Module, Any]:
    """As Accelerate does it."""
    cast = torch.autocast("cpu", torch.bfloat16)
    model.forward = types.MethodType(cast(type(model).forward), model)
    return model, Tensor.backward


def by_hand(model: nn.Module) -> tuple[nn.Module, Any]:
    """Inside the forward."""
    return model, Tensor.backward


def by_fabric(model: nn.Module) -> tuple[nn.Module, Any]:
    """Around the call of the model inside, whose answer is widened."""
    lightning = pytest.importorskip("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    return fabric.setup_module(model), fabric.backward


@pytest.mark.parametrize("cast", [decorated, by_hand, by_fabric])
def test_forwards_that_turn_autocast_on(cast: Callable[[nn.Module], tuple[nn.Module, Any]], tmp_path: Path) -> None:
    """Oracle: dense float64 reference, and invariance. Checked as it ran, measured without.

    A Hessian of 16 bits is not symmetric, and no eigenvalue of it converges. Played again without autocast, or without
    what the wrapper does to the answer, the gradient is too far from the run's in some of the steps.
    """

    def train(folder: Path | None) -> tuple[str, list[float]]:
        trainings.seed()
        kind = ByHand if cast is by_hand else nn.Sequential
        inside, digest = kind(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5)), trainings.Digest()
        model, backward = cast(inside)
        opt = torch.optim.AdamW(inside.parameters(), lr=1e-2)
        wanted: list[float] = []
        handle: Any = None if folder is None else monitor.attach(model, folder, curvature=Curvature(every=1, full=9))
        for x, y in trainings.batches(6):

            def at(p: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
                z = torch.tanh(F.linear(x.double(), p["0.weight"], p["0.bias"]))
                return F.cross_entropy(F.linear(z, p["2.weight"], p["2.bias"]), y)

            wanted.append(sharpness(inside, at))
            opt.zero_grad()
            out = model(x)
            assert out.dtype == (torch.float32 if cast is by_fabric else torch.bfloat16)
            loss = F.cross_entropy(out.float(), y)
            backward(loss)
            opt.step()
            digest.add(loss)
        if handle is not None:
            handle.close()
        return digest.finish(inside, opt), wanted

    cast(nn.Sequential(nn.Linear(1, 1)))  # what it imports may draw random numbers
    control, wanted = train(None)
    assert train(tmp_path / "run") == (control, wanted)
    run = monitor.open(tmp_path / "run")
    assert column(run, "sharpness.converged") == [1] * 6
    assert column(run, "sharpness.value") == pytest.approx(wanted, rel=1e-3)
    assert not run.warnings


def test_a_forward_that_needs_autocast(tmp_path: Path) -> None:
    """Oracle: golden. What cannot be computed without is not measured, and one line says so."""
    trainings.seed()
    model = Narrowed(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5))
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=1)):
        for x, y in trainings.batches(3):
            opt.zero_grad()
            F.cross_entropy(model(x).float(), y).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert "sharpness.value" not in run.refs()
    assert "without autocast" in absent(run)["curvature"]
    assert "\n" not in absent(run)["curvature"]
