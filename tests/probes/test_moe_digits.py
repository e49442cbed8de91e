"""Pathways of a real training and of its two controls: smoothness through depth is no sign of generalisation."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

import monitor

SAMPLES = Path(__file__).parents[2] / "sample_runs"
NAMES = ("moe_digits", "moe_digits_random_labels", "moe_digits_no_aux")


def shape(run: monitor.Run) -> dict[str, float]:
    """What is asserted of one of the three: C and mean cosine at step 100 and at the end, z-loss, accuracies."""
    steps, rough = run.series("pathway_consistency.inconsistency")
    _, smooth = run.series("pathway_consistency.mean_cosine")
    _, z = run.series("router_balance.z", "layers.1.router")
    early = int((steps <= 100).sum()) - 1
    return {
        "C_100": rough[early], "C": rough[-1], "cosine_100": smooth[early], "cosine": smooth[-1],
        "z_part": z[-1] / z[0], "train": run.series("train_accuracy.accuracy", "cross_entropy")[1][-20:].min(),
        "test": run.series("logged.value", "val_acc")[1][-1],
    }  # fmt: skip


def check(clean: dict[str, float], shuffled: dict[str, float], free: dict[str, float]) -> None:
    """The shape of the published headline and of its controls."""
    assert clean["train"] > 0.99 and shuffled["train"] > 0.95 and free["train"] > 0.99
    assert clean["test"] > 0.9 and free["test"] > 0.9 and shuffled["test"] < 0.2
    # inconsistency falls after memorisation with the terms on the routers, on true and on shuffled labels
    assert clean["C"] < 0.6 * clean["C_100"]
    assert shuffled["C"] < shuffled["C_100"]
    assert clean["cosine"] - clean["cosine_100"] > 0.2
    assert shuffled["cosine"] - shuffled["cosine_100"] > 0.1
    # and hardly moves without them, although just as much is generalised: the router's z-loss is what it follows
    assert free["cosine"] - free["cosine_100"] < 0.1
    assert clean["z_part"] < 0.3 < 0.7 < free["z_part"]


def test_recorded() -> None:
    """Oracle: golden. The recorded sample runs show it."""
    check(*(shape(monitor.open(SAMPLES / name)) for name in NAMES))


@pytest.mark.slow
def test_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the published headline at small scale, with another seed, and its two controls."""
    monkeypatch.syspath_prepend(SAMPLES)
    moe_digits: Any = importlib.import_module("moe_digits")

    found = []
    for i, (aux, shuffled) in enumerate(((True, False), (True, True), (False, False))):
        moe_digits.main(str(tmp_path / str(i)), seed=1, aux=aux, random_labels=shuffled)
        found.append(shape(monitor.open(tmp_path / str(i))))
    check(*found)
