"""Some labels contradict what is learned from all the others.

What it means:
    For a steady part of the training examples the model prefers another class than their label, visit after visit,
    although it has learned the rest: these labels are wrong, or cannot be told from the input. If training goes on, the
    model learns them by heart, and what it says of new data gets worse.

How it is decided:
    An example is recognised when it comes again, by its content or by the ids given to `handle.note`, and the margin of
    its label over the largest other logit is averaged over its visits. The examples with a negative mean are between 4
    and 50 % of at least 100; they are at least three quarters as many as after two thirds of the visits, so that this
    is no learning curve on its way down; and at most half of them belong to classes that are not learned as a whole,
    which is what happens to rare classes.

What to do:
    Look at them: the table `examples` of the run lists all examples, the least margin first. Those that nobody has
    numbered are found in the data by `monitor.remedies.fingerprints`. Relabel or drop the wrong ones: on digits with
    10 % of the labels replaced, training without the tenth with the least margin raised the test accuracy from 0.893 to
    0.973, where clean labels give 0.978 (means of 5 seeds). Where that cannot be done, stop early.

When it is wrong:
    Classes that overlap look the same (two moons with noise 0.3: 8 %): if nobody could tell them apart, nothing is
    wrong with the labels. A model that is too small for its task learns only the easy part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import exactly

SHARE = "example_margin.negative"
OTHERS = ("earlier", "whole", "visits", "examples")


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """A share of negative margins that stays where it is."""
    block = window[SHARE]
    steps, modules, share = block.steps, block.modules, block[SHARE]
    found = {name: exactly(window[f"example_margin.{name}"], steps, modules)[0] for name in OTHERS}
    earlier, whole, visits, examples = (found[name] for name in OTHERS)
    has = block.has(SHARE) & (examples >= p["examples"]) & (earlier == earlier)
    mask = has & (share >= p["least"]) & (share <= p["most"]) & (share >= p["steady"] * earlier)
    mask &= whole <= p["whole"]
    yield Hits(steps, modules, mask, has, share, p["least"], {"visits": visits, "examples": examples})


RULE = Rule(
    id="suspected_label_errors",
    title="Suspected label errors",
    severity="info",
    site="input",
    message="The labels of {value:.1%} of {examples:.0f} training examples contradict what is learned from the others, "
    "after {visits:.1f} visits of each.",
    refute="somebody who looks at the first examples of the table `examples` agrees with their labels",
    remedies=(
        Remedy(
            "look at the first examples of the table `examples`, and relabel or drop the wrong ones",
            "monitor.remedies.fingerprints",
        ),
        Remedy("else stop early, before they are learned by heart"),
    ),
    params=(
        Param(
            "least",
            0.04,
            "fraction",
            "calibrated on 12 clean and 6 relabelled trainings: clean below 0.03 after 6 visits",
        ),
        Param("most", 0.5, "fraction", "own choice: above, it is the task that is not learned"),
        Param(
            "steady",
            0.75,
            "of the share after 2/3 of the visits",
            "as for least: with wrong labels 0.86 and more, while learning below 0.7",
        ),
        Param("whole", 0.5, "fraction", "own choice: rare classes that are never predicted are another matter"),
        Param("examples", 100, "count", "own choice"),
    ),
    needs=(SHARE, *(f"example_margin.{name}" for name in OTHERS)),
    check=check,
    hold=2,
    doc=__doc__ or "",
)
