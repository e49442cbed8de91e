"""Published ways to grok, and not to, from beginning to end: what is recorded of them, and what is said.

Slow; the recorded runs of the same scripts in sample_runs are checked by default.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import monitor
from monitor.diagnosis.phases import phases
from monitor.diagnosis.transition import transition
from monitor.record.attach import close_all
from monitor.rule import load_rules
from monitor.store.run import Run

SAMPLES = Path(__file__).parents[2] / "sample_runs"


def script(name: str) -> ModuleType:
    """A sample script as a module."""
    spec = importlib.util.spec_from_file_location(name, SAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def at(run: Run, ref: str, module: str, step: int) -> float:
    """The value recorded at ``step``, or the last before."""
    steps, values = run.series(ref, module)
    return float(values[np.searchsorted(steps, step, side="right") - 1])


def rules(run: Run) -> dict[str, int]:
    """Rule -> first step of its first finding."""
    found: dict[str, int] = {}
    for f in run.findings():
        found.setdefault(f.rule, f.first_step)
    return found


def recorded(folder: Path) -> Run:
    """The run that a script has left open."""
    close_all()
    return monitor.open(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("weight_decay", "part"), [(0.0, 0.5), (1.0, 0.2)])
def test_modular_addition_that_never_generalises(weight_decay: float, part: float, tmp_path: Path) -> None:
    """Oracle: planted fault. Without weight decay, or from a fifth of the pairs: memorised, and no circuit forms."""
    script("grokking_p41").main(str(tmp_path / "run"), 1500, weight_decay, part)
    run = recorded(tmp_path / "run")
    found = phases(run)
    assert found is not None
    assert found.label == "memorised"
    assert found.memorised is not None
    assert found.memorised <= 150
    assert at(run, "logged.value", "val_acc", 1480) <= 0.002
    assert at(run, "restricted_loss.restricted", "", 1400) > 3.5
    assert at(run, "gini.gini", "embed.weight", 1480) < 0.07
    hint = transition(run)
    assert hint is not None
    assert hint.moved is None
    said = rules(run)
    assert said["grokking_phase"] <= 150
    assert 400 <= said["naive_loss_minimisation"] <= 900
    assert ("memorised_without_generalising" in said) == (weight_decay == 0)
    if weight_decay == 0:
        assert said["memorised_without_generalising"] <= 600
        assert 900 <= said["softmax_collapse"] <= 1300


@pytest.mark.slow
def test_modular_addition_that_generalises(tmp_path: Path) -> None:
    """Oracle: golden, on another seed than the sample run. The restricted loss leads by hundreds of steps."""
    script("grokking_p41").main(str(tmp_path / "run"), 2600, seed=1)
    run = recorded(tmp_path / "run")
    found = phases(run)
    assert found is not None
    assert found.label == "grokking"
    steps, restricted = run.series("restricted_loss.restricted")
    at_half, accuracy = run.series("logged.value", "val_acc")
    assert steps[np.argmax(restricted < 2)] + 200 <= at_half[np.argmax(accuracy >= 0.5)]
    hint = transition(run)
    assert hint is not None
    assert hint.moved is not None
    assert hint.moved + 200 <= at_half[np.argmax(accuracy >= 0.5)]
    # weight decay balances it: a gradient along the weights alone does not keep a network from generalising
    assert run.series("nlm_cos.cos", "out.weight")[1][50:].min() > 0.8
    assert "naive_loss_minimisation" not in rules(run)


def test_xor_clusters_are_memorised_linearly_first(tmp_path: Path) -> None:
    """Oracle: golden. One step: all training rows, chance on new ones, an odd function; by step 60 it generalises."""
    script("xor_clusters").main(str(tmp_path / "run"), 61)
    run = recorded(tmp_path / "run")
    train, test, odd = (
        ("train_accuracy.accuracy", "cross_entropy"), ("logged.value", "test_acc"), ("odd_fraction.omega", ""),
    )  # fmt: skip
    assert at(run, *train, 1) >= 0.99
    assert 0.45 <= at(run, *test, 1) <= 0.60
    assert at(run, *odd, 1) >= 0.95
    assert at(run, *test, 60) >= 0.99
    assert at(run, *train, 60) == 1
    assert at(run, *odd, 60) < 0.2


def add(
    run_dir: Path, p: int, part: float, steps: int, lr: float, eps: float, dtype: torch.dtype = torch.float32
) -> Run:
    """Addition modulo p on one-hot pairs without biases or weight decay, the loss computed in ``dtype``."""
    torch.manual_seed(0)
    a, b = (grid.flatten() for grid in torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij"))
    pairs, sums = torch.cat([F.one_hot(a, p), F.one_hot(b, p)], dim=1).float(), (a + b) % p
    shuffled = torch.randperm(p * p, generator=torch.Generator().manual_seed(0))
    train, held_out = shuffled[: int(part * p * p)], shuffled[int(part * p * p) :]
    x, y = pairs[train], sums[train]
    model = nn.Sequential(
        nn.Linear(2 * p, 200, bias=False), nn.ReLU(), nn.Linear(200, 200, bias=False), nn.ReLU(),
        nn.Linear(200, p, bias=False),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), eps=eps, weight_decay=0)
    with monitor.attach(model, run_dir) as recording:
        for step in range(steps):
            if step % 12 == 0:
                with torch.no_grad():
                    correct = model(pairs[held_out]).argmax(dim=1) == sums[held_out]
                recording.log(val_acc=correct.float().mean().item())
            optimizer.zero_grad()
            F.cross_entropy(model(x).to(dtype), y).backward()
            optimizer.step()
    return monitor.open(run_dir)


@pytest.mark.slow
def test_plain_adam_memorises_without_collapse(tmp_path: Path) -> None:
    """Oracle: golden (Prieto et al., a + b mod 113). Right on all training pairs by step 60, on no others at step 300.

    The margin grows to about 8.5 while the direction of the logits hardly changes: naive loss minimisation.
    """
    run = add(tmp_path / "run", 113, 0.4, 301, 1e-2, 1e-25)
    assert at(run, "train_accuracy.accuracy", "cross_entropy", 60) >= 0.999
    assert at(run, "logged.value", "val_acc", 300) <= 0.002
    assert at(run, "loss_zero_frac.frac", "cross_entropy", 300) == 0
    assert at(run, "logit_scale.margin", "cross_entropy", 300) == pytest.approx(8.5, abs=0.5)
    early, late = (at(run, "zscore_target.mean", "cross_entropy", step) for step in (100, 300))
    assert late / early == pytest.approx(1.03, abs=0.03)
    assert at(run, "nlm_rate.rate", "cross_entropy", 300) < 0.3 * at(run, "nlm_rate.rate", "cross_entropy", 100)
    whole, output = ([at(run, *ref, step) for step in (48, 108, 300)] for ref in (
        ("nlm_cos.total", ""), ("nlm_cos.cos", "4.weight")))  # fmt: skip
    assert whole == pytest.approx([0.20, 0.64, 0.72], abs=0.06)
    assert output[0] == pytest.approx(0.16, abs=0.04)
    assert output[2] == pytest.approx(0.87, abs=0.04)
    assert rules(run)["grokking_phase"] <= 60


def collapse(run: Run) -> float:
    """The step at which a twentieth of the training rows have a loss of exactly zero; infinite if none."""
    steps, zero = run.series("loss_zero_frac.frac", "cross_entropy")
    return float(steps[np.argmax(zero >= 0.05)]) if (zero >= 0.05).any() else np.inf


def test_a_small_network_stops_learning_in_half_precision_first(tmp_path: Path) -> None:
    """Oracle: planted fault. a + b mod 23 without weight decay: memorised, naive loss minimisation, then collapse.

    In float16 the softmax has collapsed by step 350 and the cosine has fallen; in float32 the logits grow on.
    """
    half = add(tmp_path / "half", 23, 0.7, 421, 3e-3, 1e-30, torch.float16)
    single = add(tmp_path / "single", 23, 0.7, 421, 3e-3, 1e-30)
    assert 200 <= collapse(half) <= 280
    assert collapse(single) == np.inf
    for run in (half, single):
        assert at(run, "nlm_cos.cos", "4.weight", 120) > 0.88
        assert at(run, "logged.value", "val_acc", 420) <= 0.02
    assert at(half, "nlm_cos.cos", "4.weight", 340) < 0.3
    assert at(single, "nlm_cos.cos", "4.weight", 420) > 0.9
    assert 250 <= rules(single)["naive_loss_minimisation"] <= 360
    head = half.verdict().incidents[0].head
    assert head.rule == "memorised_without_generalising"
    assert head.evidence["zero_losses"] >= 0.05
    rule = load_rules()[head.rule]
    told = rule.message.format(module=head.module, **head.evidence)
    assert "learning has stopped because the rows teach only" in told
    assert rule.remedies[0].import_path == "monitor.remedies.OrthogonalGradient"


@pytest.mark.slow
def test_the_precision_of_the_loss_decides_when_learning_stops(tmp_path: Path) -> None:
    """Oracle: golden (Prieto et al., a + b mod 59). The softmax collapses first in float16, last in float64.

    Losses are zero from step 1,000 in float16, 2,500 in float32 and not until 6,000 in float64. Held-out accuracy
    freezes with them. The output layer's gradient is along its weights until then, and not after. The zero losses are
    those of the kernel; the exact rule of absorption may come earlier or later. Five minutes.
    """
    kinds = {"half": torch.float16, "single": torch.float32, "double": torch.float64}
    half, single, double = (add(tmp_path / name, 59, 0.7, 6001, 5e-4, 1e-30, kind) for name, kind in kinds.items())
    assert 900 <= collapse(half) <= 1200
    assert at(half, "loss_zero_frac.frac", "cross_entropy", 1200) > 0.5
    assert 2300 <= collapse(single) <= 2900
    assert collapse(double) == np.inf
    reached = [at(run, "logged.value", "val_acc", 6000) for run in (half, single, double)]
    assert reached[0] < reached[1] < reached[2]
    assert reached[0] < 0.04
    assert reached[1] < 0.07
    assert reached[2] > 0.05
    assert at(double, "logged.value", "val_acc", 4500) < 0.8 * reached[2]
    before, onset, after = (at(single, "nlm_cos.cos", "4.weight", step) for step in (2160, 2640, 3600))
    assert before == pytest.approx(0.9, abs=0.05)
    assert onset < 0.5
    assert after < 0.1
    assert at(double, "nlm_cos.cos", "4.weight", 6000) == pytest.approx(0.9, abs=0.05)
    assert "memorised_without_generalising" in rules(half)
    for run in (single, double):
        assert 600 <= rules(run)["naive_loss_minimisation"] <= 1300
