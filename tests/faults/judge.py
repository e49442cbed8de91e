"""What monitor says of a case, against what its report says: right, partly, silent or wrong; and in figures."""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from torch import nn

import monitor
from monitor.diagnosis.finding import Finding, Verdict
from tests.faults.kit import CASES, Case

#: Cause -> the rules that name it. Written from the answers before anything was run; rules that came later were added
#: by what they say, not by what they find. An empty set: no rule does.
CAUSES: dict[str, frozenset[str]] = {
    cause: frozenset(rules.split())
    for cause, rules in {
        "accumulation": "",
        "activation": "",
        "batch_norm_batch": "batch_norm_few_examples",
        "batch_norm_momentum": "",
        "broadcast": "",
        "class_imbalance": "",
        "clipped_before_unscaling": "",
        "dead_units": "dead_units",
        "decay_too_large": "",
        "double_sigmoid": "double_sigmoid",
        "double_softmax": "double_softmax",
        "dropout_too_large": "",
        "eps_underflow": "",
        "evaluated_in_train_mode": "evaluated_in_train_mode",
        "freeze_not_applied": "",
        "frozen": "parameter_at_rest unoptimized_parameter",
        "init_too_large": "overconfident_start",
        "inputs_not_scaled": "overconfident_start",
        "labels_wrong": "suspected_label_errors",
        "leak": "",
        "loss_balance": "",
        "loss_sign": "",
        "lost_in_rounding": "updates_lost_to_rounding",
        "lr_schedule": "learning_rate_cycles learning_rate_gone",
        "lr_too_large": "above_edge_of_stability learning_rate_too_large",
        "lr_too_small": "learning_rate_too_small",
        "nan": "nonfinite",
        "no_activation": "",
        "no_gradient": "parameter_at_rest",
        "no_log_softmax": "",
        "no_updates": "",
        "no_warmup": "learning_rate_too_large",
        "not_optimized": "unoptimized_parameter",
        "not_shuffled": "unshuffled_data",
        "optimizer_choice": "",
        "optimizer_not_restored": "optimizer_state_not_restored",
        "output_activation": "",
        "output_size": "",
        "overfitting": "hyperfitting memorised_without_generalising overfitting",
        "saturated_units": "saturated_units",
        "shape": "",
        "single_softmax": "",
        "targets_not_scaled": "",
        "targets_wrong": "",
        "too_deep": "",
        "too_few_steps": "",
        "trained_in_eval_mode": "trained_in_eval_mode",
        "vanishing_gradients": "vanishing_gradients",
        "wrong_loss": "",
        "zero_grad_missing": "gradients_carried_over",
    }.items()
}
#: Rules that say what a run looks like, not what made it so: unless it is the very cause, as with dead units.
SYMPTOMS = frozenset(
    {
        "attention_entropy_collapse",
        "attention_logit_approach",
        "attention_logit_growth",
        "dead_units",
        "divergence",
        "embedding_rows_never_updated",
        "gradient_spike",
        "gradient_underflow",
        "grokking_phase",
        "input_jump",
        "logit_drift",
        "loss_scale_thrash",
        "loss_spike",
        "naive_loss_minimisation",
        "no_better_than_guessing",
        "nonfinite",
        "norm_gain_collapse",
        "parameter_at_rest",
        "residual_explosion",
        "saturated_units",
        "softmax_collapse",
        "softmax_collapse_approach",
        "uniform_attention",
        "vanishing_gradients",
    }
)
OUTCOMES = ("right", "partly", "silent", "wrong")


@dataclass(frozen=True)
class Outcome:
    """What was found in one case.

    Attributes:
        name: of the case.
        faulty: one of `OUTCOMES`.
        head: the rule at the head of the first incident of the faulty run, "" if there is none.
        heads: the head itself names the cause.
        loud: rules of warnings and worse in the faulty run.
        alarms: rules of warnings and worse in the repaired run.
        notes: rules of information in the repaired run.
        losses: mean of the last 20 training losses, as reported and repaired; NaN if there are none.
    """

    name: str
    faulty: str
    head: str
    heads: bool
    loud: tuple[str, ...]
    alarms: tuple[str, ...]
    notes: tuple[str, ...]
    losses: tuple[float, float]


def run(case: Case, fault: bool, folder: Path) -> tuple[Verdict, list[Finding], float]:
    """One side of a case: its verdict, findings and last loss.

    Args:
        case: what to train, recorded as a user would.
        fault: as it was reported, else as it was repaired.
        folder: of the run; what was recorded there before is not trained again, but judged by the rules of today.
    """
    if not folder.exists():
        _train(case, fault, folder)
    recorded = monitor.open(folder)
    try:
        last = float(np.mean(recorded.series("loss.value")[1][-20:]))
    except (KeyError, monitor.MonitorError):
        last = math.nan
    return recorded.verdict(), recorded.findings(), last


def _train(case: Case, fault: bool, folder: Path) -> None:
    torch.manual_seed(0)
    handles: list[monitor.Handle] = []

    def watch(model: nn.Module) -> None:
        handles.append(monitor.attach(model, folder))

    with (
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
        warnings.catch_warnings(action="ignore"),  # of torch, about the fault
    ):
        try:
            case.train(fault, watch)
        finally:
            for handle in handles:
                handle.close()


def names(case: Case, finding: Finding) -> bool:
    """Whether a finding names a cause that the report gives."""
    if finding.rule == "nonfinite":
        return "nan" in case.causes and bool(re.search(case.born, f"{finding.site} {finding.module}"))
    return any(finding.rule in CAUSES[c] for c in case.causes)


def judge(case: Case, folder: Path) -> Outcome:
    """Run both sides in ``folder``, see `run`, and compare."""
    verdict, found, last = run(case, True, folder / case.name / "reported")
    _, repaired, sound = run(case, False, folder / case.name / "repaired")
    head = verdict.incidents[0].head if verdict.incidents else None
    loud = [f for f in found if f.severity != "info"]
    heads = head is not None and names(case, head)
    if heads or any(names(case, f) for f in loud):
        faulty = "right"
    elif head is None:
        faulty = "silent"
    else:
        faulty = "partly" if head.rule in SYMPTOMS else "wrong"
    if faulty == "partly" and head and head.rule in {f.rule for f in repaired}:
        faulty = "silent"  # the repaired run has it as well: it is no symptom of this fault
    return Outcome(
        case.name,
        faulty,
        head.rule if head else "",
        heads,
        _rules(loud),
        _rules(f for f in repaired if f.severity != "info"),
        _rules(f for f in repaired if f.severity == "info"),
        (last, sound),
    )


def _rules(findings: Iterable[Finding]) -> tuple[str, ...]:
    return tuple(sorted({f.rule for f in findings}))


@cache
def held_out() -> frozenset[str]:
    """Half of the cases, drawn once: rules may be changed by what is seen in the other half only."""
    drawn = sorted(CASES)
    random.Random(20261122).shuffle(drawn)
    return frozenset(drawn[: len(drawn) // 2])


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a share ``k / n`` (Wilson 1927), in [0, 1]."""
    if not n:
        return 0.0, 1.0
    z = 1.959964
    middle, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)
