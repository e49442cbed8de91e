"""Curvature where forward and backward run inside the optimizer's step: at the parameters of the step or not at all."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import monitor
from monitor.probes.curvature import Curvature
from monitor.record.closure import find_closure, fingerprint, watched, with_closure
from tests.probes.curvature.runs import absent, column, dense
from tests.record import trainings
from tests.record.trainings import Watch

STEPS, EVERY = 8, 3
Make = Callable[[Any], Optimizer]
#: The loss of a batch, of what calls the model.
Loss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


def whole(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """A mean over the batch."""
    return F.cross_entropy(model(x), y)


def smooth(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """A second term."""
    return F.cross_entropy(model(x[:8]), y[:8]) + 0.3 * model(x[8:]).square().mean()


def sharpness(model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> float:
    """The largest eigenvalue of the dense Hessian in float64, at the present parameters."""
    twin = copy.deepcopy(model).double()
    shapes = {name: p.shape for name, p in twin.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in twin.parameters()])

    def at(v: Tensor) -> Tensor:
        parts = v.split([s.numel() for s in shapes.values()])
        held = {name: part.view(s) for (name, s), part in zip(shapes.items(), parts, strict=True)}
        return loss(lambda z: torch.func.functional_call(twin, held, (z.double(),)), x, y)

    return float(np.linalg.eigvalsh(dense(at, flat))[-1])


class Seeking(Optimizer):
    """Moves to where the loss is sharp, and makes the update with the gradient that it finds there.

    Args:
        parameters: as of any optimizer.
        first: it evaluates its closure at the parameters of the step too.
        hidden: it moves them so that autograd does not know.

    Source: Foret et al. (2021), arXiv 2010.01412, as it is written by hand in many projects.
    """

    def __init__(self, parameters: Any, first: bool = False, hidden: bool = False) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1)
        self.first, self.hidden = first, hidden

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        again = torch.enable_grad()(closure)
        loss = again() if self.first else None
        ps = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        before = [p.clone() for p in ps]
        norm = torch.stack([p.grad.norm() for p in ps]).norm()
        for p in ps:
            (p.data if self.hidden else p).add_(p.grad, alpha=float(0.5 / norm))
            p.grad = None
        loss = again() if loss is None else (again(), loss)[1]
        for p, b in zip(ps, before, strict=True):
            p.data = b
        self.inner.step()
        return loss


def sgd(parameters: Any) -> Optimizer:
    """No state."""
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters: Any) -> Optimizer:
    """A state that the preconditioned sharpness reads."""
    return torch.optim.Adam(parameters, lr=0.01)


def lbfgs(parameters: Any) -> Optimizer:
    """Evaluates its closure up to a dozen times, each time somewhere else."""
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=5, line_search_fn="strong_wolfe")


def train(
    make: Make, watch: Watch, loss: Loss = whole, clip: float = 0.0, before: str = "", keep: list[float] | None = None
) -> str:
    """``before``: what is done outside the closure: "backward" too, the first "half" of the batch, or "all" of it."""
    trainings.seed()
    model, digest = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)), trainings.Digest()
    opt = make(model.parameters())
    watch(model)
    for x, y in trainings.batches(STEPS):
        if keep is not None:
            keep.append(sharpness(model, loss, x, y))
        parts = [(x, y)]
        found: Tensor | None = None
        if before == "half":
            parts = [(x[:8], y[:8]), (x[8:], y[8:])]
        if before:
            opt.zero_grad()
            found = loss(model, *parts.pop(0)) / (2 if before == "half" else 1)
            found.backward()

        def closure(parts: Any = parts, found: Tensor | None = found) -> Tensor:
            if found is not None and not parts:
                return found
            if before != "half":
                opt.zero_grad()
            if loss is smooth:  # two calls of backward in one evaluation
                x, y = parts[0]
                one, two = F.cross_entropy(model(x[:8]), y[:8]), 0.3 * model(x[8:]).square().mean()
                one.backward()
                two.backward()
                return one.detach() + two.detach()
            again = loss(model, *parts[0]) / (2 if before == "half" else 1)
            again.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return again

        if before == "backward":
            parts.append((x, y))
        digest.add(opt.step(closure))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return digest.finish(model, opt)


KINDS: dict[str, tuple[Make, dict[str, Any]]] = {
    "plain": (sgd, {}),
    "clipped": (adam, {"clip": 0.1}),
    "two calls of backward": (adam, {"loss": smooth}),
    "accumulated": (sgd, {"before": "half"}),
    "a closure that computes nothing": (sgd, {"before": "all"}),
    "lbfgs": (lbfgs, {}),
    "seeking": (lambda p: Seeking(p), {"before": "backward"}),
    "seeking, hidden": (lambda p: Seeking(p, hidden=True), {"before": "backward"}),
    "seeking, first evaluated": (lambda p: Seeking(p, first=True), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_measured_at_the_parameters_of_the_step(kind: str, tmp_path: Path) -> None:
    """Oracle: invariance, and the dense float64 Hessian of the same batch at the same parameters.

    One measurement for each step that is due, however often the closure is evaluated; the training is the same bit for
    bit. Where the parameters are moved before the closure is evaluated for the first time, that is learnt at the first
    step, at which nothing is recorded.
    """
    make, options = KINDS[kind]
    wanted: list[float] = []
    control = train(make, lambda _: None, keep=wanted, **options)
    handles: list[monitor.Handle] = []
    curvature = Curvature(every=EVERY, full=2)
    assert train(
        make, lambda m: handles.append(monitor.attach(m, tmp_path / "run", curvature=curvature)), **options
    ) == (control)
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    steps, values = run.series("sharpness.value")
    assert steps.tolist() == ([3, 6] if options.get("before") == "backward" else [0, 3, 6])
    assert values == pytest.approx([wanted[s] for s in steps], rel=1e-4)
    assert "curvature" not in absent(run)
    assert column(run, "sharpness.examples") == [8 if options.get("loss") is smooth else 16] * len(steps)
    if "clip" in options:
        assert len(column(run, "clip.coefficient")) == STEPS
        assert max(column(run, "clip.coefficient")) < 1
    if not kind.startswith("seeking"):
        at = column(run, "sharpness.loss")
        assert at == pytest.approx([column(run, "loss.value")[s] for s in steps], rel=1e-5)


def test_parameters_that_are_moved_first_are_told(tmp_path: Path) -> None:
    """Oracle: planted fault. Nothing is recorded of the loss at other parameters than the step's; one line says why."""

    class Ahead(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.data.add_(1e-4)
            return super().step(closure)

    handles: list[monitor.Handle] = []
    watch = Curvature(every=1)
    train(lambda p: Ahead(p, lr=0.1), lambda m: handles.append(monitor.attach(m, tmp_path / "run", curvature=watch)))
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    assert "sharpness.value" not in run.refs()
    assert absent(run)["curvature"] == "the optimizer changes the parameters before it evaluates its closure"
    assert len(column(run, "loss.value")) == STEPS


def test_a_closure_that_fails_is_the_trainings_affair(tmp_path: Path) -> None:
    """Oracle: definition. What it raises arrives; the next step is measured."""
    trainings.seed()
    model = nn.Linear(12, 5)
    opt = sgd(model.parameters())
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=1)):
        for i, (x, y) in enumerate(trainings.batches(4)):

            def closure(x: Tensor = x, y: Tensor = y, fails: bool = i == 1) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                if fails:
                    raise KeyError("data")
                loss.backward()
                return loss

            if i == 1:
                with pytest.raises(KeyError):
                    opt.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
            else:
                opt.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
    run = monitor.open(tmp_path / "run")
    assert run.series("sharpness.value")[0].tolist() == [0, 1, 2]
    assert not run.warnings


def test_a_step_without_a_backward_ends_nothing(tmp_path: Path) -> None:
    """Oracle: definition. A batch that is skipped costs its own measurement; three in a row cost the rest."""
    trainings.seed()
    model = nn.Linear(12, 5)
    opt = sgd(model.parameters())
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=1)):
        for i, (x, y) in enumerate(trainings.batches(12)):

            def closure(x: Tensor = x, y: Tensor = y, skipped: bool = i in (2, 5, 6, 8, 9, 10)) -> Tensor | None:
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                if skipped:
                    return None
                loss.backward()
                return loss

            opt.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
    run = monitor.open(tmp_path / "run")
    assert run.series("sharpness.value")[0].tolist() == [0, 1, 3, 4, 7]
    assert absent(run)["curvature"] == "no call of backward was seen"


def test_what_stands_for_a_closure_is_like_it() -> None:
    """Oracle: definition. Its result, its name, and only plain functions; an object may be more than it looks."""

    def closure(scale: float = 1.0) -> float:
        """Said."""
        return 2 * scale

    said: list[Any] = []
    heard = watched(closure, lambda: not said, said.append)
    assert (heard(), heard(3.0)) == (2, 6)
    assert said == [True]
    assert (heard.__name__, heard.__doc__) == ("closure", "Said.")
    opt = object()
    assert find_closure((opt, closure), {}) is find_closure((opt,), {"closure": closure}) is closure
    assert find_closure((opt, nn.Linear(1, 1)), {}) is find_closure((opt,), {}) is find_closure((opt, None), {}) is None
    assert with_closure((opt, closure, 1), {}, heard) == ((opt, heard, 1), {})
    assert with_closure((opt,), {"closure": closure, "b": 1}, heard) == ((opt,), {"closure": heard, "b": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_a_fingerprint_tells_one_bit(dtype: torch.dtype) -> None:
    """Oracle: planted fault. Any element of any parameter, however little it changes."""
    p = nn.Parameter(torch.randn(5, 7, dtype=dtype).T)
    opt = torch.optim.SGD([nn.Parameter(torch.ones(3)), p], lr=0.1)
    before = fingerprint(opt)
    assert torch.equal(before, fingerprint(opt))
    value = p.data[3, 2].clone()
    p.data[3, 2] = value * (1 + torch.finfo(dtype).eps)
    assert (before != fingerprint(opt)).tolist() == [False, True]
    p.data[3, 2] = value
    assert torch.equal(before, fingerprint(opt))


# ---- Lightning, as it is


def lightning_run(watch: Watch, keep: list[float] | None = None, **options: Any) -> str:
    """Two epochs of a module with parts, metrics that are logged, and a validation after each."""
    lightning = pytest.importorskip("lightning")
    torchmetrics = pytest.importorskip("torchmetrics")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh())
            self.head = nn.Linear(8, 5)
            self.criterion = nn.CrossEntropyLoss()
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=5)
            self.seen: list[Any] = []
            self.batches: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

        def training_step(self, batch: Any, _: int) -> Tensor:
            if keep is not None:
                self.batches.append(batch)
                size = options.get("accumulate_grad_batches", 1)
                if len(self.batches) % size == 0:
                    keep.append(self.sharpest(self.batches[-size:]))
            z = self.head(self.body(batch[0]))
            loss = self.criterion(z, batch[1])
            self.accuracy(z, batch[1])
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.seen.append(loss.detach())
            return loss

        def sharpest(self, batches: list[Any]) -> float:
            def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
                return torch.stack([F.cross_entropy(model(a), b) for a, b in batches]).mean()

            body = copy.deepcopy(nn.Sequential(self.body, self.head))
            body[0][1].track_running_stats = False  # pyright: ignore
            body[0][1].running_mean = body[0][1].running_var = None  # pyright: ignore
            return sharpness(body, loss, *batches[0])

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("held_out", F.cross_entropy(self(batch[0]), batch[1]))

        def on_train_epoch_end(self) -> None:
            self.seen.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})

        def configure_optimizers(self) -> Any:
            if options.get("gradient_clip_val") is None and options.get("lbfgs"):
                return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    lightning.seed_everything(0, verbose=False)
    data, held_out = (torch.utils.data.TensorDataset(torch.randn(48, 12), torch.randint(0, 5, (48,))) for _ in range(2))
    module = Module()
    watch(module)
    trainer = lightning.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, **{k: v for k, v in options.items() if k != "lbfgs"},
    )  # fmt: skip
    load = torch.utils.data.DataLoader
    trainer.fit(module, load(data, batch_size=8, shuffle=True), load(held_out, batch_size=24))
    digest = trainings.Digest()
    digest.add(module.seen)
    return digest.finish(module, *trainer.optimizers)


LIGHTNING: dict[str, dict[str, Any]] = {
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "plain": {},
    "bf16": {"precision": "bf16-mixed"},
    "scaled": {"precision": "16-mixed"},
    "lbfgs": {"lbfgs": True},
}


@pytest.mark.filterwarnings("ignore")  # its own, about the versions of what it stands on
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k.startswith("acc") else pytest.mark.slow) for k in LIGHTNING]
)
def test_lightning(kind: str, tmp_path: Path) -> None:
    """Oracle: invariance, and the dense float64 Hessian of each step's own batches, with their own batch statistics.

    Everything that was logged, the metric and its mean over the epoch too, is the same with and without.
    """
    options = LIGHTNING[kind]
    wanted: list[float] = []
    control = lightning_run(lambda _: None, wanted, **options)
    handles: list[monitor.Handle] = []
    curvature = Curvature(every=2, full=2)
    assert lightning_run(
        lambda m: handles.append(monitor.attach(m, tmp_path / "run", curvature=curvature)), **options
    ) == (control)
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    size = options.get("accumulate_grad_batches", 1)
    assert run.steps == 12 // size
    assert run.series("sharpness.value")[0].tolist() == list(range(0, run.steps, 2))
    assert column(run, "sharpness.examples") == [8 * size] * len(column(run, "sharpness.value"))
    if kind != "lbfgs":  # evaluated several times a step, also by what is to be compared with
        rel = 1e-4 if "precision" not in options else 0.02
        assert column(run, "sharpness.value") == pytest.approx(wanted[::2], rel=rel)
        assert not run.warnings
    assert not {"curvature", "loss"} & absent(run).keys()
    assert len(column(run, "loss.value")) == run.steps
    assert set(column(run, "loss.micro_steps")) == {size}
    assert ("clip.coefficient" in run.refs()) == ("gradient_clip_val" in options)
    assert len(column(run, "logged.value", "eval_loss")) == 2
