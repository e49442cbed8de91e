"""Real trainings with one planted fault each, recorded as a user records them, and healthy ones that look like it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.diagnosis.report import describe

STEPS = 240


def mlp(activation: type[nn.Module] = nn.ReLU, layers: int = 2) -> nn.Sequential:
    hidden = [m for _ in range(layers) for m in (nn.Linear(64, 64), activation())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


@dataclass
class Training:
    """A classifier of digits; each fault changes one part."""

    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    scale: float = 1.0
    clip: float | None = None
    rates: dict[int, float] = field(default_factory=dict)
    held_out: bool = False

    def recorded(self, folder: Path) -> monitor.Run:
        torch.manual_seed(0)
        images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
        images = images.float() / 16 * self.scale
        model = self.model()
        optimizer = self.optimizer(model)
        held_out = len(images) - 400 if self.held_out else len(images)
        with monitor.attach(model, folder) as handle:
            for step in range(STEPS):
                if self.held_out and step % 20 == 0:
                    with torch.no_grad():
                        handle.log(val_loss=self.loss(model(images[held_out:]), labels[held_out:]))
                for group in optimizer.param_groups:
                    group["lr"] *= self.rates.get(step, 1.0)
                rows = torch.randint(0, held_out, (64,))
                optimizer.zero_grad()
                self.loss(model(images[rows]), labels[rows]).backward()
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                optimizer.step()
        return monitor.open(folder)


def changed(model: nn.Module, change: Callable[[nn.Parameter], object], only: Iterable[str] = ()) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not only or name in only:
                change(p)
    return model


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """The first layer in a group of its own, whose learning rate is 0."""
    first, *others = model.children()
    rest = [p for m in others for p in m.parameters()]
    return torch.optim.Adam([{"params": first.parameters(), "lr": 0.0}, {"params": rest}], lr=1e-3)


class Detached(nn.Module):
    """Ends the gradient of its first layer by mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().detach())


def normalised() -> nn.Module:
    """A bias in front of a normalisation: its gradient is rounding noise, and its update is lost in rounding."""
    conv = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*conv, nn.Linear(288, 10))


def places(run: monitor.Run) -> set[tuple[str, str]]:
    return {(f.rule, f.module) for f in run.findings()}


GUESSING = ("no_better_than_guessing", "")
FAULTS = {
    "dead ReLU": (
        Training(model=lambda: changed(mlp(), lambda p: p.fill_(-10), ["2.bias"])),
        {
            GUESSING,
            ("dead_units", "3"),
            *(("parameter_at_rest", n) for n in ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight")),
        },
    ),
    "softmax twice": (
        Training(model=lambda: nn.Sequential(*mlp(), nn.Softmax(dim=1))),
        {("double_softmax", "cross_entropy")},
    ),
    "sign of the loss": (Training(loss=lambda z, y: -F.cross_entropy(z, y), rates={0: 100}), {GUESSING}),
    "a group at rate 0": (
        Training(optimizer=grouped),
        {("parameter_at_rest", "0.weight"), ("parameter_at_rest", "0.bias")},
    ),
    "detached": (
        Training(model=Detached),
        {("parameter_at_rest", "first.weight"), ("parameter_at_rest", "first.bias")},
    ),
}
SLOW_FAULTS = {
    "weights of 0": (Training(model=lambda: changed(mlp(), lambda p: p.zero_())), {GUESSING}),
    "ten sigmoids": (
        Training(lambda: mlp(nn.Sigmoid, 10), lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)),
        {GUESSING},
    ),
    "inputs of 0 to 255": (
        Training(optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), scale=255),
        {GUESSING},
    ),
    "clipped at 1e-4": (
        Training(optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), clip=1e-4),
        {GUESSING},
    ),
    "a rate of 1e-7": (Training(rates={0: 1e-4}), {GUESSING}),
    "a rate of 3": (Training(optimizer=lambda m: torch.optim.SGD(m.parameters(), 3.0, momentum=0.9)), {GUESSING}),
}


@pytest.mark.parametrize(("training", "expected"), FAULTS.values(), ids=list(FAULTS))
def test_fault(training: Training, expected: set[tuple[str, str]], tmp_path: Path) -> None:
    """Oracle: planted fault. A real training with it; every place that is named, and a sentence that is whole."""
    run = training.recorded(tmp_path / "run")
    assert expected <= places(run)
    assert {rule for rule, _ in places(run)} == {rule for rule, _ in expected}
    worst = run.verdict().incidents[0].head
    assert (worst.rule, worst.module) in expected
    assert all("{" not in describe(f) and not describe(f).startswith(f"{f.title}:") for f in run.findings())


@pytest.mark.slow
@pytest.mark.parametrize(("training", "expected"), SLOW_FAULTS.values(), ids=list(SLOW_FAULTS))
def test_nothing_is_learned(training: Training, expected: set[tuple[str, str]], tmp_path: Path) -> None:
    """Oracle: planted fault. Whatever keeps a classifier from learning, it is said that it does not learn."""
    assert expected <= places(training.recorded(tmp_path / "run"))


def test_a_learning_rate_times_100_is_named(tmp_path: Path) -> None:
    """Oracle: planted fault. Raised at step 150: loss or gradients jump at 151, and the head says what it followed."""
    run = Training(rates={150: 100.0}).recorded(tmp_path / "run")
    head = run.verdict().incidents[0].head
    assert head.rule in ("loss_spike", "gradient_spike") and head.first_step == 151
    assert "earning rate factor 100" in describe(head)
    assert ", after the learning rate had been raised 100-fold" in run.verdict().text


@pytest.mark.parametrize(
    ("training", "judged"),
    [
        (Training(held_out=True), {"no_better_than_guessing", "double_softmax", "parameter_at_rest", "hyperfitting"}),
        (
            Training(model=normalised, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9)),
            {"parameter_at_rest"},
        ),
        (Training(model=normalised), {"parameter_at_rest", "update_throttled_by_eps"}),
    ],
    ids=["mlp", "bias in front of a normalisation, SGD", "bias in front of a normalisation, Adam"],
)
def test_healthy(training: Training, judged: set[str], tmp_path: Path) -> None:
    """Oracle: planted fault, absent. The same trainings without a fault; the rules had what they needed to judge."""
    run = training.recorded(tmp_path / "run")
    assert places(run) == set()
    assert judged.isdisjoint(run.verdict().unjudged)
