"""Looking closely at every so many steps only: what is seen is the same, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.errors import UsageError
from monitor.record.site import START
from tests.record import trainings
from tests.record.trainings import Watch

STEPS = 64
#: Recorded at every step whatever was asked for: it costs little.
ALWAYS = {"loss", "learning_rate"}


class Model(nn.Module):
    """Attention, then classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def run_of(folder: Path, every: int) -> monitor.Run:
    """A training recorded at every so many steps."""
    torch.manual_seed(0)
    model = Model()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    with monitor.attach(model, folder, every=every):
        for _ in range(STEPS):
            opt.zero_grad()
            loss = F.cross_entropy(model(torch.randn(8, 6, 16)), torch.arange(8) % 5)
            loss.backward()
            opt.step()
    return monitor.open(folder)


def recorded(run: monitor.Run) -> dict[tuple[str, str], dict[int, float]]:
    """Value at each step of every series."""
    found = {}
    for metric, columns in run.metrics().items():
        for column in columns:
            for module in run.modules(f"{metric}.{column}"):
                steps, values = run.series(f"{metric}.{column}", module)
                found[f"{metric}.{column}", module] = dict(zip(steps.tolist(), values.tolist(), strict=True))
    return found


@pytest.mark.parametrize(
    "every", [pytest.param(4, marks=pytest.mark.slow), 7, pytest.param(16, marks=pytest.mark.slow)]
)
def test_what_is_seen_is_the_same(every: int, tmp_path: Path) -> None:
    """Oracle: invariance. Each value is that of a recording of all steps, and only steps that are due have one."""
    whole, thin = recorded(run_of(tmp_path / "whole", 1)), recorded(run_of(tmp_path / "thin", every))
    assert thin.keys() == whole.keys()
    due = {s for s in range(STEPS) if s < START or s % every == 0}
    for (ref, module), values in thin.items():
        metric, before = ref.partition(".")[0], whole[ref, module]
        if metric == "step_time":
            continue
        for step in values.keys() & before.keys():
            np.testing.assert_equal(values[step], before[step], err_msg=f"{ref} {module} {step}")
        if before.keys() == set(range(STEPS)):
            assert values.keys() == (before.keys() if metric in ALWAYS else due), ref


def test_all_large_tensors_get_their_turn(tmp_path: Path) -> None:
    """Oracle: definition. Spikes are looked for in large tensors by turns, also where the turns are far between."""
    model = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(5)))
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run", every=4):
        for _ in range(50):
            opt.zero_grad()
            model(torch.randn(4, 100)).square().mean().backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert run.modules("spam_spike.count") == tuple(f"{i}.weight" for i in range(5))


@pytest.mark.parametrize("training", [trainings.clipping, trainings.scaler, trainings.two_optimizers])
def test_bitwise_equal(training: Callable[[Watch], str], tmp_path: Path) -> None:
    """Oracle: invariance. Hash of parameters, optimizer state, losses, evaluations and all random generators."""
    handles: list[monitor.Handle] = []
    assert training(lambda m: handles.append(monitor.attach(m, tmp_path / "run", every=3))) == training(lambda _: None)
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    assert len(run.series("grad_norm_total.norm")[0]) < run.steps


@pytest.mark.parametrize("every", [0, -5, 2.0, True, "10"])
def test_a_number_of_steps(every: object, tmp_path: Path) -> None:
    """Oracle: definition. One line says what was given and what was expected."""
    with pytest.raises(UsageError, match=r"every=.*expected a number of steps, 1 or more"):
        monitor.attach(Model(), tmp_path / "run", every=every)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_an_unmodified_script(tmp_path: Path) -> None:
    """Oracle: definition. ``monitor run --every`` is heeded, and the run says what was left out."""
    script = tmp_path / "train.py"
    script.write_text(
        """
import torch
model = torch.nn.Linear(4, 2)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(40):
    opt.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    opt.step()
"""
    )
    command = [sys.executable, "-m", "monitor_cli", "run", "--run-dir", "run", "--every", "10", str(script)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    run = monitor.open(tmp_path / "run")
    assert run.series("grad_norm_total.norm")[0].tolist() == [*range(10), 10, 20, 30]
    assert len(run.series("loss.value")[0]) == 40
    said = {a["what"]: a["why"] for a in run.info["absent"]}
    assert said["grad_norm"].startswith("looked at every 10 steps, as asked")
