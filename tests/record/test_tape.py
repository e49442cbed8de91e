"""A step that was taped can be computed again: same loss, same gradient, and the training does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.probe import Moment, Probe
from tests.record import trainings
from tests.record.trainings import Watch


class Echo(Probe):
    """Replays every step and keeps how far its loss and gradient are from the run's, as ``(loss, cosine, ratio)``."""

    name = "echo"
    every = 1
    taped = True

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []
        self.calls = 0

    def measure(self, moment: Moment) -> None:
        trained = [p for g in moment.optimizer.param_groups for p in g["params"] if p.grad is not None]
        kept = [(b, b.clone()) for m in moment.models for b in m.buffers()]
        with torch.enable_grad():
            loss = sum((tape.replay() for tape in moment.tapes), start=torch.zeros(()))
            scale = moment.recorder.inverse_scale
            again = torch.autograd.grad(loss if scale is None else loss * scale.item(), trained, allow_unused=True)
        a = torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(trained, again, strict=True)]
        )
        b = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        cosine = float(F.cosine_similarity(a.double(), b.double(), dim=0))
        was = sum(tape.loss or 0.0 for tape in moment.tapes) or float(loss)  # not read where it has several elements
        self.seen.append((abs(float(loss) - was) / abs(was), cosine, float(b.norm() / a.norm())))
        with torch.enable_grad():
            self.calls = max(self.calls, *(len(t.calls(F.cross_entropy)) for t in moment.tapes))
        for buffer, before in kept:  # a replay by itself does not put them back: LossClosure and evaluation() do
            buffer.copy_(before)


def followed(training: Callable[[Watch], str], folder: Path, probe: Probe) -> tuple[str, monitor.Run]:
    """The digest of ``training`` with a probe at every step, and what was recorded."""
    handles: list[monitor.Handle] = []
    digest = training(lambda m: handles.append(monitor.attach(m, folder, probes=probe)))
    handles[0].close()
    return digest, monitor.open(folder)


#: A reentrant checkpoint refuses `autograd.grad`.
REPLAYED = [t for t in trainings.ALL if t is not trainings.checkpointing_reentrant]


class Untouched(Probe):
    """Replays every step where everything is put back."""

    name = "untouched"
    every = 1
    taped = True
    keeps_first = True

    def measure(self, moment: Moment) -> None:
        assert moment.first is not None
        with moment.evaluation():
            moment.first.replay()
            for tape in moment.tapes:
                tape.replay()
            torch.rand(3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", trainings.ALL, ids=lambda f: f.__name__)
def test_training_does_not_notice(training: Callable[[Watch], str], tmp_path: Path) -> None:
    """Oracle: invariance. Hash of parameters, optimizer state, losses, evaluations and all random generators."""
    digest, _ = followed(training, tmp_path / "run", Untouched())
    assert digest == training(lambda _: None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", REPLAYED, ids=lambda f: f.__name__)
def test_gradient_is_the_runs(training: Callable[[Watch], str], tmp_path: Path) -> None:
    """Oracle: independent library. Autograd's gradient of the replay is the one that the optimizer was given."""
    probe = Echo()
    followed(training, tmp_path / "run", probe)
    assert len(probe.seen) > 5
    half = training in (trainings.autocast, trainings.scaler)  # replayed in float32
    loss, cosine, ratio = zip(*probe.seen, strict=True)
    assert max(loss) < (0.01 if half else 1e-6)
    assert min(cosine) > (0.995 if half else 1 - 1e-6)
    if training not in (trainings.clipping, trainings.scaler):  # whose gradients were clipped
        assert max(ratio) == pytest.approx(1, abs=0.02 if half else 1e-5)


def trained(model: nn.Module, loss_of: Callable[[nn.Module, Tensor, Tensor], Iterable[Tensor]], folder: Path) -> Echo:
    """Five steps of ``model``; ``loss_of`` gives the arguments of `backward`."""
    probe = Echo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with monitor.attach(model, folder, probes=[probe]):
        for x, y in trainings.batches(5):
            optimizer.zero_grad()
            loss, *gradient = loss_of(model, x, y)
            loss.backward(gradient[0] if gradient else None)
            optimizer.step()
    return probe


def _contrastive(model: nn.Module, x: Tensor, y: Tensor) -> Iterable[Tensor]:
    a, b = model(x), model(x + 0.1 * torch.randn_like(x))
    yield F.cross_entropy(a @ b.T, torch.arange(len(x)))


def _own_terms(model: nn.Module, x: Tensor, y: Tensor) -> Iterable[Tensor]:
    out = model(x)
    out = out.clone()
    out[:, 0] = 0.5 * out[:, 1]
    out += 0.1
    with torch.no_grad():
        weight = out.softmax(1).amax(1)
    yield (weight * F.cross_entropy(out, y, reduction="none")).mean() + 1e-2 * sum(
        p.square().sum() for p in model.parameters()
    )


def _gradient_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Iterable[Tensor]:
    x.requires_grad_()
    loss = F.cross_entropy(model(x), y)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    yield loss + slope.square().sum()


def _given_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Iterable[Tensor]:
    losses = F.cross_entropy(model(x), y, reduction="none")
    yield losses
    yield torch.linspace(0, 1, len(losses))


@pytest.mark.parametrize("loss_of", [_contrastive, _own_terms, _gradient_penalty, _given_gradient])
def test_whatever_the_loss_is(loss_of: Callable[[nn.Module, Tensor, Tensor], Iterable[Tensor]], tmp_path: Path) -> None:
    """Oracle: independent library. Two forwards, terms and in-place changes of the user's own, double backward."""
    trainings.seed()
    probe = trained(trainings.mlp(), loss_of, tmp_path / "run")
    assert len(probe.seen) == 5
    for _, cosine, ratio in probe.seen:
        assert cosine > 1 - 1e-9
        assert ratio == pytest.approx(1, abs=1e-6)


def test_calls_are_found_inside_and_outside_the_model(tmp_path: Path) -> None:
    """Oracle: planted fault. A model that computes its own cross-entropy shows it as one outside does."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trainings.mlp()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.inner(x), y)}

    trainings.seed()
    assert trained(Own(), lambda m, x, y: [m(x, y)["loss"]], tmp_path / "a").calls == 1
    assert trained(trainings.mlp(), lambda m, x, y: [F.cross_entropy(m(x), y)], tmp_path / "b").calls == 1


def test_a_loss_from_elsewhere_is_named(tmp_path: Path) -> None:
    """Oracle: planted fault. A loss that no seen call gave is not replayed, and the run says why."""
    trainings.seed()
    model = trainings.mlp()
    cut = trained(model, lambda m, x, y: [_Opaque.apply(m(x))], tmp_path / "run")
    assert not cut.seen
    (why,) = (a["why"] for a in monitor.open(tmp_path / "run").info["absent"] if a["what"] == "echo")
    assert "the loss" in why


class _Opaque(torch.autograd.Function):
    """A function of the user's own, which no function mode sees."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.sum()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return g.expand(16, 5)


def test_a_failing_probe_costs_only_itself(tmp_path: Path) -> None:
    """Oracle: planted fault. The training goes on bit for bit, the run names the probe once."""

    class Broken(Probe):
        name = "broken"
        every = 2

        def measure(self, moment: Moment) -> None:
            with moment.evaluation():
                moment.model.register_buffer("left", torch.zeros(1))
                raise ValueError("no such thing")

    digest, run = followed(trainings.plain, tmp_path / "run", Broken())
    assert digest == trainings.plain(lambda _: None)
    assert [w for w in run.warnings if "broken" in w] == [
        "broken is not measured from step 0 on: ValueError: no such thing"
    ]


def test_the_share_of_time_is_kept(tmp_path: Path) -> None:
    """Oracle: closed form. A probe that takes a known time is run as often as its share allows, and no more."""

    class Slow(Probe):
        name = "slow"
        share = 0.25
        taken = 0

        def measure(self, moment: Moment) -> None:
            self.taken += 1
            sum(i * i for i in range(20_000))

    probe = Slow()
    _, run = followed(trainings.attention, tmp_path / "run", probe)
    assert 0 < run.info["overhead"]["probes"] < 0.35
    assert probe.taken > 1
