"""Numbers the script handed over itself, such as a validation loss.

    value = what ``handle.log(name=value)`` was given during the step

one series per name, recorded at the steps at which it was logged and absent in between. Where no loss or no accuracy
is logged, evaluations are looked for: forwards of the model in `eval()` without gradients whose output is the loss that
is trained on, or holds it as ``loss`` or in a tuple, or is then given to that one of torch's loss functions. What was
evaluated since the last step has the means ``eval_loss`` and, of classes, ``eval_acc`` with the next step: over targets
(the accuracy of a batch of more than half a million logits over evenly spaced ones), or over batches where the model
makes the loss itself. They are of all data that the script evaluates but those it has trained on, as far as these are
known again: on a CPU, and not where the script alters them at random. Where it evaluates several sets, log each under a
name of its own.

Healthy, unhealthy: as the script means it. A validation loss that rises while `loss` falls is overfitting; a
validation accuracy that rises long after the training accuracy has reached 1 is grokking.

Source: the script.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """The value as it was logged."""
    return {"value": recorded(block, "value")}


def oracle() -> Iterable[Case]:
    """Two names, logged at different steps."""
    value = [[2.5, None], [None, None], [nan, 0.75]]
    yield Case(
        {"value": value}, {"value": value}, "recorded values pass unchanged", modules=("val_loss", "val_accuracy")
    )


METRIC = Metric(
    id="logged",
    title="Logged by the script",
    site="state",
    columns=(Column("value", "1", "number given to handle.log, or the mean over an evaluation"),),
    compute=compute,
    source="the script",
    cost="nothing; evaluations that are found: one read of their logits, and of 256 rows of inputs every 4 steps",
    plot=Plot("value"),
    oracle=oracle,
    reads="logged",
    doc=__doc__ or "",
)
