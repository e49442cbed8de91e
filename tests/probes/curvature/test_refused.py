"""What cannot be measured is refused, and the run says why."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import monitor
from monitor.diagnosis.remarks import remarks
from monitor.probes.curvature import Curvature
from tests.probes.curvature.runs import absent, column
from tests.record import trainings
from tests.record.trainings import Watch


def noisy(watch: Watch, steps: int = 12) -> nn.Module:
    """Gradients with noise, which no loss has."""
    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(model)
    for x, y in trainings.batches(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.add_(torch.randn_like(p.grad), alpha=0.05)
        opt.step()
    return model


def test_a_gradient_that_is_not_the_losss_is_refused(tmp_path: Path) -> None:
    """Oracle: planted fault. Nothing is recorded, and one line says why and what to pass."""
    handles: list[monitor.Handle] = []
    noisy(lambda m: handles.append(monitor.attach(m, tmp_path / "run", curvature=Curvature(every=2))))
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    assert "sharpness.value" not in run.refs()
    (warning,) = run.warnings
    assert "from step 4 on" in warning  # the third attempt
    assert "cosine" in warning
    assert "loss_closure=" in absent(run)["curvature"]


def test_a_loss_of_the_users_is_taken(tmp_path: Path) -> None:
    """Oracle: definition. The same training, measured on data of its own: the sharpness that `spectrum` gives."""
    x, y = torch.randn(32, 12), torch.randint(0, 5, (32,))
    found, model = [], nn.Module()
    for i, loss in enumerate(((F.cross_entropy, (x, y)), None)):
        handles: list[monitor.Handle] = []

        def watch(m: nn.Module, loss: Any = loss, i: int = i, handles: list[monitor.Handle] = handles) -> None:
            given = loss or (lambda: F.cross_entropy(m(x), y))
            curvature = Curvature(every=11, loss_closure=given, mode="eval")
            handles.append(monitor.attach(m, tmp_path / f"run{i}", curvature=curvature))

        model = noisy(watch, steps=12)
        handles[0].close()
        run = monitor.open(tmp_path / f"run{i}")
        assert not run.warnings
        found.append(column(run, "sharpness.value"))
    assert found[0] == found[1]
    assert len(found[0]) == 2
    # one more update would have been made on this
    later = monitor.curvature.spectrum(model, F.cross_entropy, (x, y), top=1, steps=0, samples=0).sharpness
    assert found[0][-1] == pytest.approx(later, rel=0.2)


@pytest.mark.parametrize("held_out", [False, True], ids=["the step's batch", "other data"])
def test_a_given_loss_is_told_from_that_of_the_training(held_out: bool, tmp_path: Path) -> None:
    """Oracle: planted fault. A loss whose gradient is the run's is that of the step; of other data nothing is judged.

    Trained far above the edge on one batch, it diverges: found by the sharpness of that batch alone.
    """
    trainings.seed()
    model = nn.Linear(12, 1)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    x, y = torch.randn(64, 12), torch.randn(64, 1)
    data = (torch.randn(64, 12), y) if held_out else (x, y)
    curvature = Curvature(every=1, loss_closure=(F.mse_loss, data))
    with monitor.attach(model, tmp_path / "run", curvature=curvature, every=1):
        for _ in range(12):
            opt.zero_grad()
            F.mse_loss(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert set(column(run, "sharpness.of_step")) == {float(not held_out)}
    assert ("above_edge_of_stability" in {f.rule for f in run.findings()}) != held_out
    told = [r.text for r in remarks(run, run.verdict()) if r.family == "curvature"]
    assert not any("learning rate allows" in text for text in told)


def test_losses_are_accepted_whatever_terms_they_have(tmp_path: Path) -> None:
    """Oracle: closed form. An L2 term of weight c adds 2c to every eigenvalue; a tape has it, a loss function not."""
    sharp = []
    for c in (0.0, 1.0):
        trainings.seed()
        model = trainings.mlp()
        opt = torch.optim.SGD(model.parameters(), lr=1e-3)
        folder = tmp_path / f"run{c}"
        with monitor.attach(model, folder, curvature=Curvature(every=1, full=9)):
            for x, y in trainings.batches(1):
                loss = F.cross_entropy(model(x), y) + c * sum(p.square().sum() for p in model.parameters())
                loss.backward()
                opt.step()
        sharp.append(column(monitor.open(folder), "sharpness.value")[0])
    assert sharp[1] - sharp[0] == pytest.approx(2, rel=1e-3)


def test_unknown_optimizers_have_a_sharpness_but_no_edge(tmp_path: Path) -> None:
    """Oracle: planted fault. One warning names the optimizer; the sharpness is there."""
    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.Rprop(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=2, full=9)):
        for x, y in trainings.batches(5):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert len(column(run, "sharpness.value")) == 3
    assert "edge_of_stability.ratio" not in run.refs()
    (warning,) = run.warnings
    assert "Rprop" in warning


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * ctx.saved_tensors[0].exp()


class Odd(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.linear, self.reentrant = nn.Linear(12, 5), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:
            return checkpoint(self.linear, x.requires_grad_(), use_reentrant=True)  # pyright: ignore
        return _OnceOnly.apply(self.linear(x))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("reentrant", "why"), [(True, "use_reentrant=False"), (False, "once_differentiable")])
def test_what_cannot_be_differentiated_twice_is_named(reentrant: bool, why: str, tmp_path: Path) -> None:
    """Oracle: planted fault. The reason stands in the run; training goes on."""
    trainings.seed()
    model = Odd(reentrant)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=2)):
        for x, y in trainings.batches(3):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert run.steps == 3
    assert why in absent(run)["curvature"]


@pytest.mark.slow
def test_the_whole_batch_of_several_processes_is_measured_as_told(tmp_path: Path) -> None:
    """Oracle: invariance. The run says that it has the first one's part alone, and how to measure the whole.

    Measured in both of two real processes between two steps, as told, both have the sharpness of all the data.
    """
    torch.multiprocessing.spawn(_rank, args=(tmp_path,), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    run = monitor.open(tmp_path / "run")
    assert run.steps == 4
    assert "that of the batch of all 2 processes" in absent(run)["curvature"]
    assert "in every process at once: monitor.curvature.spectrum(" in absent(run)["curvature"]
    assert run.series("sharpness.value")[0].tolist() == [0, 2]
    assert not run.warnings
    assert len(run.series("loss.value")[0]) == 4
    together = [float((tmp_path / f"sharpness{rank}").read_text()) for rank in (0, 1)]
    assert together[0] == together[1] == pytest.approx(float((tmp_path / "alone").read_text()), rel=1e-3)


def _rank(rank: int, folder: Path) -> None:
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    trainings.seed()
    model = nn.parallel.DistributedDataParallel(trainings.mlp())
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    seen: list[tuple[Tensor, Tensor]] = []
    with monitor.attach(model, folder / "run", curvature=Curvature(every=2)):
        for x, y in trainings.batches(4):
            seen.append((x, y))
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
            if len(seen) == 2:
                measure = partial(monitor.curvature.spectrum, top=1, steps=0, samples=0)
                x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
                closure = monitor.curvature.LossClosure(model, F.cross_entropy, seen[rank], group=dist.group.WORLD)
                (folder / f"sharpness{rank}").write_text(str(measure(model, closure).sharpness))
                if rank == 0:
                    (folder / "alone").write_text(str(measure(model.module, F.cross_entropy, (x, y)).sharpness))
    dist.destroy_process_group()
