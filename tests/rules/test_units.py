"""Real trainings whose signal does not get through, and why; and healthy ones that look like them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.diagnosis.report import describe

RULES = ("dead_units", "saturated_units", "vanishing_gradients")


def mlp(activation: type[nn.Module], layers: int, width: int = 64, out: int = 10) -> nn.Sequential:
    hidden = [m for i in range(layers) for m in (nn.Linear(width if i else 64, width), activation())]
    return nn.Sequential(*hidden, nn.Linear(width, out))


def biased() -> nn.Module:
    model = mlp(nn.ReLU, 2)
    with torch.no_grad():
        model.get_parameter("2.bias").fill_(-10)
    return model


def sparse() -> nn.Module:
    """An autoencoder of many units that fire rarely."""
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))


def plain_convolutions() -> nn.Module:
    layers = [m for i in range(30) for m in (nn.Conv2d(8 if i else 1, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(512, 10))


def adam(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.Adam(model.parameters(), lr=lr)


def sgd(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


ADAM = adam(1e-3)


@dataclass
class Training:
    """On digits; each fault changes one part."""

    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = ADAM
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda z, x, y: F.cross_entropy(z, y)
    scale: float = 1.0
    steps: int = 110

    def recorded(self, folder: Path) -> monitor.Run:
        torch.manual_seed(0)
        images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
        images = images.float() / 16 * self.scale
        model = self.model()
        optimizer = self.optimizer(model)
        with monitor.attach(model, folder):
            for _ in range(self.steps):
                rows = torch.randint(0, len(images), (64,))
                optimizer.zero_grad()
                self.loss(model(images[rows]), images[rows], labels[rows]).backward()
                optimizer.step()
        return monitor.open(folder)


def sure(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(z[:, 0], (y == 0).float())


def autoencoded(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, x)


FAULTS = {
    "a bias of -10": (Training(biased, steps=240), "dead_units", "3", 0),
    "ReLU at a rate of 3": (Training(lambda: mlp(nn.ReLU, 2), sgd(3.0), steps=240), "dead_units", "1", 10),
    "inputs of 0 to 255 into tanh": (Training(lambda: mlp(nn.Tanh, 2), scale=255), "saturated_units", "1", 0),
    "ten sigmoids": (Training(lambda: mlp(nn.Sigmoid, 10), steps=240), "vanishing_gradients", "0.weight", 0),
}
SLOW_FAULTS = {
    "ReLU with Adam at 1": (Training(lambda: mlp(nn.ReLU, 2), adam(1.0)), "dead_units", "1", 10),
    "tanh with Adam at 0.1": (Training(lambda: mlp(nn.Tanh, 3), adam(0.1)), "saturated_units", "1", 10),
    "twenty sigmoids": (
        Training(lambda: mlp(nn.Sigmoid, 20), sgd(0.1), steps=300),
        "vanishing_gradients",
        "0.weight",
        0,
    ),
    "thirty tanh": (Training(lambda: mlp(nn.Tanh, 30), sgd(0.1), steps=300), "vanishing_gradients", "0.weight", 0),
    "thirty convolutions": (Training(plain_convolutions, steps=130), "vanishing_gradients", "1.weight", 0),
}
HEALTHY = {
    "ReLU": Training(lambda: mlp(nn.ReLU, 3), sgd(0.1)),
    "wide, at ten times the rate": Training(lambda: mlp(nn.ReLU, 2, 512), adam(1e-2)),
    "a sparse autoencoder": Training(sparse, loss=autoencoded),
    "a binary classifier that is sure": Training(
        lambda: nn.Sequential(mlp(nn.Tanh, 2, out=1), nn.Sigmoid()), adam(3e-3), sure, steps=310
    ),
    "sigmoids": Training(lambda: mlp(nn.Sigmoid, 3), adam(3e-3)),
}


@pytest.mark.parametrize(("training", "rule", "module", "first"), FAULTS.values(), ids=list(FAULTS))
def test_fault(training: Training, rule: str, module: str, first: int, tmp_path: Path) -> None:
    """Oracle: planted fault. The rule for it and neither of the others; what else is found follows from it."""
    run = training.recorded(tmp_path / "run")
    found = [f for f in run.findings() if f.rule in RULES]
    assert {f.rule for f in found} == {rule}
    assert (found[0].module, found[0].first_step) == (module, first)
    assert "nan" not in describe(found[0]) and "{" not in describe(found[0])
    (incident,) = (i for i in run.verdict().incidents if i.severity != "info")
    # of a rate of 3 the first updates say so before anything has died
    assert incident.head == found[0] or incident.head.rule == "learning_rate_too_large"
    rest = {f.rule for f in incident.findings} - {rule}
    if training.steps >= 240:  # as much as it takes to see that nothing is learned
        assert "no_better_than_guessing" in rest
    if module == "3":  # nothing is left that could move
        assert "parameter_at_rest" in rest


@pytest.mark.slow
@pytest.mark.parametrize(("training", "rule", "module", "first"), SLOW_FAULTS.values(), ids=list(SLOW_FAULTS))
def test_other_faults(training: Training, rule: str, module: str, first: int, tmp_path: Path) -> None:
    """Oracle: planted fault. Others of the three may follow; this one is found first."""
    found = [f for f in training.recorded(tmp_path / "run").findings() if f.rule in RULES]
    assert (found[0].rule, found[0].module, found[0].first_step) == (rule, module, first)


@pytest.mark.parametrize("training", HEALTHY.values(), ids=list(HEALTHY))
def test_healthy(training: Training, tmp_path: Path) -> None:
    """Oracle: planted fault, absent. The rules had what they needed to judge, and found nothing."""
    run = training.recorded(tmp_path / "run")
    assert [f for f in run.findings() if f.rule in RULES] == []
    metrics = run.metrics()
    judged = {"dead_units"} | ({"saturated_units"} if "saturation" in metrics else set())
    assert judged.isdisjoint(run.verdict().unjudged)
