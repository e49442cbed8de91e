"""The training data are memorised, and what was learned does not yet hold for other data.

What it means:
    The network answers nearly all training rows rightly and held-out rows much worse. Between this point and the one
    where the held-out accuracy rises lies the delay that is called grokking; it may be short, very long, or never end.
    The first step of the finding is where memorisation was complete, its last step where the gap closed. The delay
    ratio (generalised at step / memorised at step) is at most 3 in an ordinary training, above 10 in grokking.

How it is decided:
    At every evaluation that the script logs (val_acc, test accuracy and the like): training accuracy at least 99 % and
    more than 0.3 above the held-out accuracy, at 5 evaluations in a row. The training accuracy is the one that the
    script logs, or that of the last 512 training rows. Without a logged held-out accuracy nothing can be said.

What to do:
    Go on training as long as weights and logits still change in direction, not only in size (see
    naive_loss_minimisation, softmax_collapse). Weight decay, or the orthogonal gradient, shortens the delay; more data
    does so too, and below a certain share of the task no delay is long enough.

When it is wrong:
    With few classes, 0.3 is a large gap; with hard held-out data (another distribution, noisy labels) it may be the
    best that can be had, and the finding then merely describes an overfitted network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window
from monitor.rules._series import ACCURACIES, POOL, accuracies


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Training accuracy at the top, held-out accuracy far below."""
    steps, names, train, held = accuracies(window)
    start = int(np.searchsorted(steps, window.first))
    steps, train, held = steps[start:], train[start:], held[start:]
    gap = train - held
    evidence = {"train": train, "held_out": held}
    mask = (train >= p["train"]) & (gap > p["gap"])
    yield Hits(steps, names, mask, np.isfinite(gap), gap, p["gap"], evidence)


RULE = Rule(
    id="grokking_phase",
    title="Memorised, not generalised",
    severity="info",
    site="loss",
    message="{train:.1%} of the training rows are right, and {module} is only {held_out:.1%}.",
    refute="the held-out data are not of the distribution that is trained on",
    remedies=(
        Remedy("go on training while direction, not only size, of weights and logits changes"),
        Remedy("add weight decay, or take the part of the gradient along the weights away",
               "monitor.remedies.OrthogonalGradient"),
        Remedy("train on a larger share of the task"),
    ),
    params=(
        Param("gap", 0.3, "fraction", "own choice: overfitted but useful classifiers stay below it"),
        Param("train", 0.99, "fraction", "the usual mark of memorisation, e.g. Power et al. 2022 (arXiv 2201.02177)"),
    ),
    needs=ACCURACIES,
    check=check,
    lookback=POOL,
    hold=5,
    release=3,
    doc=__doc__ or "",
)  # fmt: skip
