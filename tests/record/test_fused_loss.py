"""Large vocabularies: no second copy of the logits, and losses that never hold them at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import monitor

K = 152_064  # classes of a large vocabulary
LCE = getattr(F, "linear_cross_entropy", None)
fused = pytest.mark.skipif(LCE is None, reason="this torch has no linear_cross_entropy")
PROC = Path("/proc/self")


class Head(nn.Module):
    """Hidden states and their logits, or the loss without the logits."""

    def __init__(self, classes: int, width: int = 8, options: object = None) -> None:
        super().__init__()
        self.first, self.out, self.options = nn.Linear(4, width), nn.Linear(width, classes), options

    def forward(self, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
        h = torch.tanh(self.first(x))
        if not fuse:
            return F.cross_entropy(self.out(h), y)
        assert LCE is not None
        return LCE(h, self.out.weight, y, linear_bias=self.out.bias, options=self.options)


def rows(count: int, classes: int, ignored: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 4, generator=g), torch.randint(0, classes, (count,), generator=g)
    y[:ignored] = -100
    return x, y


def peak(step: Callable[[], object]) -> int:
    """Bytes of memory by which the process grew at most while ``step`` ran."""
    if not (PROC / "clear_refs").exists():
        pytest.skip("the peak of this process cannot be reset here")
    (PROC / "clear_refs").write_text("5")
    before = int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    step()
    line = next(x for x in (PROC / "status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1]) - before


def extra(count: int, fuse: bool, folder: Path, ignored: int = 0) -> int:
    """Bytes that the peak of a recorded step lies above that of the same step alone."""
    x, y = rows(count, K, ignored)
    model = Head(K, options=torch.nn.LinearCrossEntropyOptions() if fuse else None)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        opt.zero_grad()
        model(x, y, fuse).backward()
        opt.step()

    step()
    alone = peak(step)
    with monitor.attach(model, folder):
        step()
        watched = peak(step)
    run = monitor.open(folder)
    name = "linear_cross_entropy" if fuse else "cross_entropy"
    assert run.series("log_z.mean", name)[1] == pytest.approx(11.9, abs=0.3)
    assert not run.warnings
    return watched - alone


def test_no_second_copy_of_the_logits(tmp_path: Path) -> None:
    """Oracle: closed form. 256 rows of 152,064 classes are 156 MB; recording takes less than a tenth of that more."""
    assert extra(256, False, tmp_path / "run", ignored=100) < 0.1 * 4 * 256 * K


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [0, 500])
def test_no_second_copy_of_many_logits(ignored: int, tmp_path: Path) -> None:
    """Oracle: closed form, at 2,048 rows: logits of 1.25 GB, of which recording takes less than 5 % more."""
    assert extra(2048, False, tmp_path / "run", ignored) < 0.05 * 4 * 2048 * K


@pytest.mark.slow
@fused
def test_a_loss_without_logits_stays_without(tmp_path: Path) -> None:
    """Oracle: closed form. 16 rows are made: 10 MB of logits, three such at most, where all would be 1.25 GB."""
    assert extra(2048, True, tmp_path / "run") < 3.5 * 4 * 16 * K


@fused
@pytest.mark.parametrize("chunked", [False, True])
def test_fused_rows_are_those_of_the_logits(chunked: bool, tmp_path: Path) -> None:
    """Oracle: independent library: torch's logits of the same rows, all of them since there are only twelve."""
    torch.manual_seed(0)
    x, y = rows(12, 30, ignored=2)
    model = Head(30, options=torch.nn.LinearCrossEntropyOptions() if chunked else None)
    z = (model.out(torch.tanh(model.first(x)))).detach()[2:].double()
    accuracy = (z.argmax(1) == y[2:]).double().mean().item()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(25):
            opt.zero_grad()
            model(x, y, True).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    name = "linear_cross_entropy"
    steps, log_z = run.series("log_z.mean", name)
    assert steps.tolist() == [*range(10), 20]
    assert log_z[0] == pytest.approx(z.logsumexp(1).mean().item(), rel=1e-6)
    assert run.series("logit_scale.max", name)[1][0] == pytest.approx(z.max().item(), rel=1e-6)
    assert run.series("logit_norm.rows", name)[1][0] == 10
    assert run.series("train_accuracy.accuracy", name)[1][0] == pytest.approx(accuracy)
    assert len(run.series("loss.value")[0]) == 25
    assert not run.warnings
    assert not any("cross_entropy" in a["why"] for a in run.info["absent"])


@fused
def test_what_is_no_plain_classification_is_left_alone(tmp_path: Path) -> None:
    """Oracle: invariance. Probabilities as targets: the same parameters as unrecorded, and no rows of logits."""

    def train(folder: Path | None) -> Tensor:
        torch.manual_seed(0)
        x, _ = rows(12, 5)
        y = torch.full((12, 5), 0.2)
        model = Head(5)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = monitor.attach(model, folder) if folder else None
        for _ in range(3):
            opt.zero_grad()
            model(x, y, True).backward()
            opt.step()
        if handle:
            handle.close()
        return model.out.weight.detach()

    control = train(None)
    assert torch.equal(train(tmp_path / "run"), control)
    run = monitor.open(tmp_path / "run")
    assert not run.warnings and not any(r.startswith("log_z") for r in run.refs())


@pytest.mark.parametrize("how", ["bfloat16", "hooked", pytest.param("tokens", marks=pytest.mark.slow)])
def test_no_second_copy_however_the_logits_come(how: str, tmp_path: Path) -> None:
    """Oracle: closed form. In 16 bits, as (batch, class, token) and where autograd's copy cannot be read: a quarter.

    The call of the loss is measured by itself: backward takes more and would hide it.
    """
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(4, K, dtype=dtype)
    x, y = torch.randn(256, 4, generator=g).to(dtype), torch.randint(0, K, (256,), generator=g)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> int:
        opt.zero_grad()
        z = model(x)
        z, target = (z.view(2, 128, K).transpose(1, 2), y.view(2, 128)) if how == "tokens" else (z, y)
        made: list[Tensor] = []

        def call() -> None:
            with saved_tensors_hooks(lambda t: t, lambda t: t) if how == "hooked" else nullcontext():
                made.append(F.cross_entropy(z, target))

        most = peak(call)
        made[0].backward()
        opt.step()
        return most

    alone = [step(), step()][1]
    with monitor.attach(model, tmp_path / "run"):
        watched = [step(), step()][1]
    run = monitor.open(tmp_path / "run")
    assert run.series("logit_norm.rows", "cross_entropy")[1].tolist() == [256, 256]
    assert run.series("log_z.mean", "cross_entropy")[1] == pytest.approx(12.3, abs=0.5)
    assert not run.warnings
    assert watched - alone < 0.25 * 256 * K * dtype.itemsize
