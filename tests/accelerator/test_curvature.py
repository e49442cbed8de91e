"""Hessian products and the other probes on a device, with float64 and without, as Apple's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import monitor
from tests.accelerator.test_accelerator import ENDS, trained
from tests.warm import ROOT, run_warm

#: What a training is to have been measured for, by its name.
MEASURED = {
    "curvature": {
        "batch_sharpness", "edge_of_stability", "hessian_eigenvalue", "hessian_trace", "opposing_signals",
        "preconditioned_sharpness", "sharpness", "spectral_density",
    },
    "curvature_in_time": {"batch_sharpness"},
    "two_devices": {"batch_sharpness", "preconditioned_sharpness", "sharpness", "spectral_density"},
    "half_on_the_host": {"batch_sharpness", "preconditioned_sharpness", "sharpness", "spectral_density"},
    "probes": {
        "gini", "gradient_alignment", "jacobian_spectrum", "linear_r2", "local_complexity", "memorisation",
        "odd_fraction", "restricted_loss", "trajectory_kl",
    },
}  # fmt: skip


@pytest.mark.parametrize("options", [(), ("no float64",)], ids=["float64", "no float64"])
def test_errors(library: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Oracle: dense float64 reference; closed form of a long diagonal. A device without float64 is as good."""
    done = run_warm(ROOT / "tests" / "accelerator" / "hessians.py", library, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    errors = found["errors"]
    assert errors.pop("overlap") < 3e-5
    assert errors.pop("xtrace of many") < 1e-5  # cancels
    assert {name: e for name, e in errors.items() if e > 1e-6} == {}
    assert found["refused"].startswith("emulated:0 has no torch.float64") == bool(options)


@pytest.mark.parametrize("name", MEASURED)
def test_measured_without_float64(library: Path, tmp_path: Path, name: str) -> None:
    """Oracle: invariance. Training is the same bit for bit, and the host waits for nothing but a measurement.

    On the host, which has float64, the same training is measured to be the same.
    """
    found = trained(library, tmp_path / "device", name, "no float64")
    assert found["equal"]
    assert found["warnings"] == []
    assert set(found["metrics"]) >= MEASURED[name]
    assert found["measuring"] > 0
    if name != "half_on_the_host":
        assert [where for where in found["waits"] if not where.startswith(ENDS)] == []
    if name not in ("curvature", "probes"):
        return
    trained(library, tmp_path / "host", name, "on the host")
    device, host = (monitor.open(tmp_path / where) for where in ("device", "host"))
    for metric in MEASURED[name]:
        both = device.frame(metric).merge(host.frame(metric), on=["step", "module"])
        columns = {c.removesuffix("_x") for c in both if c.endswith("_x")} - {"residual", "smallest_residual"}
        assert columns and len(both) == len(device.frame(metric)) == len(host.frame(metric))
        for column in columns:
            x, y = both[f"{column}_x"].to_numpy(float), both[f"{column}_y"].to_numpy(float)
            scale = float(np.nanmax(np.abs(y), initial=0.0))
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale, err_msg=f"{metric}.{column}")
