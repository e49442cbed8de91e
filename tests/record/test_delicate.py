"""What a function mode would disturb: layers with a fast path, teachers, compiled functions; and odd tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor

pytestmark = pytest.mark.usefixtures("nothing_compiled")
STEPS = 23


class Encoder(nn.Module):
    """Means over padded tokens, which the fast path fills otherwise."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, 4:] = True
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


def frozen() -> Callable[[], Tensor]:
    """An encoder in evaluation inside the model that is trained."""
    model = Encoder()
    model.encoder.requires_grad_(False)
    model.encoder.eval()
    return training(model, lambda x: F.cross_entropy(model(x), torch.arange(4) % 3))


def taught() -> Callable[[], Tensor]:
    """A teacher that is called after the student, while the mode waits for the step."""
    model, teacher = Encoder(), Encoder().eval()

    def loss(x: Tensor) -> Tensor:
        given = model(x)
        with torch.no_grad():
            wanted = teacher(x)
        return F.mse_loss(given, wanted)

    return training(model, loss)


def taught_late() -> Callable[[], Tensor]:
    """A teacher that is made after some steps."""
    model, teachers = Encoder(), []

    def loss(x: Tensor) -> Tensor:
        given = model(x)
        if len(teachers) < 12:
            teachers.append(Encoder().eval())
        with torch.no_grad():
            wanted = teachers[-1](x)
        return F.mse_loss(given, wanted)

    return training(model, loss)


def taught_by_a_layer() -> Callable[[], Tensor]:
    """A teacher that leaves its fast path for a hook as well."""
    model, teacher = Encoder(), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()

    def loss(x: Tensor) -> Tensor:
        given = model(x)
        with torch.no_grad():
            wanted = teacher(x)
        return F.mse_loss(given, wanted[:, 0, :3])

    return training(model, loss)


def taught_by_itself() -> Callable[[], Tensor]:
    """A part of the model is called in evaluation, while the mode waits for the step."""
    model = Encoder()

    def loss(x: Tensor) -> Tensor:
        given = model(x)
        model.encoder.eval()
        with torch.no_grad():
            wanted = model.encoder(x)
        model.encoder.train()
        return F.mse_loss(given, wanted[:, 0, :3])

    return training(model, loss)


class Gated(nn.Module):
    """Calls a compiled function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 3)
        self.gate = torch.compile(lambda x: x * torch.sigmoid(1.7 * x), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.gate(self.first(x.mean(1))))


def compiled() -> Callable[[], Tensor]:
    """A compiled function in a model that is not: nothing may be compiled again."""
    model = Gated()
    return training(model, lambda x: F.cross_entropy(model(x), torch.arange(4) % 3))


def training(model: nn.Module, loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """One step after another, each with its loss; ``model`` is what is recorded."""
    opt = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)

    def step() -> Tensor:
        opt.zero_grad()
        value = loss(torch.randn(4, 6, 16))
        value.backward()
        opt.step()
        return value.detach()

    step.model = model  # type: ignore[attr-defined]
    return step


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:The .grad attribute")
@pytest.mark.parametrize("made", [frozen, taught, taught_late, taught_by_a_layer, taught_by_itself, compiled])
def test_it_trains_to_the_same_bits(made: Callable[[], Callable[[], Tensor]], tmp_path: Path) -> None:
    """Oracle: invariance. Losses and parameters, at all the cadences, and no region is compiled twice."""

    def bits(record: bool) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        step = made()
        model: nn.Module = step.model  # type: ignore[attr-defined]
        handle = monitor.attach(model, tmp_path / "run") if record else None
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses = [step() for _ in range(STEPS)]
        if handle is not None:
            handle.close()
        return [*losses, *(p.detach() for p in model.parameters())]

    plain, recorded = bits(False), bits(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    run = monitor.open(tmp_path / "run")
    assert run.series("loss.value")[1].tolist() == [float(x) for x in plain[:STEPS]]
    said = [a["why"] for a in run.info["absent"] if "fast path" in a["why"]]
    assert len(said) == (made is frozen)
    assert not run.warnings


def test_a_part_of_a_loss_is_not_recorded_as_the_whole(tmp_path: Path) -> None:
    """Oracle: definition. Of two calls of backward one moves into the forward: its steps are right, or absent."""
    inner, inside = nn.Linear(6, 3), False

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, own: bool) -> Tensor:
            loss = F.mse_loss(self.inner(x), torch.ones(4, 3))
            if own:
                loss.backward()
            return loss.detach() if own else loss

    model = Model()
    opt, sums = torch.optim.SGD(model.parameters(), lr=0.05), []
    with monitor.attach(model, tmp_path / "run"):
        for i in range(STEPS):
            opt.zero_grad()
            inside = i >= 12
            first, second = model(torch.randn(4, 6), False), model(torch.randn(4, 6), inside)
            first.backward()
            if not inside:
                second.backward()
            opt.step()
            sums.append(float(first.detach() + second.detach()))
    steps, values = monitor.open(tmp_path / "run").series("loss.value")
    assert len(steps) >= STEPS - 3
    assert values.tolist() == pytest.approx([sums[i] for i in steps], rel=1e-6)


class Teacher(nn.Module):
    """In evaluation, with layers that have a fast path; ``student`` is called by it, and is no part of it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.student = [student]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.student[0](x)


def test_a_teacher_that_calls_its_student(tmp_path: Path) -> None:
    """Oracle: invariance. The loss of a step whose second forward a module beside the model makes is counted once."""
    student = nn.Linear(8, 3)
    teacher, sums = Teacher(student), []
    opt = torch.optim.SGD(student.parameters(), lr=0.05)
    with monitor.attach(student, tmp_path / "run"):
        for _ in range(STEPS):
            opt.zero_grad()
            x = torch.randn(4, 8)
            loss = F.cross_entropy(student(x) + teacher(x), torch.arange(4) % 3)
            loss.backward()
            opt.step()
            sums.append(loss.item())
    run = monitor.open(tmp_path / "run")
    assert run.series("loss.value")[1].tolist() == sums
    assert not run.warnings


class Odd(nn.Module):
    """Does not tell its parts."""

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        raise RuntimeError("not mine to tell")


def test_modules_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """Oracle: definition. One whose construction was given up, and one that refuses, are left alone."""
    held = [nn.Linear.__new__(nn.Linear), Odd(), Teacher(nn.Linear(8, 3))]
    model = nn.Linear(8, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(3):
            opt.zero_grad()
            given = model(torch.randn(4, 8))
            held[2].modules = held[1].modules  # refuses from now on
            (given - held[2].encoder(torch.ones(4, 1, 8))[:, 0, :3]).square().sum().backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    assert len(run.series("loss.value")[0]) == 3


def test_gradients_and_inputs_with_a_negative_bit(tmp_path: Path) -> None:
    """Oracle: closed form. Lazily negated tensors are read as what they stand for."""
    model = nn.Linear(6, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    norms = []
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(3):
            opt.zero_grad()
            x = torch.randn(4, 6, dtype=torch.complex64).conj().imag
            assert x.is_neg()
            model(x).square().sum().backward()
            assert model.weight.grad is not None
            model.weight.grad = torch.complex(model.weight.grad, -model.weight.grad).conj().imag
            norms.append(float(model.weight.grad.norm()))
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    assert run.series("grad_norm.norm", "weight")[1].tolist() == pytest.approx(norms, rel=1e-5)
