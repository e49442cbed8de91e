"""Real trainings with a mistake in the loop, the loss, the beginning or the batch, and the same ones without it."""

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


def mlp(classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))


def times_10() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)
    return model


def binary(*last: nn.Module) -> nn.Module:
    return nn.Sequential(*mlp(1), nn.Flatten(0), *last)


def normalised() -> nn.Module:
    conv = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*conv, nn.Linear(288, 10))


def is_large(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, (y > 4).float())


@dataclass
class Training:
    """A classifier of digits; each mistake changes one part."""

    model: Callable[[], nn.Module] = mlp
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    kind: str = "Adam"
    lr: float = 1e-3
    zeroed: bool = True
    updates: int = 1
    rows: int = 64
    scale: float = 1.0
    steps: int = 60

    def recorded(self, folder: Path) -> monitor.Run:
        torch.manual_seed(0)
        images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
        images = images.float() / 16 * self.scale
        model = self.model()
        optimizer = getattr(torch.optim, self.kind)(model.parameters(), lr=self.lr)
        with monitor.attach(model, folder):
            for _ in range(self.steps):
                rows = torch.randint(0, len(images), (self.rows,))
                if self.zeroed:
                    optimizer.zero_grad(set_to_none=False)
                self.loss(model(images[rows]), labels[rows]).backward()
                for _ in range(self.updates):
                    optimizer.step()
        return monitor.open(folder)


MISTAKES = {
    "zero_grad forgotten": (Training(zeroed=False), "gradients_carried_over", ""),
    "step called twice": (Training(updates=2), "update_without_backward", ""),
    "sigmoid twice": (Training(lambda: binary(nn.Sigmoid()), is_large), "double_sigmoid", "binary_cross_entropy"),
    "weights times 10": (Training(times_10), "overconfident_start", "cross_entropy"),
    "inputs of 0 to 2,550": (Training(scale=2550.0), "overconfident_start", "cross_entropy"),
    "two images at a time": (Training(normalised, rows=2), "batch_norm_few_examples", ""),
}


@pytest.mark.parametrize(("training", "rule", "module"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistake(training: Training, rule: str, module: str, tmp_path: Path) -> None:
    """Oracle: planted fault. The mistake and nothing else is found, in a sentence that is whole."""
    (found,) = training.recorded(tmp_path / "run").findings()
    assert (found.rule, found.module) == (rule, module)
    assert "{" not in describe(found) and "nan" not in describe(found)


def test_what_a_forgotten_zero_grad_leads_to(tmp_path: Path) -> None:
    """Oracle: planted fault. Under SGD the loss diverges, and the head of that is what began it."""
    run = Training(kind="SGD", lr=0.3, zeroed=False, steps=300).recorded(tmp_path / "run")
    worst = run.verdict().incidents[0]
    assert (worst.head.rule, worst.severity) == ("gradients_carried_over", "critical")
    assert "divergence" in {f.rule for f in worst.consequences}


@pytest.mark.parametrize(
    ("training", "judged"),
    [
        (Training(), {"gradients_carried_over", "update_without_backward", "overconfident_start"}),
        (Training(binary, is_large), {"double_sigmoid"}),
        (Training(normalised, rows=16), {"batch_norm_few_examples"}),
    ],
    ids=["mlp", "binary", "batch normalisation"],
)
def test_without_it(training: Training, judged: set[str], tmp_path: Path) -> None:
    """Oracle: planted fault, absent. The rules had what they needed to judge, and found nothing."""
    run = training.recorded(tmp_path / "run")
    assert run.findings() == []
    assert judged.isdisjoint(run.verdict().unjudged)
