"""The cross-entropy is given probabilities instead of logits, so that softmax is applied twice.

What it means:
    ``cross_entropy`` takes raw scores and applies softmax itself. Given a model's softmax, it sees scores between 0
    and 1 only: with K classes its loss cannot fall below ln(e + K − 1) − 1 (1.46 for ten), the gradient of a row that
    is right never vanishes, and that of one that is far off nearly does. Such a network still learns, more slowly and
    worse than it could, which is why this mistake lives long.

How it is decided:
    The logits that were read are all between 0 and 1, and their mean is 1 / K to a thousandth: rows that sum to 1. At
    10 looks in a row.

What to do:
    Take the softmax out of the model, or out of the call of the loss. Where probabilities are wanted, for a metric or
    a prediction, take them aside. For a model that must give probabilities: ``nll_loss`` of their logarithm.

When it is wrong:
    Logits that sum to 1 and lie between 0 and 1 by another design than softmax. The same mistake in front of
    ``binary_cross_entropy_with_logits`` is the rule double_sigmoid's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import ODD, exactly, latest

MEAN, LOW, HIGH = "logit_scale.mean", "logit_scale.min", "logit_scale.max"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Logits that are probabilities."""
    block = window[MEAN]
    start = int(np.searchsorted(block.steps, window.first))
    steps, modules = block.steps[start:], block.modules
    low, high, level, excess = (
        exactly(window[ref], steps, modules)[0] for ref in (LOW, HIGH, "log_z.mean", "log_z.excess")
    )
    classes = np.rint(np.exp(level - excess))
    total = block[MEAN][start:] * classes
    has = block.has(MEAN)[start:] & np.isfinite(total) & np.isfinite(low) & np.isfinite(high)
    mask = has & (np.abs(total - 1) <= p["sum"]) & (low >= 0) & (high <= 1 + p["sum"])
    evidence = {"classes": classes, "smallest": low, "largest": high, "floor": np.log(np.e + classes - 1) - 1}
    if mask.any():
        evidence["accuracy"] = latest(window["train_accuracy.accuracy"], steps, modules)[0]
    yield Hits(steps, modules, mask, has, total, 1.0, evidence)


RULE = Rule(
    id="double_softmax",
    title="Softmax applied twice",
    severity="warning",
    site="logits",
    message="The {classes:.0f} logits of every row lie between {smallest:.3g} and {largest:.3g} and sum to "
    "{value:.4f}: they are probabilities already, and the loss of {module} cannot fall below {floor:.3f}.",
    refute="the model's last operation is neither softmax nor a division by a sum",
    remedies=(
        Remedy("take the softmax out of the model, or out of the call of the loss: cross_entropy applies its own"),
        Remedy("if the model must give probabilities: nll_loss of their logarithm"),
    ),
    params=(
        Param(
            "sum",
            1e-3,
            "of 1",
            f"as TheDeepChecker and UMLAUT; float32 rows sum to 1 within 2e-7, bfloat16 leaves 1e-3; {ODD}",
        ),
    ),
    needs=(MEAN, LOW, HIGH, "log_z.mean", "log_z.excess", "train_accuracy.accuracy"),
    check=check,
    lookback=1,
    hold=10,
    doc=__doc__ or "",
)
