"""Gradients vanish on their way from the loss to the first layers.

What it means:
    Layer after layer the gradient is smaller by about the same factor, so that the first layers are given next to none
    while the last ones learn. It comes of depth without shortcuts: sigmoids, whose slope is at most 1/4; tanh or ReLU
    with weights that are too small to keep the size of a signal, as torch's default initial weights are.

How it is decided:
    The root mean square of the gradient of each weight matrix (or kernel) of a model, in the order in which they are
    defined, falls from the largest to the first by a factor of 10,000 or more, through 5 matrices or more, and evenly:
    its logarithm correlates with the place of the matrix by 0.85 or more. So at 100 recorded steps one after another.
    Biases, normalisations, embeddings, recurrent weights, and matrices whose gradient is exactly 0 (for which there are
    other rules) are left out.

What to do:
    Shortcuts around the layers (residual connections) or a normalisation in each; ReLU, GELU or their like instead of
    sigmoids; initial weights that keep the size of the signal (Kaiming for ReLU, Xavier with the gain of tanh); fewer
    layers. Adam hides the size of a gradient but not that it is the same rounding noise for every row, and below eps
    not even that.

When it is wrong:
    Layers whose order of definition is not that of execution, one after the other in the reverse order. A deep net may
    get out of it by itself, with Adam and patience: then the episode ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from monitor.metric import Array
from monitor.rule import Hits, Param, Remedy, Rule, Window

NORM = "grad_norm.norm"
CALIBRATED = (
    "calibrated on 43 healthy trainings of 5 to 22 matrices, and 12 of 6 to 51 that do not learn (sigmoids, tanh, "
    "ReLU, convolutions)"
)
_ROOT = re.compile(r"model\[\d+\]\.")


def check(window: Window, p: Mapping[str, float]) -> Iterable[Hits]:
    """Steps at which the gradient falls too far toward the input, at the first matrix of each model."""
    block = window[NORM]
    start = int(np.searchsorted(block.steps, window.first))
    norms, has = block[NORM][start:], block.has(NORM)[start:]
    chains = {next(iter(c)): c for c in _chains(window.facts, block.modules) if len(c) >= p["layers"]}
    shape = len(norms), len(chains)
    mask, judged = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    value, evidence = np.full(shape, np.nan), {k: np.full(shape, np.nan) for k in ("layers", "first", "last", "each")}
    for j, names in enumerate(chains.values()):
        at = [block.modules.index(name) for name in names]
        size = norms[:, at] / np.sqrt(list(names.values()))
        usable = has[:, at] & np.isfinite(size) & (size > 0)
        # mostly all of them, always: one pattern
        for pattern in usable[:1] if usable.all() else np.unique(usable, axis=0):
            rows = np.flatnonzero((usable == pattern).all(axis=1))
            n = int(pattern.sum())
            if n < p["layers"]:
                continue
            sizes = np.ascontiguousarray(size[rows][:, pattern])
            fall = sizes.max(axis=1) / sizes[:, 0]
            judged[rows, j], value[rows, j] = True, fall
            far = fall >= p["fall"]
            if far.any():
                rows, sizes, fall = rows[far], sizes[far], fall[far]
                mask[rows, j] = _evenness(np.log10(sizes)) >= p["even"]
                numbers = {"layers": n, "first": sizes[:, 0], "last": sizes[:, -1], "each": fall ** (1 / (n - 1))}
                for name, number in numbers.items():
                    evidence[name][rows, j] = number
    yield Hits(block.steps[start:], tuple(chains), mask, judged, value, p["fall"], evidence)


def _evenness(logs: Array) -> Array:
    """The correlation of each row, which is not constant, with the place in it, ``(step,)``."""
    place = np.arange(logs.shape[1]) - (logs.shape[1] - 1) / 2
    apart = logs - logs.mean(axis=1, keepdims=True)
    return (apart * place).sum(axis=1) / np.sqrt((apart**2).sum(axis=1) * (place**2).sum())


def _chains(facts: Mapping[str, Any], modules: tuple[str, ...]) -> Iterable[dict[str, int]]:
    """The weight matrices of each model that one optimizer trains, in order, with their numbers of elements."""
    tables = {m.get("name") for m in facts.get("modules", ()) if "Embedding" in str(m.get("class"))}
    recorded, found = set(modules), dict[tuple[str, Any], dict[str, int]]()
    for q in facts.get("parameters", ()):
        name = str(q.get("name"))
        if name not in recorded or len(q.get("shape", ())) < 2:
            continue
        root = _ROOT.match(name)
        prefix = root.group() if root else ""
        where, _, own = name.removeprefix(prefix).rpartition(".")
        if own == "weight" and where not in tables:
            found.setdefault((prefix, q.get("optimizer")), {})[name] = int(q["numel"])
    return found.values()


RULE = Rule(
    id="vanishing_gradients",
    title="Vanishing gradients",
    severity="warning",
    site="gradient",
    message="The gradient of {module} is {value:.2g} times smaller than that of the layers near the loss ({first:.2g} "
    "against {last:.2g} in the last, root mean square): {each:.2g} times a layer, through {layers:.0f}.",
    refute="the first layers are meant to stay as they are, or were not defined in the order in which they are called",
    remedies=(
        Remedy("put shortcuts around the layers, or a normalisation into each"),
        Remedy("use ReLU, GELU or their like instead of sigmoids, and initial weights made for them (Kaiming, Xavier)"),
        Remedy("use fewer layers"),
    ),
    params=(
        Param("fall", 1e4, "times", f"{CALIBRATED}: for 100 steps 540 and less against 13,000 and more"),
        Param("even", 0.85, "correlation", f"{CALIBRATED}: 0.87 and more in those"),
        Param("layers", 5, "matrices", "own choice: of fewer one alone may be the reason"),
    ),
    needs=(NORM,),
    check=check,
    hold=100,
    doc=__doc__ or "",
)
