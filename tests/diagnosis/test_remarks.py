"""What is remarkable without being a trouble: a line a family, none about what an incident tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import monitor
from monitor.block import ColumnBlock
from monitor.diagnosis.remarks import remarks
from monitor.store.run import Run, open_run
from monitor.store.writer import RunWriter
from tests.rules.series import column

SAMPLES = Path(__file__).parents[2] / "sample_runs"
NAN = float("nan")


def told(run: Run) -> dict[str, str]:
    return {r.family: r.text for r in remarks(run, run.verdict())}


def made(folder: Path, last: Mapping[str, Mapping[str, float]], first: float = 1.0) -> Run:
    """A run of three steps: ``first`` twice, then the last values, as ``metric.column`` -> module -> value."""
    return written(
        folder,
        [column(ref, [[first] * len(m), [first] * len(m), list(m.values())], tuple(m)) for ref, m in last.items()],
    )


def logged(folder: Path, **series: Sequence[float]) -> Run:
    """A run whose script logged these series, from step 0 on."""
    return written(folder, [column("logged.value", list(zip(*series.values(), strict=True)), tuple(series))])


def written(folder: Path, columns: Sequence[ColumnBlock]) -> Run:
    writer = RunWriter.create(folder / "run", script="train.py")
    for c in columns:
        writer.append([c])
    writer.close("finished")
    return open_run(writer.path)


def each(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}[{i}]": v for i, v in enumerate(values)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grokking_p41", {"phases"}),
        ("xor_clusters", {"phases"}),
        ("edge_of_stability", {"curvature"}),
        ("attention_growth", set[str]()),
        ("digits_input_jump", set[str]()),
    ],
)
def test_families(name: str, expected: set[str]) -> None:
    """Oracle: golden. Recorded runs; the attention of attention_growth is told by its incident."""
    assert told(monitor.open(SAMPLES / name)).keys() == expected


def test_phases_of_recorded_runs() -> None:
    """Oracle: golden. A recorded grokking, an ordinary training, and random labels that are only memorised."""
    grokking = told(monitor.open(SAMPLES / "grokking_p41"))["phases"]
    assert grokking.startswith("training data learned at step 64, held-out data at step 2,")
    assert grokking.endswith("(grokking)")
    assert told(monitor.open(SAMPLES / "xor_clusters"))["phases"].endswith("(no delay)")
    memorised = told(monitor.open(SAMPLES / "moe_digits_random_labels"))["phases"]
    assert ", held-out data not as well: at the end accuracy 0.9" in memorised and memorised.endswith(" lower")


def test_a_creep_is_no_grokking(tmp_path: Path) -> None:
    """Oracle: closed form. Held-out data at 0.95 when the training data are learned, at 0.99 forty times as late."""
    run = logged(tmp_path, train_acc=[0.1] + [1.0] * 49, val_acc=[0.95] * 40 + [0.99] * 10)
    expected = "training data learned at step 1, held-out data at step 40: delay ratio 40 (never far behind)"
    assert told(run) == {"phases": expected}


def test_losses_that_are_higher(tmp_path: Path) -> None:
    """Oracle: closed form. A training loss of a hundredth, a held-out loss that stays where it was."""
    run = logged(tmp_path, train_loss=[1.0] + [0.005] * 4, val_loss=[1.0] * 5)
    expected = "training data learned at step 1, held-out data not as well: at the end loss 0.995 higher"
    assert told(run) == {"phases": expected}


def test_attention(tmp_path: Path) -> None:
    """Oracle: closed form. Of five heads one is sharp, two uniform, one sinks, one has large logits; NaN is none."""
    run = made(
        tmp_path,
        {
            "attn_entropy.normalised": each("a", [0.05, 0.5, 0.995, 1.0, NAN]),
            "attn_sink_mass.mass": each("a", [0.9, 0.5, 0.1, 0.1, NAN]),
            "attn_logit_max.lse_max": each("a", [60.0, 49.0, NAN, 3.0, 2.0]),
        },
    )
    assert told(run) == {
        "attention": "1 of 5 heads look at hardly more than one key; 2 of 5 heads look at all keys alike; "
        "1 of 5 heads give the first key more than half; logits up to 60 (a[0])"
    }


def test_routing(tmp_path: Path) -> None:
    """Oracle: closed form. Of four experts two get less than a fortieth, so that 1.7 are in use; 3 % are dropped."""
    run = made(
        tmp_path,
        {
            "router_load.load": each("r", [0.7, 0.28, 0.02, 0.0]),
            "router_balance.experts": {"r": 4},
            "router_balance.effective": {"r": 1.7},
            "router_balance.dropped": {"r": 0.03},
        },
    )
    assert told(run) == {
        "routing": "2 of 4 experts get less than a tenth of their share; r uses 1.7 of 4 experts; "
        "3.0% of the assignments dropped"
    }


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"sharpness.value": 2.0}, "sharpness 1 → 2"),
        ({"sharpness.value": 0.25, "edge_of_stability.ratio": 0.95},
         "at the edge of stability: 0.95 of what the learning rate allows; sharpness 1 → 0.25"),
        ({"edge_of_stability.ratio": 1.51}, "sharpness is 1.51 times what the learning rate allows"),
        ({"sharpness.value": 1.9, "edge_of_stability.ratio": 0.89}, ""),
        ({"sharpness.value": 2.0, "sharpness.of_step": 0.0, "edge_of_stability.ratio": 5.0},
         "sharpness of the loss that was given, 1 → 2"),
        ({"sharpness.of_step": 1.0, "edge_of_stability.ratio": 1.51},
         "sharpness is 1.51 times what the learning rate allows"),
        ({"sharpness.value": NAN, "edge_of_stability.ratio": NAN}, ""),
    ],
)  # fmt: skip
def test_curvature(tmp_path: Path, last: dict[str, float], expected: str) -> None:
    """Oracle: closed form. A sharpness of 1 at first."""
    run = made(tmp_path, {ref: {"": value} for ref, value in last.items()})
    assert told(run).get("curvature", "") == expected


def test_nothing_healthy_is_remarkable(tmp_path: Path) -> None:
    """Oracle: planted fault, absent."""
    run = made(
        tmp_path,
        {
            "attn_entropy.normalised": each("a", [0.3, 0.9]),
            "attn_logit_max.found": each("a", [12.0, 3.0]),
            "router_load.load": each("r", [0.5, 0.5]),
            "router_balance.experts": {"r": 2},
            "router_balance.effective": {"r": 2.0},
            "logged.value": {"val_acc": 0.8},
        },
        first=0.5,
    )
    assert told(run) == {}


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"betas": [0.9, 0.999]}, "hardly depends on it"),
        ({"momentum": 0.9}, "the threshold times the learning rate sets the size"),
    ],
    ids=["Adam", "SGD"],
)
def test_clipping_in_nearly_every_step(group: Mapping[str, object], words: str, tmp_path: Path) -> None:
    """Oracle: closed form. Coefficients of 0.2 to 0.3 in all but 1 % of 600 steps; nothing if it is 10 %."""

    def run(name: str, free: int) -> Run:
        writer = RunWriter.create(tmp_path / name, script="train.py")
        writer.update(facts={"optimizers": [{"groups": [group]}]})
        writer.append([column("clip.coefficient", [1.0 if i % free == 0 else 0.2 + i % 11 / 100 for i in range(600)])])
        writer.close("finished")
        return open_run(writer.path)

    line = told(run("often", 100))["clipping"]
    assert line.startswith("nearly every gradient was clipped, half of them to 0.25 of their norm") and words in line
    assert told(run("seldom", 10)) == {}
