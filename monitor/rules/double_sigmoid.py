"""A binary cross-entropy with logits is given probabilities, so that sigmoid is applied twice.

What it means:
    ``binary_cross_entropy_with_logits`` and ``BCEWithLogitsLoss`` take raw scores and apply sigmoid themselves. Given
    what a sigmoid or a softmax has made, they see scores between 0 and 1 only: no probability lies outside 0.5 to 0.73,
    the loss of a positive cannot fall below 0.313 and that of a negative below 0.693, and gradients are at most a
    quarter of what they should be. Such a network still learns, slowly, and its threshold is in the wrong place.

How it is decided:
    At 5 looks in a row autograd says that the logits came out of a sigmoid or a softmax, and that at most their shape,
    order or dtype was changed in between.

What to do:
    Take the sigmoid out of the model, or out of the call of the loss; where probabilities are wanted, for a metric or a
    prediction, take them aside. Or keep it and use ``binary_cross_entropy``, which is less exact near 0 and 1.

When it is wrong:
    Hardly ever. The mistake is missed where autograd cannot tell: in a model that is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

SQUASHED, LOW, HIGH = "binary_logits.squashed", "binary_logits.min", "binary_logits.max"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Logits that came out of a sigmoid."""
    block = window[SQUASHED]
    value, has = block[SQUASHED], block.has(SQUASHED)
    low, high = (exactly(window[ref], block.steps, block.modules)[0] for ref in (LOW, HIGH))
    mask = has & (value > p["limit"])
    yield Hits(block.steps, block.modules, mask, has, value, p["limit"], {"smallest": low, "largest": high})


RULE = Rule(
    id="double_sigmoid",
    title="Sigmoid applied twice",
    severity="warning",
    site="logits",
    message="What {module} is given as logits came out of a sigmoid or a softmax and lies between {smallest:.3g} and "
    "{largest:.3g}: the loss of a negative cannot fall below 0.693, nor that of a positive below 0.313.",
    refute="the model's last operation is neither sigmoid nor softmax",
    remedies=(
        Remedy("take the sigmoid out of the model: binary_cross_entropy_with_logits applies its own"),
        Remedy("if the model must give probabilities: binary_cross_entropy, which takes them"),
    ),
    params=(Param("limit", 0, "1", "definition: 1 if autograd says so"),),
    needs=(SQUASHED, LOW, HIGH),
    check=check,
    lookback=1,
    hold=5,
    release=3,
    doc=__doc__ or "",
)
