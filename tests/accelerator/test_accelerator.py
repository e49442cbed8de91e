"""Recording on an accelerator: an emulated one, which is stricter than CUDA and as slow as the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import monitor
from monitor.record.site import REPLICAS
from tests.accelerator.scenarios import STEPS, TRAININGS
from tests.warm import ROOT, run_warm

NAMES = [t.__name__ for t in TRAININGS if t.__name__ != "deep_gpt"]
#: Operations that recording may add to those of a training, each of which costs the host what a kernel's launch does.
SHARE = 0.1
#: Metrics of nothing that is drawn at random.
EXACT = {
    "clip", "distance_from_start", "dormant_units", "eps_ratio", "expert_norm", "grad_norm", "grad_norm_total",
    "input_rms", "learning_rate", "loss", "loss_zero_frac", "nlm_cos", "norm_layer", "param_norm", "router_balance",
    "router_load", "spam_spike", "train_accuracy", "update_ratio",
}  # fmt: skip
#: What the end of a run waits for, and a row that becomes wider.
ENDS = "synchronize event in ring.py"


def trained(library: Path, folder: Path, name: str, *options: str) -> dict[str, Any]:
    script = ROOT / "tests" / "accelerator" / "scenarios.py"
    done = run_warm(script, library, folder, name, *options, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_changes_and_nobody_waits(library: Path, tmp_path: Path, name: str) -> None:
    """Oracle: invariance. The training is the same bit for bit, no site fails, and the host waits for no step.

    Of a model of which a half is on the host what the other half gives has to be fetched, of one that goes back to it
    where it began. Gradients that come from two devices are added as they come, so that no training is as another.
    """
    found = trained(library, tmp_path / "run", name)
    assert found["equal"] or name == "spread"
    assert [w for w in found["warnings"] if "pathway_distance" not in w] == [] or name == "graph"
    waits = {where: n for where, n in found["waits"].items() if not where.startswith(ENDS)}
    if name == "moved":
        moves = "copy to the host in ring.py", "copy to the host in parameter.py"
        waits = {where: n for where, n in waits.items() if not where.startswith(moves)}
    if name != "half_on_the_host":
        assert waits == {}
    assert sum(n for where, n in found["waits"].items() if where.startswith(ENDS)) <= 6


@pytest.mark.parametrize("name", ["plain", "experts", "autocast", "convolutions"])
def test_without_float64(library: Path, tmp_path: Path, name: str) -> None:
    """Oracle: invariance. On a device that has no float64, as Apple's, every site records."""
    found = trained(library, tmp_path / "run", name, "no float64")
    assert found["equal"]
    assert found["warnings"] == []
    assert {"grad_norm", "update_ratio", "loss"} <= set(found["metrics"])


def test_rows_are_whole_and_in_order(library: Path, tmp_path: Path) -> None:
    """Oracle: closed form. Of more steps than a block has none is missing, and what the user logs is among them."""
    found = trained(library, tmp_path / "run", "plain")
    assert found["rows"] == list(range(STEPS))
    run = monitor.open(tmp_path / "run")
    logged, loss = run.frame("logged"), run.frame("loss")
    np.testing.assert_array_equal(logged[logged["module"] == "val_loss"]["value"], loss["value"])


def test_examples_are_told_apart(library: Path, tmp_path: Path) -> None:
    """Oracle: invariance. On the host the examples have the same names, labels and margins; six visits of each."""
    trained(library, tmp_path / "device", "plain")
    trained(library, tmp_path / "host", "plain", "on the host")
    there, here = (monitor.open(tmp_path / folder).table("examples", 100).to_pydict() for folder in ("device", "host"))
    for table in (there, here):
        assert len(set(table["example"])) == 64
    assert dict(zip(there["example"], there["label"], strict=True)) == dict(
        zip(here["example"], here["label"], strict=True)
    )
    assert set(there["visits"]) <= {5, 6}


def test_a_graph_is_left_alone(library: Path, tmp_path: Path) -> None:
    """Oracle: invariance. What runs while a graph is made is not recorded, has nothing of ours in it; that is said."""
    found = trained(library, tmp_path / "run", "graph")
    control, recorded = found["launched"]
    assert control == recorded
    assert sum(control.values()) > 10
    assert found["rows"] == list(range(23))
    assert found["warnings"] == ["from step 12 on a CUDA graph is made: what is played again cannot be seen"]


def test_few_operations(library: Path, tmp_path: Path) -> None:
    """Oracle: closed form. What recording launches does not grow with the layers, and is little beside a step."""
    (_, few), (training, recording) = (
        trained(library, tmp_path / name, name)["launched"] for name in ("gpt", "deep_gpt")
    )
    assert 0 < sum(recording.values()) <= SHARE * sum(training.values()), recording
    assert sum(recording.values()) <= 1.3 * sum(few.values())


def test_what_is_spread_over_devices(library: Path, tmp_path: Path) -> None:
    """Oracle: definition. Blocks are followed from one device to the next; experts that are apart are said to be.

    A loss that the script writes over is the one that was trained on.
    """
    found = trained(library, tmp_path / "run", "spread")
    run = monitor.open(tmp_path / "run")
    blocks = tuple(f"blocks.{i}" for i in range(3))
    assert run.modules("residual_stream.rms") == blocks
    assert len(run.modules("router_balance.entropy")) == 3
    assert len(run.modules("attn_entropy.entropy")) == 3 * 4
    why = "the experts of blocks.2.mixture.router are spread over several devices"
    assert {"what": "expert_norm", "why": why} in found["absent"]
    assert run.series("loss.value", "")[1].min() > 1


def test_defaults_of_the_script_are_not_ours(library: Path, tmp_path: Path) -> None:
    """Oracle: closed form. Where new tensors are of 16 bits, what we count and what is logged is not."""
    trained(library, tmp_path / "run", "defaults")
    run = monitor.open(tmp_path / "run")
    assert set(run.frame("router_balance")["top_k"]) == {2.0}
    assert run.series("logged.value", "val_number")[1] == pytest.approx(3.14159, rel=1e-7)


@pytest.mark.parametrize("name", ["replicas", "replicas_of_the_model"])
def test_why_replicas_are_not_looked_into(library: Path, tmp_path: Path, name: str) -> None:
    """Oracle: definition. What is called in threads of its own is absent, with the reason."""
    found = trained(library, tmp_path / "run", name)
    assert "norm_layer" not in found["metrics"]
    assert {"what": "norm_layer", "why": REPLICAS} in found["absent"]
    assert all(x["what"] not in ("attn_logit_max", "router_balance") for x in found["absent"])


def test_the_first_nan_is_found(library: Path, tmp_path: Path) -> None:
    """Oracle: planted fault."""
    found = trained(library, tmp_path / "run", "broken_input")
    assert found["findings"][0] == ["nonfinite", "input[0]", 20]


@pytest.mark.parametrize("name", ["plain", "gpt", "experts", "moved"])
def test_the_device_is_recorded_as_the_host(library: Path, tmp_path: Path, name: str) -> None:
    """Oracle: invariance. The same training, with the same kernels, on the host: every column has the same values.

    But for the time, for examples, which the host sees more often, and, in models where there is so much that rows are
    drawn at random, what those say.
    """
    trained(library, tmp_path / "device", name)
    trained(library, tmp_path / "host", name, "on the host")
    device, host = (monitor.open(tmp_path / where) for where in ("device", "host"))
    compared = set()
    recorded = set(device.metrics()) - {"step_time", "example_margin"}
    for metric in recorded if name == "plain" else recorded & EXACT:
        both = device.frame(metric).merge(host.frame(metric), on=["step", "module"])
        for column in {name.removesuffix("_x") for name in both if name.endswith("_x")}:
            x, y = both[f"{column}_x"].to_numpy(float), both[f"{column}_y"].to_numpy(float)
            known = ~(np.isnan(x) | np.isnan(y))
            if known.any():
                compared.add(f"{metric}.{column}")
                scale = float(np.abs(y[known]).max())
                np.testing.assert_allclose(x[known], y[known], rtol=2e-3, atol=1e-5 * scale, err_msg=column)
    assert {"grad_norm.norm", "loss_zero_frac.frac", "update_ratio.ratio", "distance_from_start.distance"} <= compared
