"""Evaluations that nobody logs: their loss and accuracy are found, exact, and found without disturbing anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack

import monitor
from monitor.record import private
from monitor.record.sites.evaluation import LOOKED
from tests.record import trainings

EVERY, STEPS = 5, 12


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Where anything is to be compiled, nothing is watched in an evaluation."""
    torch._dynamo.reset()


def train(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    evaluate: Callable[[], Any],
    folder: Path,
    steps: int = STEPS,
    log: str = "",
) -> tuple[dict[int, Any], monitor.Run]:
    """Train; what ``evaluate`` gave, by the number of steps made before, and the run."""
    opt, seen = torch.optim.SGD(model.parameters(), lr=0.1), {}
    with monitor.attach(model, folder) as handle:
        for step in range(steps):
            opt.zero_grad()
            loss(step).backward()
            opt.step()
            if step % EVERY == EVERY - 1 or step == steps - 1:
                model.eval()
                with torch.no_grad():
                    seen[step + 1] = evaluate()
                if log:
                    handle.log(**{log: 1.5})
                model.train()
    assert not hooks._global_forward_pre_hooks
    assert not _get_current_function_mode_stack()
    run = monitor.open(folder)
    assert not run.warnings
    return seen, run


def found(run: monitor.Run, name: str) -> dict[int, float]:
    """A logged series by step; empty if it was not recorded."""
    if "logged" not in run.metrics() or name not in run.modules("logged.value"):
        return {}
    return dict(zip(*(x.tolist() for x in run.series("logged.value", name)), strict=True))


class Judge(nn.Module):
    """Makes its loss itself and gives it back in some way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(12, 5), kind

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = self.inner(x)
        loss = F.cross_entropy(z, y)
        named = {"logits": z, "loss": loss}
        given = {"loss": loss, "tuple": (z, loss), "mapping": named, "attribute": SimpleNamespace(**named)}
        return given.get(self.kind, z) if not self.training else loss


@pytest.mark.parametrize("logs", ["", "val_loss", "train_loss"])
@pytest.mark.parametrize("kind", ["loss", "tuple", "mapping", "attribute", "logits"])
def test_losses_that_the_model_gives_back(kind: str, logs: str, tmp_path: Path) -> None:
    """Oracle: definition. Their mean over batches, with the next step; not beside a logged one."""
    trainings.seed()
    model = Judge(kind)
    data = [(torch.randn(8, 12), torch.randint(0, 5, (8,))) for _ in range(3)]

    def evaluate() -> float:
        mean = np.mean([float(F.cross_entropy(model.inner(x), y)) for x, y in data[1:]])
        for batch in data[1:]:
            model(*batch)
        return float(mean)

    seen, run = train(model, lambda step: model(*data[0]), evaluate, tmp_path / "run", log=logs)
    expected = {} if kind == "logits" or logs == "val_loss" else seen
    assert found(run, "eval_loss") == pytest.approx(expected, rel=1e-6)
    assert not found(run, "eval_acc")


CLASSES = torch.randint(0, 5, (22,), generator=torch.Generator().manual_seed(1))
IGNORED = torch.where((torch.arange(22) % 4 == 0) | (torch.arange(22) > 15), -100, CLASSES)  # all of the last batch
# two parts of one data set
INPUTS, OTHERS = torch.randn(44, 12, generator=torch.Generator().manual_seed(2)).chunk(2)

LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "cross_entropy": (F.cross_entropy, CLASSES),
    "module": (nn.CrossEntropyLoss(), CLASSES),
    "sum": (lambda z, y: F.cross_entropy(z, y, reduction="sum") / 8, CLASSES),
    "none": (lambda z, y: F.cross_entropy(z, y, reduction="none").mean(), CLASSES),
    "ignored": (F.cross_entropy, IGNORED),
    "keywords": (lambda z, y: F.cross_entropy(target=y, input=z), CLASSES),
    "nll": (F.nll_loss, CLASSES),
    "soft": (F.cross_entropy, F.one_hot(CLASSES, 5).float()),
    "mse": (F.mse_loss, torch.randn(22, 5, generator=torch.Generator().manual_seed(3))),
    "binary": (F.binary_cross_entropy_with_logits, F.one_hot(CLASSES, 5).float()),
    "smoothed": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), CLASSES),
    "composed": (lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean(), CLASSES),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_that_the_script_makes(kind: str, tmp_path: Path) -> None:
    """Oracle: closed form. Means over all targets, of batches of different size; no part of a loss made of several."""
    trainings.seed()
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5))
    loss, y = LOSSES[kind]

    def evaluate() -> tuple[float, float]:
        z = model(OTHERS)
        whole = float(loss(z.clone(), y)) * (8 / len(y) if kind == "sum" else 1)
        valid = y != -100
        for at in range(0, len(y), 8):
            loss(model(OTHERS[at : at + 8]), y[at : at + 8])
        return whole, float((z.argmax(1) == y)[valid].float().mean()) if y.dim() == 1 else 0.0

    if kind == "nll":
        model.append(nn.LogSoftmax(1))
    seen, run = train(model, lambda step: loss(model(INPUTS), y), evaluate, tmp_path / "run")
    alone = kind not in ("soft", "smoothed", "composed")
    assert found(run, "eval_loss") == pytest.approx({at: x for at, (x, _) in seen.items()} if alone else {}, rel=1e-6)
    classes = y.dim() == 1
    assert found(run, "eval_acc") == pytest.approx({at: x for at, (_, x) in seen.items()} if classes else {}, rel=1e-6)


def test_language_model(tmp_path: Path) -> None:
    """Oracle: closed form. Flattened logits are the model's own; shifted ones are another tensor, so none is said."""
    trainings.seed()
    model, held = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), torch.randint(0, 9, (4, 6))
    for shifted in (False, True):

        def loss(ids: Tensor, shifted: bool = shifted) -> Tensor:
            z = model(ids)
            if shifted:
                return F.cross_entropy(z[:, :-1].reshape(-1, 9), ids[:, 1:].reshape(-1))
            return F.cross_entropy(z.view(-1, 9), ids.view(-1))

        def batch(step: int, loss: Callable[[Tensor], Tensor] = loss) -> Tensor:
            return loss(torch.randint(0, 9, (4, 6)))

        seen, run = train(model, batch, lambda loss=loss: float(loss(held)), tmp_path / f"{shifted}")
        assert found(run, "eval_loss") == pytest.approx({} if shifted else seen, rel=1e-6)


def test_the_training_batch_is_no_other_data(tmp_path: Path) -> None:
    """Oracle: definition. Of a script with one batch that evaluates it and another, what is found is of the other."""
    trainings.seed()
    model = nn.Linear(12, 5)

    def evaluate() -> float:
        return [float(F.cross_entropy(model(x), CLASSES)) for x in (INPUTS, OTHERS)][1]

    seen, run = train(model, lambda s: F.cross_entropy(model(INPUTS), CLASSES), evaluate, tmp_path / "run")
    assert found(run, "eval_loss") == pytest.approx(seen, rel=1e-6)


def test_what_is_logged_is_not_recorded_twice(tmp_path: Path) -> None:
    """Oracle: definition. A logged accuracy leaves the loss to be found; a loss of other tensors is no evaluation."""
    trainings.seed()
    model = nn.Linear(12, 5)

    def evaluate() -> float:
        z = model(OTHERS)
        F.cross_entropy(torch.randn(22, 5), CLASSES)
        return float(F.cross_entropy(z, CLASSES))

    seen, run = train(model, lambda s: F.cross_entropy(model(INPUTS), CLASSES), evaluate, tmp_path / "r", log="val_acc")
    assert found(run, "eval_loss") == pytest.approx(seen, rel=1e-6)
    assert not found(run, "eval_acc")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_module_meets_the_mode(tmp_path: Path) -> None:
    """Oracle: invariance. A layer with a fast path, made in the middle and called between, gives the same bits."""
    trainings.seed()
    model, modes = nn.Linear(12, 5), []
    later: list[nn.Module] = []

    class Metric(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(len(_get_current_function_mode_stack()))
            return x

    def evaluate() -> Tensor:
        z = model(OTHERS)
        if not later:
            trainings.seed()
            later.append(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval())
        x = torch.linspace(-1, 1, 48).view(2, 3, 8)
        Metric()(z)
        padding = torch.tensor([[False, False, True], [False, True, True]])
        made = later[0](x, src_key_padding_mask=padding)
        F.cross_entropy(z, CLASSES)  # after another module: too late
        return made

    def loss(step: int) -> Tensor:
        return F.cross_entropy(model(INPUTS), CLASSES)

    seen, run = train(model, loss, evaluate, tmp_path / "run")
    assert modes == [1] * len(seen)
    assert not found(run, "eval_loss")
    model.eval()
    with torch.no_grad():
        plain = evaluate()
    assert all(torch.equal(made, plain) for made in seen.values())


def test_nothing_is_watched_where_something_compiles(tmp_path: Path) -> None:
    """Oracle: definition. The private list of backends fills with `torch.compile`; the loss is not looked for then."""
    assert not private.compiles()
    squared = torch.compile(lambda x: x * x, backend="eager")
    assert private.compiles()
    model = nn.Linear(12, 5)

    def evaluate() -> float:
        z = model(OTHERS)
        assert not _get_current_function_mode_stack()
        return float(squared(F.cross_entropy(z, CLASSES)))

    _, run = train(model, lambda s: F.cross_entropy(model(INPUTS), CLASSES), evaluate, tmp_path / "run")
    assert not found(run, "eval_loss")


def test_of_many_logits_some_rows_are_looked_at(tmp_path: Path) -> None:
    """Oracle: planted fault. Every third of so many rows is right: at those that are looked at all are."""
    trainings.seed()
    model = nn.Linear(4, LOOKED // 100)
    x = torch.randn(300, 4)

    def evaluate() -> float:
        z = model(x)
        right = torch.arange(300) % 3 == 0
        return float(F.cross_entropy(z, torch.where(right, z.argmax(1), z.argmin(1))))

    seen, run = train(model, lambda s: F.cross_entropy(model(x[:8]), torch.arange(8)), evaluate, tmp_path / "run")
    assert found(run, "eval_loss") == pytest.approx(seen, rel=1e-6)
    assert set(found(run, "eval_acc").values()) == {1.0}


@pytest.mark.parametrize("first", [True, False])
def test_compiled_in_place_after_an_evaluation(first: bool, tmp_path: Path) -> None:
    """Oracle: invariance. Tried before the training or in the middle of it, it is compiled without a break."""
    trainings.seed()
    model = nn.Linear(12, 5)

    def tried() -> None:
        model.eval()
        with torch.no_grad():
            model(OTHERS)
        model.train()
        model.compile(backend="eager", fullgraph=True)

    def loss(step: int) -> Tensor:
        if step == (0 if first else 4):
            tried()
        return F.cross_entropy(model(INPUTS), CLASSES)

    with torch._dynamo.config.patch(error_on_recompile=first):
        train(model, loss, lambda: None, tmp_path / "run")


def test_generation_is_given_up_on(tmp_path: Path) -> None:
    """Oracle: definition. After many forwards without a loss nobody looks any more, and nothing is left behind."""
    model, on = nn.Linear(12, 5), []

    def evaluate() -> None:
        for _ in range(40):
            model(OTHERS)
            on.append(len(_get_current_function_mode_stack()))

    train(model, lambda s: F.cross_entropy(model(INPUTS), CLASSES), evaluate, tmp_path / "run")
    assert on == [1] * 50 + [0] * (len(on) - 50)


def test_training_data_are_not_evaluated(tmp_path: Path) -> None:
    """Oracle: dense reference. A script that evaluates both its sets: what is recorded is of the held-out one alone."""
    trainings.seed()
    x, y = torch.randn(120, 6), torch.randint(0, 3, (120,))
    held_x, held_y = torch.randn(80, 6), torch.randint(0, 3, (80,))
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))

    def loss(step: int) -> Tensor:
        some = torch.randperm(len(x))[:60]
        return F.cross_entropy(model(x[some]), y[some])

    def evaluate() -> float:
        F.cross_entropy(model(x), y)
        return F.cross_entropy(model(held_x), held_y).item()

    seen, run = train(model, loss, evaluate, tmp_path / "run")
    steps, values = run.series("logged.value", "eval_loss")
    assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == pytest.approx(
        {s: seen[s] for s in steps.tolist()}
    )
    assert len(steps) >= 2
