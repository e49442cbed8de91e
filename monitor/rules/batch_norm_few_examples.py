"""Batch normalisation takes its statistics over a handful of examples.

What it means:
    The mean and variance that every feature is normalised with are those of so few examples that they are mostly noise.
    What the model computes for one example depends on which others happen to be beside it, and the running averages
    that are used in evaluation fit none of the batches it was trained on: it does worse there than in training.

How it is decided:
    At 5 looks in a row some batch normalisation in training mode was given fewer than 8 examples. Pixels or time steps
    of one example do not count as more: in the study below there were thousands of them.

What to do:
    Use GroupNorm or LayerNorm, which look at one example at a time; or SyncBatchNorm where several processes train; or
    a larger batch. Gradient accumulation does not help. A pretrained model: keep its batch normalisation in evaluation.

When it is wrong:
    Maps of many pixels that are little alike, as in segmentation, bear it better than the classification the threshold
    comes from, which is why this is information and no warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

EXAMPLES, SAMPLES = "batch_norm.examples", "batch_norm.samples"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Batches too small to normalise with."""
    block = window[EXAMPLES]
    value, has = block[EXAMPLES], block.has(EXAMPLES)
    samples = exactly(window[SAMPLES], block.steps, block.modules)[0]
    yield Hits(block.steps, block.modules, has & (value < p["limit"]), has, value, p["limit"], {"samples": samples})


RULE = Rule(
    id="batch_norm_few_examples",
    title="Batch normalisation over few examples",
    severity="info",
    site="activation",
    message="Batch normalisation takes its mean and variance over batches of {value:.0f} ({samples:,.0f} values).",
    refute="the model does as well in evaluation as in training mode",
    remedies=(
        Remedy("use torch.nn.GroupNorm, or a larger batch; gradient accumulation does not help"),
        Remedy("where several processes train: torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)"),
        Remedy("of a pretrained model: keep its batch normalisation in eval()"),
    ),
    params=(
        Param(
            "limit",
            8,
            "examples",
            "Wu & He 2018 (arXiv 1803.08494) fig. 1: ImageNet errors of 23.6 % at 32, 24.8 % at 8, 27.3 % at 4 and "
            "34.7 % at 2",
        ),
    ),
    needs=(EXAMPLES, SAMPLES),
    check=check,
    lookback=1,
    hold=5,
    release=3,
    doc=__doc__ or "",
)
