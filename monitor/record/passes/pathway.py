"""The ways of samples through the experts of a model: how far apart two are, how smooth through depth, how many kinds.

    g_l(i, e)  mean over the tokens of sample i of P(expert e), the softmax of the scores of router l

A pathway is a string: for each layer the experts of a sample by falling g, until their sum exceeds a threshold, layers
parted by a hyphen ("3,1,5-2,0"). As symbols, an expert is one and a hyphen is one, as in the distances that are
compared between models; as characters, the string is taken as it is written.

Source: Li et al. (2025), Where to find Grokking in LLM Pretraining, arXiv 2506.21551, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DISTANCE = ("distance", "half_distance", "chosen_distance", "characters", "samples", "pairs")
CONSISTENCY = ("inconsistency", "mean_cosine", "samples", "undefined")
DIMENSION = ("dimension", "samples", "experts")
CHURN = ("changed", "assigned", "steps", "lr_part")

#: Cumulative weight of the experts that make a pathway, from the paper; for few experts the paths saturate there, and
#: half of it tells more.
THRESHOLD, HALF = 0.7, 0.5
#: Pairs compared, and cells of all their tables: with long pathways fewer pairs are.
PAIRS, CELLS, FEWEST = 200, 1 << 25, 16

_LAYER = -1  # the symbol between two layers


def experts_of(g: Floats, threshold: float) -> list[list[int]]:
    """The experts of each sample in one layer, by falling weight, until their sum exceeds ``threshold``.

    Args:
        g: ``(sample, expert)``, each row adding up to 1.
        threshold: below 1. Equal weights stand in the order of the experts.
    """
    order = np.argsort(-g, axis=1, kind="stable")
    total = np.cumsum(np.take_along_axis(g, order, 1), axis=1)
    number = np.minimum((total <= threshold).sum(axis=1) + 1, g.shape[1])
    return [row[:n].tolist() for row, n in zip(order, number.tolist(), strict=True)]


def chosen_of(g: Floats, k: int) -> list[list[int]]:
    """The ``k`` experts of largest weight of each sample in one layer."""
    return np.argsort(-g, axis=1, kind="stable")[:, :k].tolist()


def symbols(layers: Sequence[list[list[int]]]) -> list[list[int]]:
    """The pathway of each sample as symbols: experts, and -1 between two layers."""
    found: list[list[int]] = []
    for sample in zip(*layers, strict=True):
        path: list[int] = []
        for i, chosen in enumerate(sample):
            path += [_LAYER, *chosen] if i else chosen
        found.append(path)
    return found


def written(layers: Sequence[list[list[int]]]) -> list[str]:
    """The pathway of each sample as it is written."""
    return ["-".join(",".join(map(str, chosen)) for chosen in sample) for sample in zip(*layers, strict=True)]


def pairs_of(samples: int, length: int) -> Ints:
    """``(pair, 2)`` different samples, each pair once; the same in every run of as many samples.

    Args:
        samples: how many there are.
        length: of the longest pathway; bounds the number of pairs.
    """
    first, second = np.triu_indices(samples, 1)
    wanted = max(FEWEST, min(PAIRS, CELLS // max(1, length) ** 2))
    if len(first) > wanted:
        at = np.sort(np.random.default_rng(0).choice(len(first), wanted, replace=False))
        first, second = first[at], second[at]
    return np.stack((first, second), 1)


def edit_distances(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> Ints:
    """Levenshtein distances ``(pair,)`` of sequences, pair by pair.

    Args:
        a: sequences of symbols of at least -1.
        b: as many.

    All tables advance by one row together; along a row ``min(t_j, d_{j-1} + 1)`` is ``j + min_{i ≤ j}(t_i - i)``.
    Cost: 6 passes over a ``(pair, length)`` array of int32 for each symbol of the longest of ``a``.
    """
    wide, long = max(map(len, b)), max(map(len, a))
    rows, columns = _padded(a, long, -2), _padded(b, wide, -3)
    ends = np.array([len(s) for s in a]), np.array([len(s) for s in b])
    at = np.arange(wide + 1, dtype=np.int32)
    table = np.tile(at, (len(a), 1))
    found = np.where(ends[0] == 0, ends[1], 0)
    for i in range(long):
        best = np.minimum(table[:, :-1] + (columns != rows[:, i : i + 1]), table[:, 1:] + 1)
        table[:, 0] = i + 1
        table[:, 1:] = best
        table -= at
        np.minimum.accumulate(table, axis=1, out=table)
        table += at
        done = ends[0] == i + 1
        found[done] = table[done, ends[1][done]]
    return found.astype(np.int64)


def _padded(sequences: Sequence[Sequence[int]], length: int, filler: int) -> npt.NDArray[np.int32]:
    padded = np.full((len(sequences), length), filler, dtype=np.int32)
    for row, s in zip(padded, sequences, strict=True):
        row[: len(s)] = s
    return padded


def mean_distance(paths: Sequence[Sequence[int]], pairs: Ints, *, normalised: bool = True) -> float:
    """Mean edit distance over ``pairs``, each divided by the length of the longer pathway if ``normalised``."""
    a, b = ([paths[i] for i in column] for column in pairs.T)
    found = edit_distances(a, b).astype(np.float64)
    if normalised:
        found /= [max(len(x), len(y), 1) for x, y in zip(a, b, strict=True)]
    return float(found.mean())


def distances(g: Sequence[Floats], k: Sequence[int]) -> list[float]:
    """The statistics `DISTANCE`.

    Args:
        g: for each layer ``(sample, expert)``.
        k: for each layer the experts of a token.

    Returns:
        NaN for every distance where a weight is not finite: there are no pathways then.
    """
    if not all(np.isfinite(x).all() for x in g):
        return [float("nan")] * 4 + [len(g[0]), 0]
    full, half = ([experts_of(x, t) for x in g] for t in (THRESHOLD, HALF))
    chosen = [chosen_of(x, n) for x, n in zip(g, k, strict=True)]
    letters = [[ord(c) for c in path] for path in written(full)]
    samples = len(letters)
    pairs = pairs_of(samples, max(map(len, letters)))
    found = [mean_distance(symbols(layers), pairs) for layers in (full, half, chosen)]
    return [*found, mean_distance(letters, pairs, normalised=False), samples, len(pairs)]


def consistency(g: Sequence[Floats], weights: Sequence[Floats]) -> list[float]:
    """The statistics `CONSISTENCY` of C_i = 1 − mean_l c_l / (max_l c_l + 1e-8), c_l = cos(e_l, e_{l+1}), e = ḡ W.

    Args:
        g: for each layer ``(sample, expert)``.
        weights: for each layer ``(expert, feature)``, alike in features.

    Returns:
        Sums over samples; C is left out where the largest cosine is not above 0.
    """
    e = [x @ w for x, w in zip(g, weights, strict=True)]
    with np.errstate(all="ignore"):
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in e]
        c = np.stack([(a * b).sum(axis=1) for a, b in pairwise(unit)], 1)
        mean, largest = c.mean(axis=1), c.max(axis=1)
        rough = 1 - mean / (largest + 1e-8)
    undefined = largest <= 0
    return [float(rough[~undefined].sum()), float(mean.sum()), len(c), int(undefined.sum())]


def dimension(g: Floats) -> float:
    """Σ_j μ_j / (μ_j + λ), μ the eigenvalues of gᵀg and λ the mean of the diagonal of g gᵀ; ``(sample, expert)``."""
    if not np.isfinite(g).all():
        return float("nan")
    mu = np.maximum(np.linalg.eigvalsh(g.T @ g), 0)
    return float((mu / (mu + np.square(g).sum(axis=1).mean())).sum())
