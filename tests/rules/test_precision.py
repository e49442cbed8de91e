"""Real trainings whose numbers are too coarse, whose loss is scaled wrongly or whose optimizer is lost; and twins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.diagnosis.report import describe

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


class Rounded(torch.optim.Optimizer):
    """AdamW in float32, of which a bfloat16 parameter gets what ``way`` leaves."""

    def __init__(self, params: Iterable[Tensor], way: str, lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})
        self._way, self._random = way, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["m"], state["v"] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
                    state["rest"] = torch.zeros_like(p)
                state["step"] += 1
                g = p.grad.float()
                state["m"].lerp_(g, 0.1)
                state["v"].lerp_(g * g, 0.01)
                m, v = state["m"] / (1 - 0.9 ** state["step"]), state["v"] / (1 - 0.99 ** state["step"])
                change = -group["lr"] * m / (v.sqrt() + 1e-8)
                if self._way == "at random":
                    noise = torch.randint(0, 1 << 16, p.shape, generator=self._random, dtype=torch.int32)
                    bits = (p.float() + change).view(torch.int32) + noise
                    p.copy_((bits & -65536).view(torch.float32))
                elif self._way == "Kahan":
                    before, change = p.clone(), (change + state["rest"]).to(p.dtype)
                    p.add_(change)
                    state["rest"].copy_(change.float() - (p.float() - before.float()))
                else:
                    p.copy_(p.float() + change)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


Batch = tuple[Tensor, Tensor]


def digits(steps: int) -> Iterable[Batch]:
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    for _ in range(steps):
        rows = torch.randint(0, len(images), (64,))
        yield images[rows].float() / 16, labels[rows]


@dataclass
class Training:
    """A classifier of digits; ``rounded`` says how a written optimizer rounds, else it is torch's AdamW."""

    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    lr: float = 1e-5
    rounded: str = ""
    times: float = 1.0
    scaled: bool = False
    steps: int = 210

    def recorded(self, folder: Path) -> tuple[monitor.Run, float]:
        """The run, and the mean loss of the last 20 steps."""
        torch.manual_seed(0)
        model = mlp().to(self.dtype)
        made: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
        optimizer = (
            Rounded(model.parameters(), self.rounded, self.lr) if self.rounded else made(model.parameters(), lr=self.lr)
        )
        scaler = torch.amp.GradScaler("cpu", enabled=self.scaled)
        losses = []
        with monitor.attach(model, folder):
            for x, y in digits(self.steps):
                optimizer.zero_grad()
                with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                    loss = F.cross_entropy(model(x.to(self.dtype)).float(), y)
                scaler.scale(loss * self.times).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.item())
        run = monitor.open(folder)
        assert not run.warnings
        return run, sum(losses[-20:]) / 20


def found(run: monitor.Run) -> list[str]:
    """Rules of the warnings, each described in a whole sentence."""
    warnings = [f for f in run.findings() if f.severity != "info"]
    assert all("{" not in describe(f) and "nan" not in describe(f) for f in warnings)
    return [f.rule for f in warnings]


@pytest.mark.parametrize("way", ["", "nearest"], ids=["torch", "written"])
def test_updates_lost_to_rounding(way: str, tmp_path: Path) -> None:
    """Oracle: planted fault. Updates of 1e-5, of which hardly any moves a bfloat16 weight."""
    run, _ = Training(BFLOAT16, rounded=way).recorded(tmp_path / "run")
    assert "updates_lost_to_rounding" in found(run)
    assert run.verdict().incidents[0].head.rule == "updates_lost_to_rounding"


def test_what_lost_updates_cost(tmp_path: Path) -> None:
    """Oracle: independent computation. At 1e-4 the loss stays above that of the same training in float32."""
    run, loss = Training(BFLOAT16, lr=1e-4).recorded(tmp_path / "run")
    assert "updates_lost_to_rounding" in found(run)
    _, exact = Training(lr=1e-4).recorded(tmp_path / "float32")
    assert loss > exact + 0.05


NOT_LOST = {
    "float32": Training(),
    "autocast": Training(autocast=BFLOAT16),
    "at random": Training(BFLOAT16, rounded="at random"),
    "Kahan": Training(BFLOAT16, rounded="Kahan", lr=1e-4),
    "at random at 1e-6": Training(BFLOAT16, rounded="at random", lr=1e-6),
    "Kahan at 1e-6": Training(BFLOAT16, rounded="Kahan", lr=1e-6),
    "large learning rate": Training(BFLOAT16, lr=3e-3),
    "no learning rate": Training(BFLOAT16, lr=0.0),
}


@pytest.mark.parametrize("training", NOT_LOST.values(), ids=list(NOT_LOST))
def test_updates_not_lost(training: Training, tmp_path: Path) -> None:
    """Oracle: planted fault, absent. What does not lose, or would by being asked for nothing, gives no such warning."""
    run, _ = training.recorded(tmp_path / "run")
    assert "updates_lost_to_rounding" not in found(run)


def test_gradient_underflow(tmp_path: Path) -> None:
    """Oracle: planted fault. A loss times 6e-5 in float16 learns less than with a scale, and the rule says why."""
    half = {"autocast": FLOAT16, "lr": 1e-3, "times": 2.0**-14, "steps": 120}
    run, loss = Training(**half).recorded(tmp_path / "run")
    assert "gradient_underflow" in found(run)
    scaled, other = Training(scaled=True, **half).recorded(tmp_path / "scaled")
    assert "gradient_underflow" not in found(scaled)
    assert scaled.series("gradient_zeros.coarse", "0.weight")[1].max() < 0.01
    assert loss > 1.1 * other


def test_no_underflow_where_zeros_are_meant(tmp_path: Path) -> None:
    """Oracle: planted fault, absent. Half of a ReLU network's gradient is 0 anyway; float16 can hold the rest."""
    run, _ = Training(autocast=FLOAT16, lr=1e-3, steps=120).recorded(tmp_path / "run")
    assert found(run) == []
    assert run.series("gradient_zeros.zero", "0.weight")[1].max() > 0.1


def scaled(folder: Path, change: Callable[[int, Tensor], Tensor], steps: int, start: float = 2.0**16) -> monitor.Run:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=start)
    with monitor.attach(model, folder):
        for i, (x, y) in enumerate(digits(steps)):
            optimizer.zero_grad()
            with torch.autocast("cpu", FLOAT16):
                loss = F.cross_entropy(model(change(i, x)).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return monitor.open(folder)


def test_loss_scale_thrash(tmp_path: Path) -> None:
    """Oracle: planted fault. Every 13th batch overflows float16 at any scale."""
    run = scaled(tmp_path / "run", lambda i, x: x * 3e5 if i % 13 == 5 else x, 200)
    (thrash,) = [f for f in run.findings() if f.rule == "loss_scale_thrash"]
    assert thrash.severity == "warning" and 100 < thrash.first_step < 130


def test_no_update_any_more(tmp_path: Path) -> None:
    """Oracle: planted fault, counts. From step 40 on every update is skipped: their number is in the run."""
    run = scaled(tmp_path / "run", lambda i, x: x * 1e6 if i >= 40 else x, 100)
    (thrash,) = [f for f in run.findings() if f.rule == "loss_scale_thrash"]
    assert (thrash.severity, thrash.first_step, thrash.evidence["skipped_in_a_row"]) == ("critical", 40, 60)


@pytest.mark.parametrize("start", [2.0**16, 2.0**30])
def test_the_first_search_for_a_scale(start: float, tmp_path: Path) -> None:
    """Oracle: planted fault, absent. Twelve updates skipped until the scale fits, and none after."""
    run = scaled(tmp_path / "run", lambda i, x: x, 120, start)
    assert found(run) == []
    assert (run.series("loss_scale.skipped")[1].sum() > 5) == (start > 2**16)


@pytest.mark.parametrize("kind", ["AdamW", "RMSprop"])
@pytest.mark.parametrize("restored", [False, True], ids=["lost", "restored"])
def test_optimizer_state_of_a_resumed_run(restored: bool, kind: str, tmp_path: Path) -> None:
    """Oracle: planted fault, and absent. A checkpoint with or without the optimizer; the loss jumps without Adam's."""
    torch.manual_seed(0)
    state: dict[str, Any] = {}
    losses: list[float] = []
    for attempt in range(2):
        model = mlp()
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-2)
        if attempt:
            model.load_state_dict(state["model"])
            if restored:
                optimizer.load_state_dict(state["optimizer"])
        with monitor.attach(model, tmp_path / "run", resume=bool(attempt)):
            for x, y in digits(80):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    run = monitor.open(tmp_path / "run")
    assert run.steps == 160 and not run.warnings
    wanted = [] if restored else [("optimizer_state_not_restored", 80)]
    assert [(f.rule, f.first_step) for f in run.findings() if f.rule == "optimizer_state_not_restored"] == wanted
    assert (max(losses[80:90]) > 2 * max(losses[70:80])) == (not restored)


#: Where autocast is entered, from outside: loop, step, forward. None: not at all; False: without being enabled.
PLACES: dict[str, tuple[tuple[bool | None, bool | None, bool | None], bool]] = {
    "loop": ((True, None, None), True),
    "loop and step": ((True, True, None), True),
    "forward, in a loop that is not": ((False, None, True), True),
    "step": ((None, True, None), False),
    "forward": ((None, None, True), False),
    "not in the forward": ((True, None, False), False),
}


@pytest.mark.parametrize(("entered", "stale"), PLACES.values(), ids=list(PLACES))
def test_where_autocast_is_entered(
    entered: tuple[bool | None, bool | None, bool | None], stale: bool, tmp_path: Path
) -> None:
    """Oracle: planted fault, and absent. Where the outermost is never left nothing is learnt; elsewhere it is."""

    def autocast(enabled: bool | None) -> AbstractContextManager[Any]:
        return nullcontext() if enabled is None else torch.autocast("cpu", BFLOAT16, enabled=enabled)

    loop, step, forward = entered
    torch.manual_seed(0)
    model, losses = mlp(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with monitor.attach(model, tmp_path / "run"), autocast(loop):
        for x, y in digits(60):
            with autocast(step):
                optimizer.zero_grad()
                with autocast(forward):
                    loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    critical = [(f.rule, f.first_step) for f in run.findings() if f.severity == "critical"]
    assert critical == ([("autocast_around_loop", 1)] if stale else [])
    assert (losses[-1] > 2) == stale
