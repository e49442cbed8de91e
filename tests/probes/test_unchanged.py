"""Probes that run the model leave no trace in any kind of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import monitor
from monitor.probes import JacobianSpectrum, TrajectoryKL
from tests.record import trainings
from tests.record.trainings import Watch

QUICK = ("plain", "accumulation", "scaler", "two_optimizers")
#: Trainings of which a probe cannot be measured, and what is said about them.
REFUSED = {
    ("checkpointing_reentrant", "jacobian_spectrum"): "use_reentrant",
    ("lbfgs", "jacobian_spectrum"): "no call of backward was seen",
    ("lbfgs", "trajectory_kl"): "no call of backward was seen",
    ("two_optimizers", "jacobian_spectrum"): "pass loss=",
    ("two_optimizers", "trajectory_kl"): "pass inputs=",
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "training",
    [pytest.param(t, marks=() if t.__name__ in QUICK else pytest.mark.slow, id=t.__name__) for t in trainings.ALL],
)
def test_bitwise_equal(training: Callable[[Watch], str], tmp_path: Path) -> None:
    """Oracle: invariance. Hash of parameters, optimizer state, losses, buffers and all random generators."""
    control = training(lambda _: None)
    handles: list[monitor.Handle] = []
    probes = [TrajectoryKL(every=2), JacobianSpectrum(rows=8, every=3)]
    assert training(lambda m: handles.append(monitor.attach(m, tmp_path / "run", probes=probes))) == control
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    absent = {a["what"]: a["why"] for a in run.info["absent"]}
    for probe, column in ((probes[0], "kl"), (probes[1], "rank")):
        why = REFUSED.get((training.__name__, probe.name))
        if why is None:
            assert len(run.series(f"{probe.name}.{column}")[0]) >= 2
        else:
            assert why in absent[probe.name]
