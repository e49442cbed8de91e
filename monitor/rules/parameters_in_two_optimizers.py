"""Two optimizers change the same parameters with the gradient of one backward.

What it means:
    A parameter was given to two optimizers, and both make their update after the same backward: it moves twice in each
    step, by two rules that know nothing of one another. Its learning rate is none of the two that were set, momentum
    and weight decay count double, and a schedule or a clipping of one of them governs half of what happens. Usually the
    second optimizer was to have the rest of the model only: ``model.parameters()`` where it should say
    ``model.head.parameters()``, or a matrix for Muon that is in the list for AdamW too.

How it is decided:
    At 5 looks in a row a second optimizer made its update in the same step, on parameters that the first one had
    changed before, with a gradient that was the same bit for bit, and changed them again. A wrapper and the optimizer
    in it count as one, and two losses that train an encoder in turn have each a backward of its own.

What to do:
    Give each parameter to one optimizer. Where names decide, see that the two lists have nothing in common:
    ``{id(p) for p in first} & {id(p) for p in second}`` should be empty.

When it is wrong:
    A method that mixes the updates of two optimizers on purpose. The mistake is missed where the gradient is changed
    between the two, as by clipping for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

TWICE, SHARED = "optimizer_overlap.twice", "optimizer_overlap.shared"


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Optimizers that have used a gradient which another one had used already."""
    block = window[TWICE]
    twice, has = block[TWICE], block.has(TWICE)
    shared, known = exactly(window[SHARED], block.steps, block.modules)
    yield Hits(block.steps, block.modules, has & known & (twice > p["limit"]), has, shared, p["limit"], {})


RULE = Rule(
    id="parameters_in_two_optimizers",
    title="Parameters in two optimizers",
    severity="warning",
    site="update",
    message="Two optimizers change the same parameters ({value:.0f}), one after the other with the same gradient.",
    refute="no parameter is in both, or the method mixes the updates of two optimizers",
    remedies=(
        Remedy("give each parameter to one optimizer: the second one to have only what the first has not"),
        Remedy("if the updates of both are meant: choose learning rates and weight decays for their sum"),
    ),
    params=(Param("limit", 0, "parameters", "definition: one in both is one too many"),),
    needs=(TWICE, SHARED),
    check=check,
    lookback=1,
    hold=5,
    release=3,
    doc=__doc__ or "",
)
