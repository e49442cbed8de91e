"""A part of an embedding has never been trained.

What it means:
    Some rows of an embedding have had no gradient since the start: the tokens (or positions, or categories) that they
    stand for have not occurred in training. Their values are those of the beginning, shrunk by weight decay, and what
    the model does when it meets one is random.

How it is decided:
    At least a tenth of the rows have never had a gradient, and in the last 10 looks (1,000 steps) fewer than one row in
    a hundred was new.

What to do:
    Nothing, if the vocabulary is larger than the data on purpose. Else look for ids that are cut or shifted on their
    way to the model, use a tokenizer made for these data, or make the embedding smaller. Do not use a model on longer
    sequences than those of its training.

When it is wrong:
    Rare tokens may come later. A vocabulary larger than the data is common, which is why this is information and no
    warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from monitor.rule import Hits, Param, Remedy, Rule, Window


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Embeddings with many rows that nothing has been learnt for, and hardly new ones."""
    block = window["embedding_rows.frac"]
    value, has = block["embedding_rows.frac"], block.has("embedding_rows.frac")
    size = int(p["window"])
    before, known = np.full(value.shape, np.nan), np.zeros(value.shape, dtype=np.bool_)
    if len(value) > size:
        before[size:] = value[:-size]
        apart = block.steps[size:] - block.steps[:-size] >= p["steps"]
        known[size:] = has[:-size] & apart[:, None]
    judged = has & known & ~np.isnan(value)
    fresh = before - value
    mask = judged & (value >= p["limit"]) & (fresh < p["fresh"])
    yield Hits(block.steps, block.modules, mask, judged, value, p["limit"], {"fresh": fresh})


RULE = Rule(
    id="embedding_rows_never_updated",
    title="Embedding rows never updated",
    severity="info",
    site="parameter",
    message="{value:.0%} of the rows of {module} have had no gradient since the start.",
    refute="the rows' tokens do not occur in the data, and are not meant to",
    remedies=(
        Remedy("check that ids are neither cut nor shifted on their way to the embedding"),
        Remedy("use a vocabulary made for these data, or a smaller embedding"),
    ),
    params=(
        Param("limit", 0.1, "fraction", "own choice: a padding row and a few rare tokens are less"),
        Param("fresh", 0.01, "fraction", "own choice: what is new in the window, of all rows"),
        Param("window", 10, "points", "own choice: 1,000 steps at the default cadence"),
        Param("steps", 900, "steps", "own choice: least length of the window"),
    ),
    needs=("embedding_rows.frac",),
    check=check,
    lookback=10,
    release=1,
    doc=__doc__ or "",
)
