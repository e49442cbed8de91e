"""Gradients that are used again: every way of not doing so, and the mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.passes.gradient_reuse import reuse, same, sample
from monitor.record.sites import reuse as site

#: One iteration of a training, given the number of it.
Step = Callable[[int], object]

UPDATES = 40
RULES = ("gradients_carried_over", "update_without_backward")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=lr)


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(torch.randn(16, 8)), torch.randint(0, 3, (16,)))


def default() -> tuple[nn.Module, Step]:
    model = mlp()
    optimizer = adam(model)

    def step(i: int) -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return model, step


def zeros_after_the_step() -> tuple[nn.Module, Step]:
    model = mlp()
    optimizer = adam(model)

    def step(i: int) -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return model, step


def zeros_nobody_counts() -> tuple[nn.Module, Step]:
    """Through ``.data``, which autograd does not see, right before backward; the model's first half is frozen later."""
    model = mlp()
    optimizer = adam(model)

    def step(i: int) -> None:
        model[0].requires_grad_(i < 20)
        value = loss(model)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.data.zero_()
        value.backward()
        optimizer.step()

    return model, step


def accumulation() -> tuple[nn.Module, Step]:
    model = mlp()
    optimizer = adam(model)

    def step(i: int) -> None:
        for _ in range(3):
            (loss(model) / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return model, step


def adversaries() -> tuple[nn.Module, Step]:
    """Each network's gradients meet the other's backward, which here even adds to them, before they are zeroed."""
    makes, judges = nn.Linear(8, 8), nn.Linear(8, 1)
    maker, judge = adam(makes), adam(judges)

    def step(i: int) -> None:
        judge.zero_grad(set_to_none=False)
        made = makes(torch.randn(16, 8))
        (F.softplus(judges(made)) + F.softplus(-judges(torch.randn(16, 8)))).mean().backward()
        judge.step()
        maker.zero_grad(set_to_none=False)
        F.softplus(-judges(makes(torch.randn(16, 8)))).mean().backward()
        maker.step()

    return nn.ModuleList([makes, judges]), step


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.value = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.head(hidden), self.value(hidden)


def a_backward_nobody_sees() -> tuple[nn.Module, Step]:
    """Between the two updates that follow one forward nobody looks, and there the trunk's gradients are zeroed."""
    model = Shared()
    heads, trunk = adam(model.head), adam(model.trunk)

    def step(i: int) -> None:
        z, v = model(torch.randn(16, 8))
        first, second = F.cross_entropy(z, torch.randint(0, 3, (16,))), (v - 9).square().mean()
        heads.zero_grad(set_to_none=False)
        first.backward(retain_graph=True)
        heads.step()
        trunk.zero_grad(set_to_none=False)
        second.backward()
        trunk.step()

    return model, step


def closures() -> tuple[nn.Module, Step]:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure() -> float:
        optimizer.zero_grad(set_to_none=False)
        value = loss(model)
        value.backward()
        return value.item()

    return model, lambda i: optimizer.step(closure)


def skipped_updates() -> tuple[nn.Module, Step]:
    model = mlp()
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss(model) * (float("inf") if i % 7 == 3 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()

    return model, step


def two_backwards_for_one_update() -> tuple[nn.Module, Step]:
    """Sharpness-aware: a step up, a second backward there, the update with that."""
    model = mlp()
    optimizer = adam(model)

    def step(i: int) -> None:
        loss(model).backward()
        with torch.no_grad():
            up = [0.05 * p.grad / p.grad.norm() for p in model.parameters() if p.grad is not None]
            torch._foreach_add_(list(model.parameters()), up)
        optimizer.zero_grad(set_to_none=False)
        loss(model).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), up)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return model, step


def momentum_kept_in_the_gradient() -> tuple[nn.Module, Step]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(i: int) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.9)
        loss(model).backward()
        optimizer.step()

    return model, step


def gradients_by_hand() -> tuple[nn.Module, Step]:
    """The first half's gradients are written where those of the second half's backward have been added up."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    first, last = adam(model[0]), adam(model[2])

    def step(i: int) -> None:
        last.zero_grad()
        loss(model).backward()
        last.step()
        for p, g in zip(model[0].parameters(), torch.autograd.grad(loss(model), [*model[0].parameters()]), strict=True):
            assert p.grad is not None
            p.grad.copy_(g)
        first.step()

    return model, step


def sparse_gradients() -> tuple[nn.Module, Step]:
    model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(model(torch.randint(0, 50, (16,))), torch.randint(0, 3, (16,))).backward()
        optimizer.step()

    return model, step


class OfAParent(torch.optim.Adam):
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().step(closure)


def a_step_that_calls_its_parents() -> tuple[nn.Module, Step]:
    """Torch tells of both steps, once some optimizer of the parent class has been made."""
    adam(mlp())
    model = mlp()
    optimizer = OfAParent(model.parameters())

    def step(i: int) -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    return model, step


def the_same_gradient_again() -> tuple[nn.Module, Step]:
    """A loss that is linear, and one batch: every gradient is the one before, and every one is new."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(i: int) -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 8)).mean().backward()
        optimizer.step()

    return model, step


HEALTHY = (
    default, zeros_nobody_counts, accumulation, adversaries, a_backward_nobody_sees, gradients_by_hand,
    a_step_that_calls_its_parents,
)  # fmt: skip
MORE = (
    zeros_after_the_step, closures, skipped_updates, two_backwards_for_one_update, momentum_kept_in_the_gradient,
    sparse_gradients, the_same_gradient_again,
)  # fmt: skip


def recorded(made: Callable[[], tuple[nn.Module, Step]], folder: Path) -> monitor.Run:
    torch.manual_seed(0)
    model, step = made()
    with monitor.attach(model, folder):
        for i in range(UPDATES):
            step(i)
    return monitor.open(folder)


def found(run: monitor.Run) -> list[tuple[str, str]]:
    return [(f.rule, f.module) for f in run.findings() if f.rule in RULES]


@pytest.mark.parametrize("made", [*HEALTHY, *(pytest.param(made, marks=pytest.mark.slow) for made in MORE)])
def test_nothing_is_used_again(made: Callable[[], tuple[nn.Module, Step]], tmp_path: Path) -> None:
    """Oracle: planted fault, absent. However gradients are zeroed, nothing is carried over; it was looked for."""
    run = recorded(made, tmp_path / "run")
    assert not run.info["warnings"]
    assert found(run) == []
    shares = [run.series("gradient_reuse.share", m)[1] for m in run.modules("gradient_reuse.share")]
    assert sum(map(len, shares)) >= 10 and all((s == 0).all() for s in shares)


def test_a_step_that_calls_its_parents_is_one(tmp_path: Path) -> None:
    """Oracle: definition. An update is a step, however many methods tell of it."""
    run = recorded(a_step_that_calls_its_parents, tmp_path / "run")
    assert run.steps == UPDATES
    assert len(run.series("loss.value")[0]) == UPDATES


def never_zeroed(clip: float | None) -> tuple[nn.Module, Step]:
    model = mlp()
    optimizer = adam(model)

    def step(i: int) -> None:
        loss(model).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    return model, step


def another_model_zeroed() -> tuple[nn.Module, Step]:
    """Four micro-batches under a loss scale; what is zeroed is the model the trained one was made of."""
    model, old = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(i: int) -> None:
        old.zero_grad()
        for _ in range(4):
            scaler.scale(loss(model) / 4).backward()
        scaler.step(optimizer)
        scaler.update()

    return model, step


def one_of_two_forgotten() -> tuple[nn.Module, Step]:
    makes, judges = nn.Linear(8, 8), nn.Linear(8, 1)
    judge, maker = adam(judges), adam(makes)

    def step(i: int) -> None:
        judge.zero_grad()
        made = makes(torch.randn(16, 8)).detach()
        (F.softplus(judges(made)) + F.softplus(-judges(torch.randn(16, 8)))).mean().backward()
        judge.step()
        F.softplus(-judges(makes(torch.randn(16, 8)))).mean().backward()
        maker.step()

    return nn.ModuleList([makes, judges]), step


def steps_for_one_backward(count: int) -> tuple[nn.Module, Step]:
    model = mlp()
    optimizer = adam(model)

    def step(i: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        loss(model).backward()
        for _ in range(count):
            optimizer.step()

    return model, step


def two_optimizers_step_twice() -> tuple[nn.Module, Step]:
    model = mlp()
    optimizers = [adam(model[0]), adam(model[4])]

    def step(i: int) -> None:
        model.zero_grad()
        loss(model).backward()
        for optimizer in 2 * optimizers:
            optimizer.step()

    return model, step


CARRIED, REPEATED = RULES


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        pytest.param(lambda: never_zeroed(None), [(CARRIED, "")], marks=pytest.mark.slow),
        (lambda: never_zeroed(0.5), [(CARRIED, "")]),
        pytest.param(another_model_zeroed, [(CARRIED, "")], marks=pytest.mark.slow),
        (one_of_two_forgotten, [(CARRIED, "optimizer[1]")]),
        (lambda: steps_for_one_backward(2), [(REPEATED, "")]),
        pytest.param(lambda: steps_for_one_backward(3), [(REPEATED, "")], marks=pytest.mark.slow),
        (two_optimizers_step_twice, [(REPEATED, ""), (REPEATED, "optimizer[1]")]),
    ],
    ids=["never zeroed", "and clipped", "another model zeroed", "one of two", "two steps", "three steps", "of two"],
)
def test_used_again(
    made: Callable[[], tuple[nn.Module, Step]], expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    """Oracle: planted fault. Each mistake is named, at the optimizer that makes it, and no other."""
    assert found(recorded(made, tmp_path / "run")) == expected


def test_share_of_a_known_gradient(tmp_path: Path) -> None:
    """Oracle: closed form. A gradient of g at every backward, never zeroed: at update n, n - 1 of n parts are old."""
    model = nn.Linear(8, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(40):
            model(torch.ones(4, 8)).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
    run = monitor.open(tmp_path / "run")
    steps, share = run.series("gradient_reuse.share", "")
    assert steps.tolist() == [*range(1, 10), 31]  # the first has none before it
    np.testing.assert_allclose(share, steps / (steps + 1), rtol=1e-6)
    assert set(run.series("gradient_reuse.elements", "")[1]) == {8}


def test_clipping_is_taken_out(tmp_path: Path) -> None:
    """Oracle: closed form. Gradients clipped from 2 to 1: 1 of the next 1 + 2 is old, whatever it is clipped to."""
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(10):
            model(torch.ones(4, 4)).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    share = monitor.open(tmp_path / "run").series("gradient_reuse.share", "")[1]
    np.testing.assert_allclose(share, 1 / 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (zeros_nobody_counts, []),
        (lambda: never_zeroed(0.5), [(CARRIED, "")]),
        (lambda: steps_for_one_backward(2), [(REPEATED, "")]),
    ],
    ids=["zeroed", "never zeroed", "two steps"],
)
def test_as_on_an_accelerator(
    made: Callable[[], tuple[nn.Module, Step]],
    expected: list[tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: invariance. Where nothing is known before the device is asked, the same is found."""
    monkeypatch.setattr(site, "sample", lambda grads: torch.from_numpy(np.asarray(sample(grads))).float())
    run = recorded(made, tmp_path / "run")
    assert not run.info["warnings"]
    assert found(run) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_accelerator_sees_what_the_cpu_sees(dtype: torch.dtype) -> None:
    """Oracle: naive transcription in float64, for both ways; what changed direction is not carried over."""
    torch.manual_seed(0)
    g, more = (torch.randn(700, dtype=dtype) * 1e-12 for _ in range(2))
    left, now, used = (sample([t, t[:3]]) for t in (g, g + more, (g + more) * 0.3))
    assert isinstance(left, np.ndarray) and len(left) == 64 + 3
    on_device = [torch.from_numpy(a).float() for a in (left, now, used)]
    assert same(left, left.copy()) is True and same(left, now) is False
    assert bool(same(on_device[0], on_device[0].clone())) and not same(on_device[0], on_device[1])
    for a in (left, on_device[0]):  # resized, moved to an accelerator, moved to another
        assert not any(same(a, b) for b in (a[1:], torch.empty(67, device="meta")))
    assert same(on_device[0], left) is False
    wanted = [np.linalg.norm(left), np.linalg.norm(now), 2, 67]
    for a, b, c in ((left, now, used), on_device):
        np.testing.assert_allclose(reuse(a, b, c, True, 2), wanted, rtol=1e-5)
        assert reuse(a, b, c, False, 2)[0] == 0
        assert reuse(a, b, a, True, 2)[0] == 0
        assert reuse(a, b, b * np.nan, True, 2)[0] == 0
