"""The first promise: a recorded training is the same training, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import monitor
from tests.record import trainings
from tests.record.trainings import Watch


def watched(training: Callable[[Watch], str], folder: Path) -> tuple[str, monitor.Run]:
    """The digest of ``training`` with the monitor, and what was recorded."""
    handles: list[monitor.Handle] = []
    digest = training(lambda m: handles.append(monitor.attach(m, folder)))
    assert handles[0].recording
    handles[0].close()
    assert not _get_current_function_mode_stack()
    run = monitor.open(folder)
    assert not run.warnings
    return digest, run


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", trainings.ALL, ids=lambda f: f.__name__)
def test_bitwise_equal(training: Callable[[Watch], str], tmp_path: Path) -> None:
    """Oracle: invariance. Hash of parameters, optimizer state, losses, evaluations and all random generators."""
    control = training(lambda _: None)
    digest, run = watched(training, tmp_path / "run")
    assert digest == control
    assert run.steps > 5
    assert len(run.series("grad_norm_total.norm")[0]) == run.steps


def test_accumulated_loss_is_the_mean(tmp_path: Path) -> None:
    """Oracle: closed form. Four losses divided by four are recorded as their mean, in float32."""
    losses: list[float] = []

    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor.attach(model, tmp_path / "run")
    for i, (x, y) in enumerate(trainings.batches(12)):
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        (loss / 4).backward()
        if i % 4 == 3:
            opt.step()
            opt.zero_grad()
    monitor.attach(model, tmp_path / "other").close()  # ends the first recording
    steps, values = monitor.open(tmp_path / "run").series("loss.value")
    assert steps.tolist() == [0, 1, 2]
    for k in range(3):
        assert values[k] == pytest.approx(sum(losses[4 * k : 4 * k + 4]) / 4, rel=1e-6)


def test_skipped_updates_are_counted_and_belong_to_no_row(tmp_path: Path) -> None:
    """Oracle: planted fault. A loss scale of 2^30 overflows float16 until it has halved often enough."""
    _, run = watched(trainings.scaler, tmp_path / "run")
    steps, skipped = run.series("loss_scale.skipped")
    scale = run.series("loss_scale.scale")[1]
    assert run.steps + skipped.sum() == 30
    assert skipped[0] == 11  # 2^30 -> 2^19
    assert scale[0] == 2.0**19
    assert (run.series("loss.value")[1] < 3).all()  # unscaled
    assert steps[0] == 0


def test_closure_losses_are_those_at_the_parameters_of_the_step(tmp_path: Path) -> None:
    """Oracle: definition. LBFGS returns the loss of its first evaluation, which is what a step records."""
    returned: list[float] = []
    original = torch.optim.LBFGS.step

    class Kept(torch.optim.LBFGS):
        def step(self, closure):
            loss = original(self, closure)
            returned.append(loss.item())
            return loss

    trainings.seed()
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    opt = Kept(model.parameters(), lr=0.5, max_iter=4)
    with monitor.attach(model, tmp_path / "run"):
        for x, y in trainings.batches(5):

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                opt.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)
    assert monitor.open(tmp_path / "run").series("loss.value")[1] == pytest.approx(returned, rel=1e-6)


class Counting(TorchFunctionMode):
    """A user's own mode."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Count."""
        type(self).calls += 1
        return func(*args, **(kwargs or {}))


def test_a_users_own_mode_stays_where_it_was_and_sees_what_it_saw(tmp_path: Path) -> None:
    """Oracle: invariance. Attached inside a user's mode, the stack after its block is empty and its count unchanged."""

    def train(watch: Watch) -> int:
        trainings.seed()
        Counting.calls = 0
        with Counting():
            trainings.plain(watch)
        assert not _get_current_function_mode_stack()
        return Counting.calls

    control = train(lambda _: None)
    handles: list[monitor.Handle] = []
    assert train(lambda m: handles.append(monitor.attach(m, tmp_path / "run"))) == control
    handles[0].close()
    assert len(monitor.open(tmp_path / "run").series("loss.value")[0]) == 30


def test_operators_are_counted_as_before(tmp_path: Path) -> None:
    """Oracle: invariance. A dispatch mode (as a FLOP counter is) sees the training's operators and none of ours."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def train(watch: Watch) -> list[str]:
        with Ops() as ops:
            trainings.plain(watch)
        return ops.seen

    control = train(lambda _: None)
    handles: list[monitor.Handle] = []
    seen = train(lambda m: handles.append(monitor.attach(m, tmp_path / "run")))
    handles[0].close()
    assert seen == control


def test_no_activation_outlives_its_step(tmp_path: Path) -> None:
    """Oracle: invariance. Outputs and gradients are freed when the training lets go of them."""
    import gc
    import weakref

    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.AdamW(model.parameters())
    alive: list[weakref.ref[torch.Tensor]] = []
    with monitor.attach(model, tmp_path / "run"):
        for x, y in trainings.batches(3):
            out = model(x)
            loss = nn.functional.cross_entropy(out, y)
            loss.backward()
            alive += [
                weakref.ref(out),
                weakref.ref(loss),
                *(weakref.ref(p.grad) for p in model.parameters() if p.grad is not None),
            ]
            opt.step()
            opt.zero_grad()
            del out, loss
            gc.collect()
            assert not [r for r in alive if r() is not None]


def test_tied_and_frozen_parameters(tmp_path: Path) -> None:
    """Oracle: definition. A tied tensor is recorded once, under its first name; a frozen one gives no finding."""
    trainings.seed()
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with monitor.attach(model, tmp_path / "run"):
        for x, y in trainings.batches(25):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert run.modules("grad_norm.norm") == ("0.weight", "0.bias", "1.bias", "2.weight")
    facts = {p["name"]: p for p in run.facts["parameters"]}
    assert facts["0.weight"]["tied_to"] == ["1.weight"]
    assert not facts["2.bias"]["trainable"]
    assert not run.findings()
