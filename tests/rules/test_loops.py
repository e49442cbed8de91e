"""Real trainings with a mistake in the loop around the model, and what looks like it and is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.diagnosis.report import describe

pytestmark = pytest.mark.usefixtures("nothing_compiled")  # or no evaluation is seen


def network() -> nn.Sequential:
    conv = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*conv, nn.Dropout(0.2), nn.Linear(288, 10))


class Loop:
    """Digits, their last 400 held out; each mistake, and each custom that looks like one, changes one method."""

    steps, every = 101, 20

    def __init__(self) -> None:
        torch.manual_seed(0)
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
        self.rows = len(images) - 400
        self.model = self.build()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)

    def build(self) -> nn.Module:
        return network()

    def prepare(self, step: int) -> None:
        """Before a step."""
        self.model.train()

    def batch(self, step: int) -> Tensor:
        return torch.randint(0, self.rows, (32,))

    def update(self, rows: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images[rows]), self.labels[rows]).backward()
        self.optimizer.step()

    def evaluate(self) -> None:
        self.model.eval()
        self.measure()

    def measure(self) -> None:
        """The held-out loss, in whatever mode the model is."""
        with torch.no_grad():
            for x, y in zip(self.images[self.rows :].split(100), self.labels[self.rows :].split(100), strict=True):
                F.cross_entropy(self.model(x), y)

    def recorded(self, folder: Path) -> monitor.Run:
        with monitor.attach(self.model, folder):
            for step in range(self.steps):
                self.prepare(step)
                self.update(self.batch(step))
                if step % self.every == self.every - 1:
                    self.evaluate()
        return monitor.open(folder)


class TrainForgotten(Loop):
    """`train()` stands before the loop."""

    def prepare(self, step: int) -> None:
        if step == 0:
            self.model.train()


class EvalForgotten(Loop):
    def evaluate(self) -> None:
        self.measure()


class Long(Loop):
    """A plain network, for as long as it takes to know how batches are drawn."""

    steps = 261

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class InOrder(Long):
    """The rows of one class after those of another, as in a folder of folders."""

    size = 32

    def batch(self, step: int) -> Tensor:
        ordered = self.labels[: self.rows].argsort(stable=True)
        return ordered[torch.arange(step * self.size, (step + 1) * self.size) % self.rows]


class TwoInOrder(InOrder):
    """Answers of yes or no, four at a time."""

    size = 8

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))

    def batch(self, step: int) -> Tensor:
        return super().batch(step * 11)  # an epoch is short

    def update(self, rows: Tensor) -> None:
        self.optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(self.model(self.images[rows]), (self.labels[rows] > 4).float()).backward()
        self.optimizer.step()

    def measure(self) -> None:
        """Nothing."""


class Regression(Long):
    """Noise hides the number in the picture; its loss is found at every evaluation."""

    every = 10

    def __init__(self) -> None:
        super().__init__()
        self.targets = self.labels[:, None] / 5 + torch.randn(len(self.labels), 1)

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1))

    def update(self, rows: Tensor) -> None:
        self.optimizer.zero_grad()
        F.mse_loss(self.model(self.images[rows]), self.targets[rows]).backward()
        self.optimizer.step()

    def measure(self) -> None:
        with torch.no_grad():
            F.mse_loss(self.model(self.images[-400:]), self.targets[-400:])


class Scheduled(Long):
    """A schedule in the unit of its numbers, or by mistake in another."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = self.scheduler()

    def scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.steps)

    def update(self, rows: Tensor) -> None:
        super().update(rows)
        self.schedule.step()


class Restarts(Scheduled):
    def scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 20)


class EpochsAsBatches(Scheduled):
    """Divided by ten every 20 batches, where epochs were meant."""

    steps = 321

    def scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(self.optimizer, 20)


class CosineOfEpochs(Scheduled):
    """Half a cosine of ten batches, where epochs were meant."""

    def scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)


class FewRows(Regression):
    def batch(self, step: int) -> Tensor:
        return torch.randint(0, 100, (32,))


MISTAKES: dict[str, tuple[type[Loop], str]] = {
    "train() forgotten": (TrainForgotten, "trained_in_eval_mode"),
    "eval() forgotten": (EvalForgotten, "evaluated_in_train_mode"),
    "epochs as batches": (EpochsAsBatches, "learning_rate_gone"),
    "cosine of epochs": (CosineOfEpochs, "learning_rate_cycles"),
    "a hundred rows": (FewRows, "overfitting"),
    "not shuffled": (InOrder, "unshuffled_data"),
    "not shuffled, two classes": (TwoInOrder, "unshuffled_data"),
}


class FrozenNorm(TrainForgotten):
    """Batch normalisation stays in evaluation from a step on, as in detection."""

    def prepare(self, step: int) -> None:
        self.model.train()
        if step >= 40:
            self.model[2].eval()  # pyright: ignore[reportIndexIssue]


class FrozenPart(Loop):
    """From a step on only the last layer is trained, on a model in evaluation."""

    def prepare(self, step: int) -> None:
        self.model.train()
        if step >= 40:
            self.model.eval()
            self.model[:6].requires_grad_(False)  # pyright: ignore[reportIndexIssue]


class NeverTrain(Loop):
    """Loaded in evaluation, as pretrained models are."""

    def prepare(self, step: int) -> None:
        self.model.eval()


class Attacked(Loop):
    """Each batch is made harder in evaluation mode."""

    def update(self, rows: Tensor) -> None:
        self.model.eval()
        x = self.images[rows].requires_grad_()
        F.cross_entropy(self.model(x), self.labels[rows]).backward()
        assert x.grad is not None
        self.model.train()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model((x + 0.01 * x.grad.sign()).detach()), self.labels[rows]).backward()
        self.optimizer.step()


class Sampled(Loop):
    """Dropout as a sample of models: the loss is that of their mean."""

    def measure(self) -> None:
        self.model.train()
        x, y = self.images[self.rows :], self.labels[self.rows :]
        with torch.no_grad():
            F.nll_loss(torch.stack([self.model(x).softmax(1) for _ in range(4)]).mean(0).log(), y)


class Calibrated(Loop):
    """The averages of batch normalisation are taken anew before each evaluation."""

    def evaluate(self) -> None:
        self.model.train()
        with torch.no_grad():
            for rows in range(0, self.rows, 200):
                self.model(self.images[rows : rows + 200])
        super().evaluate()


class Selected(Loop):
    """The hardest rows of those that are tried are trained on."""

    def update(self, rows: Tensor) -> None:
        rows = torch.randint(0, self.rows, (64,))
        with torch.no_grad():
            losses = F.cross_entropy(self.model(self.images[rows]), self.labels[rows], reduction="none")
        super().update(rows[losses.topk(32).indices])


class Pseudo(Loop):
    """Answers to data without labels, in training mode, are what is learned from."""

    def update(self, rows: Tensor) -> None:
        with torch.no_grad():
            answers = self.model(self.images[self.rows :][:32]).argmax(1)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.images[rows]), self.labels[rows])
        (loss + 0.1 * F.cross_entropy(self.model(self.images[self.rows :][:32]), answers)).backward()
        self.optimizer.step()


class Plain(EvalForgotten):
    """`eval()` is forgotten where it makes no difference."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(0.0), nn.Linear(64, 10))


class Unequal(Long):
    """Nine rows out of ten are of one class, and a batch holds four."""

    def batch(self, step: int) -> Tensor:
        rows = torch.randint(0, self.rows, (200,))
        zeros, others = rows[self.labels[rows] == 0], rows[self.labels[rows] != 0]
        return torch.where(torch.rand(4) < 0.9, zeros[:4], others[:4])

    def measure(self) -> None:
        """The held-out rows are of other sizes of class."""


class Grouped(Long):
    """Eight rows of each of four classes, as for a loss between pairs."""

    def batch(self, step: int) -> Tensor:
        labels = self.labels[: self.rows]
        of_class = [(labels == c).nonzero()[:, 0] for c in torch.randperm(10)[:4]]
        return torch.cat([rows[torch.randint(0, len(rows), (8,))] for rows in of_class])


class Easy(Long):
    """Easy classes first, the others one after another."""

    def batch(self, step: int) -> Tensor:
        rows = torch.randint(0, self.rows, (320,))
        return rows[self.labels[rows] <= 2 + step // 30][:32]


class Adversary(Long):
    """Is it a digit? Losses of the real rows and of made ones, each with a backward of its own."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))

    def update(self, rows: Tensor) -> None:
        self.optimizer.zero_grad()
        for x, answer in ((self.images[rows], 1.0), (torch.rand(32, 64), 0.0)):
            F.binary_cross_entropy_with_logits(self.model(x), torch.full((len(x),), answer)).backward()
        self.optimizer.step()

    def measure(self) -> None:
        """Nothing."""


HEALTHY: tuple[type[Loop], ...] = (
    Loop, FrozenNorm, FrozenPart, NeverTrain, Attacked, Sampled, Selected, Plain, Scheduled, Unequal, Adversary,
)  # fmt: skip
MORE: tuple[type[Loop], ...] = (Calibrated, Pseudo, Long, Restarts, Regression, Grouped, Easy)


@pytest.mark.parametrize(("loop", "rule"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistake(loop: type[Loop], rule: str, tmp_path: Path) -> None:
    """Oracle: planted fault. The mistake and nothing else is found, in a sentence that is whole."""
    (found,) = loop().recorded(tmp_path / "run").findings()
    assert found.rule == rule
    assert "{" not in describe(found) and "nan" not in describe(found)


@pytest.mark.parametrize("loop", [*HEALTHY, *(pytest.param(loop, marks=pytest.mark.slow) for loop in MORE)])
def test_no_mistake(loop: type[Loop], tmp_path: Path) -> None:
    """Oracle: planted fault, absent. Customs that look like a mistake are none."""
    run = loop().recorded(tmp_path / "run")
    assert not run.warnings
    assert run.findings() == []


@pytest.mark.parametrize("build", [Long.build, Loop.build], ids=["plain", "normalised"])
@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 10, 1000])
def test_a_rate_times_1000_heads_what_it_leads_to(
    build: Callable[[Loop], nn.Module], times: float, tmp_path: Path
) -> None:
    """Oracle: planted fault. From the first steps on; a rate times 10, at which it learns, is none."""
    loop = Long()
    loop.model = build(loop)
    loop.optimizer = torch.optim.Adam(loop.model.parameters(), lr=1e-3 * times)
    loop.steps = 161
    run = loop.recorded(tmp_path / "run")
    heads = [(i.head.rule, i.severity) for i in run.verdict().incidents if i.severity != "info"]
    assert heads == ([("learning_rate_too_large", "warning")] if times == 1000 else [])
    assert all(f.first_step < 10 for f in run.findings() if f.rule == "learning_rate_too_large")
