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

pytestmark = pytest.mark.usefixtures("nothing_compiled")
EVERY, STEPS = 5, 12


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
    "each": (lambda z, y: F.cross_entropy(z, y, reduction="none").sum() / (y != -100).sum(), IGNORED),
    "bytes": (F.cross_entropy, CLASSES.to(torch.uint8)),
    "keywords": (lambda z, y: F.cross_entropy(target=y, input=z), CLASSES),
    "nll": (F.nll_loss, CLASSES),
    "soft": (F.cross_entropy, F.one_hot(CLASSES, 5).float()),
    "mse": (F.mse_loss, torch.randn(22, 5, generator=torch.Generator().manual_seed(3))),
    "huber": (F.huber_loss, torch.randn(22, 5, generator=torch.Generator().manual_seed(3))),
    "smooth": (F.smooth_l1_loss, torch.randn(22, 5, generator=torch.Generator().manual_seed(3))),
    "binary": (F.binary_cross_entropy_with_logits, F.one_hot(CLASSES, 5).float()),
    "probabilities": (F.binary_cross_entropy, F.one_hot(CLASSES, 5).float()),
    "legacy": (lambda z, y: F.cross_entropy(z, y, size_average=False) / 8, CLASSES),
    "weighted": (lambda z, y: F.cross_entropy(z, y, torch.arange(1.0, 6), reduction="sum") / 8, CLASSES),
    "classes weigh": (lambda z, y: F.cross_entropy(z, y, torch.arange(1.0, 6)), CLASSES),
    "ignored weigh": (lambda z, y: F.cross_entropy(z, y, torch.arange(1.0, 6)), IGNORED),
    "smoothed": (lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), CLASSES),
    "composed": (lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean(), CLASSES),
}


LAST = {"nll": nn.LogSoftmax(1), "probabilities": nn.Sigmoid()}


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_that_the_script_makes(kind: str, tmp_path: Path) -> None:
    """Oracle: closed form. Means over all targets, of batches of different size; no part of a loss made of several."""
    trainings.seed()
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5))
    loss, y = LOSSES[kind]

    def evaluate() -> tuple[float, float]:
        z = model(OTHERS)
        whole = float(loss(z.clone(), y)) * (8 / len(y) if kind in ("sum", "legacy") else 1)
        valid = y != -100
        for at in range(0, len(y), 8):
            loss(model(OTHERS[at : at + 8]), y[at : at + 8])
        return whole, float((z.argmax(1) == y)[valid].float().mean()) if y.dim() == 1 else 0.0

    if kind in LAST:
        model.append(LAST[kind])
    seen, run = train(model, lambda step: loss(model(INPUTS), y), evaluate, tmp_path / "run")
    alone = kind not in ("soft", "smoothed", "composed", "weighted")
    assert found(run, "eval_loss") == pytest.approx({at: x for at, (x, _) in seen.items()} if alone else {}, rel=1e-6)
    classes = y.dim() == 1
    assert found(run, "eval_acc") == pytest.approx({at: x for at, (_, x) in seen.items()} if classes else {}, rel=1e-6)


@pytest.mark.parametrize("shape", [(), (11, 2)])
def test_logits_of_other_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Oracle: closed form. One sample without a dimension for it, and classes that come before positions."""
    trainings.seed()
    model = nn.Linear(12, 5)
    y = CLASSES[0] if not shape else CLASSES.view(shape)

    def logits(x: Tensor) -> Tensor:
        return model(x[0]) if not shape else model(x).view(*shape, 5).movedim(2, 1)

    def evaluate() -> tuple[float, float]:
        z = logits(OTHERS)
        classes = z.argmax(-1 if not shape else 1)
        return float(F.cross_entropy(z, y)), float((classes == y).float().mean())

    seen, run = train(model, lambda s: F.cross_entropy(logits(INPUTS), y), evaluate, tmp_path / "run")
    for i, name in enumerate(("eval_loss", "eval_acc")):
        assert found(run, name) == pytest.approx({at: x[i] for at, x in seen.items()}, rel=1e-6)


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


@pytest.mark.parametrize("shape", [(90,), (9, 12)])
def test_of_many_positions_some_are_looked_at(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Oracle: planted fault. Every third position, or every second of every second row, is right: those looked at."""
    trainings.seed()
    model, x = nn.Linear(4, LOOKED // 72), torch.randn(2, *shape, 4)
    apart = 3 if len(shape) == 1 else 2
    right = torch.zeros(shape, dtype=torch.bool)
    right[tuple(slice(None, None, apart) for _ in shape)] = True

    def evaluate() -> float:
        z = model(x).movedim(-1, 1)
        return float(F.cross_entropy(z, torch.where(right, z.argmax(1), z.argmin(1))))

    def loss(step: int) -> Tensor:
        return F.cross_entropy(model(torch.randn(2, 4, 4)).movedim(-1, 1), torch.zeros(2, 4, dtype=torch.long))

    seen, run = train(model, loss, evaluate, tmp_path / "run")
    assert found(run, "eval_loss") == pytest.approx(seen, rel=1e-6)
    assert set(found(run, "eval_acc").values()) == {1.0}


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


class Beside(nn.Module):
    """In evaluation, gives back what ``kind`` makes of its logits."""

    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.kind, self.scale = nn.Linear(12, 5), kind, nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Any:
        x = x.to_padded_tensor(0.0)[0] if x.is_nested else x
        z = self.scale * self.inner(x.dequantize() if x.is_quantized else x)
        return self.kind(z) if not self.training else (z, self.scale * 1)


class Labelled:
    """Has a loss only for those who have given labels."""

    @property
    def loss(self) -> Tensor:
        raise RuntimeError("no labels")


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "scale": lambda z: (z, z.new_tensor(100.0)),
    "value": lambda z: z[0, 0],
    "property": lambda z: Labelled(),
    "meta": lambda z: z.to("meta"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_that_are_not_trained_on(kind: str, tmp_path: Path) -> None:
    """Oracle: definition. The scale of logits and the value of a state are no losses, before the first step neither."""
    trainings.seed()
    model = Beside(NUMBERS[kind])

    def evaluate() -> None:
        z = model(OTHERS)
        if kind == "meta":
            F.cross_entropy(z, CLASSES.to("meta"))

    def loss(step: int) -> Tensor:
        if step == 0:
            model.eval()
            with torch.no_grad():
                evaluate()
            model.train()
        return F.cross_entropy(model(INPUTS)[0], CLASSES)

    _, run = train(model, loss, evaluate, tmp_path / "run")
    assert "logged" not in run.metrics()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*uantize")
@pytest.mark.parametrize("kind", ["nested", "quantized"])
def test_inputs_without_shapes_or_numbers(kind: str, tmp_path: Path) -> None:
    """Oracle: closed form. They are no reason to give up."""
    trainings.seed()
    model = Beside(lambda z: z)

    def evaluate() -> float:
        quantized = torch.quantize_per_tensor(OTHERS, 0.1, 0, torch.qint8)
        given = torch.nested.nested_tensor([OTHERS]) if kind == "nested" else quantized
        return float(F.cross_entropy(model(given), CLASSES))

    seen, run = train(model, lambda s: F.cross_entropy(model(INPUTS)[0], CLASSES), evaluate, tmp_path / "run")
    assert found(run, "eval_loss") == pytest.approx(seen, rel=1e-6)


@pytest.mark.parametrize("kind", ["written over", "fitted", "probed"])
def test_what_is_made_of_the_output(kind: str, tmp_path: Path) -> None:
    """Oracle: invariance. Another unit, a latent and a linear probe: no evaluation, and no part of the next step."""
    trainings.seed()
    model, y = nn.Linear(12, 5), torch.randn(22, 5)

    def evaluate() -> None:
        z = model(OTHERS)
        if kind == "written over":
            F.mse_loss(z.mul_(3.0).add_(1.0), y)
            return
        w = torch.zeros(22 if kind == "fitted" else 5, 5, requires_grad=True)
        with torch.enable_grad():
            (F.mse_loss(z, w) if kind == "fitted" else F.mse_loss(z @ w, y)).backward()

    def loss(step: int) -> Tensor:
        losses.append(F.mse_loss(model(INPUTS), y))
        return losses[-1]

    losses: list[Tensor] = []
    _, run = train(model, loss, evaluate, tmp_path / "run")
    assert "logged" not in run.metrics()
    assert run.series("loss.value")[1].tolist() == [x.item() for x in losses]


def compiled() -> Callable[[Tensor], Any]:
    """A function that is compiled where it is called first."""
    function = torch.compile(lambda z: z.softmax(1).sum(), backend="eager", fullgraph=True)
    return lambda z: function(z)


def exported() -> Callable[[Tensor], Any]:
    """A module is exported, where no hook of all modules may stand."""
    return lambda z: torch.export.export(nn.Linear(5, 3), (z,), strict=True)


def traced() -> Callable[[Tensor], Any]:
    """What is traced is compared with a second trace."""
    return lambda z: torch.jit.trace(lambda z: F.cross_entropy(z, CLASSES), z)


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("made", [compiled, exported, traced])
def test_something_is_compiled_after_an_evaluation(made: Callable[[], Callable[[Tensor], Any]], tmp_path: Path) -> None:
    """Oracle: invariance. Neither the mode nor a hook of all modules is met where Dynamo or the tracer looks."""
    model, done = nn.Linear(12, 5), []

    def evaluate() -> None:
        if not done:
            z = model(OTHERS)
            assert _get_current_function_mode_stack()
            function = made()
            done.append(function(z))
            model(OTHERS)
            function(z)

    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, lambda s: F.cross_entropy(model(INPUTS), CLASSES), evaluate, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_recorded_model_can_be_scripted(tmp_path: Path) -> None:
    """Oracle: definition. TorchScript compiles the hooks of a module: it must not find ours."""
    model = nn.Linear(12, 5)
    with monitor.attach(model, tmp_path / "run"):
        assert torch.equal(torch.jit.script(model)(OTHERS), model(OTHERS))


def test_a_part_of_the_loss_inside_the_model(tmp_path: Path) -> None:
    """Oracle: definition. It is no evaluation's, and no reason to watch every forward, which costs more."""

    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.modes = nn.Linear(12, 5), 0

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.inner(x)
            self.modes += len(_get_current_function_mode_stack())
            return z, F.mse_loss(z, z.round())

    model = Coder()

    def loss(step: int) -> Tensor:
        z, part = model(INPUTS)
        return F.cross_entropy(z, CLASSES) + part

    train(model, loss, lambda: None, tmp_path / "run", steps=40)
    assert model.modes < 20  # of 40


def test_an_evaluation_alone_is_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: definition. Of a model that is never trained nothing is recorded, nor judged."""
    model = Judge("loss").eval()
    with monitor.attach(model, tmp_path / "run"), torch.no_grad():
        model(OTHERS, CLASSES)
    assert monitor.open(tmp_path / "run").steps == 0
    assert "no step" in capsys.readouterr().err


@pytest.mark.parametrize("log", ["", "val_loss"])
def test_steps_of_a_training_that_goes_on(log: str, tmp_path: Path) -> None:
    """Oracle: definition. The row of the last evaluation is no step: the next attempt begins with its number."""
    model = nn.Linear(12, 5)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for attempt in range(3):
        with monitor.attach(model, run_dir=tmp_path / "run", resume=attempt > 0) as handle:
            for _ in range(STEPS):
                opt.zero_grad()
                F.cross_entropy(model(INPUTS), CLASSES).backward()
                opt.step()
            assert monitor.open(tmp_path / "run").steps == (attempt + 1) * STEPS  # also of one that goes on or dies
            if attempt == 1:
                continue
            model.eval()
            with torch.no_grad():
                F.cross_entropy(model(OTHERS), CLASSES)
            if log:
                handle.log(**{log: 1.5})
            model.train()
    run = monitor.open(tmp_path / "run")
    assert run.steps == 3 * STEPS
    assert run.series("loss.value")[0].tolist() == list(range(3 * STEPS))
    assert [a["start_step"] for a in run.info["attempts"]] == [0, STEPS, 2 * STEPS]
    assert list(found(run, log or "eval_loss")) == [3 * STEPS]  # of the first attempt's nothing is left at that step


def test_masks_are_no_training_data(tmp_path: Path) -> None:
    """Oracle: closed form. They come first and are the same for all rows: the tokens tell what was trained on."""
    trainings.seed()
    ids, held = torch.randint(0, 9, (2, 40, 6))

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Embedding(9, 5)

        def forward(self, mask: Tensor, ids: Tensor) -> Tensor:
            return (self.inner(ids) * mask[..., None]).sum(1)

    model = Masked()

    def loss(ids: Tensor) -> Tensor:
        return F.cross_entropy(model(torch.ones(40, 6), ids), torch.arange(40) % 5)

    def evaluate() -> float:
        loss(ids.clone())
        return float(loss(held))

    seen, run = train(model, lambda s: loss(ids), evaluate, tmp_path / "run")
    assert found(run, "eval_loss") == pytest.approx(seen, rel=1e-6)


def test_an_evaluation_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """Oracle: invariance. What is recorded of the step is what is recorded without it; one with gradients is none."""
    model, runs = nn.Linear(12, 5), []
    for nested in (False, True):
        trainings.seed()
        model.reset_parameters()

        def loss(step: int, nested: bool = nested) -> Tensor:
            z = model(INPUTS)
            if nested:
                model.eval()
                with torch.no_grad():
                    model(OTHERS)
                model.train()
            return F.cross_entropy(z, CLASSES)

        def evaluate() -> None:
            with torch.enable_grad():
                F.cross_entropy(model(OTHERS), CLASSES)

        runs.append(train(model, loss, evaluate, tmp_path / f"{nested}")[1])
    plain, nested = ([r.series(ref, r.modules(ref)[0]) for ref in ("input_rms.rms", "logit_norm.mean")] for r in runs)
    assert all(np.array_equal(a, b) for x, y in zip(plain, nested, strict=True) for a, b in zip(x, y, strict=True))
