from __future__ import annotations

from math import inf, nan, sin

from monitor.block import ColumnBlock
from tests.rules.series import Case, column

W = ("first.weight", "last.weight")
WAVE = [1.0 + 0.1 * sin(2.4 * t) for t in range(200)]


def norms(at: int, first: float, last: float) -> ColumnBlock:
    rows = [[x, 2 * x] for x in WAVE]
    rows[at] = [first, last]
    return column("grad_norm.norm", rows, W)


def elements(at: int, ratio: float, share: float, norm: float) -> tuple[ColumnBlock, ...]:
    """Of the first weight: g²/v of the most spiked element, and the largest one's part of the energy, at one step."""
    ratios, largest = [[50.0, 50.0] for _ in WAVE], [[0.1 * x, 0.2 * x] for x in WAVE]
    ratios[at][0], largest[at][0] = ratio, share**0.5 * norm
    return column("spam_spike.ratio", ratios, W), column("grad_norm.max_abs", largest, W)


def in_turn(largest_at: int) -> tuple[ColumnBlock, ...]:
    """Elements looked for at steps 0, 4, …; one is 100 times its usual size at 148. Its share is known at one step."""
    ratios: list[float | None] = [None if t % 4 else 50.0 for t in range(200)]
    ratios[148] = 1e4
    norms = [1.4 * x if t == 148 else x for t, x in enumerate(WAVE)]
    largest = [norms[largest_at] if t == largest_at else None for t in range(200)]
    return (
        column("grad_norm.norm", norms, ("w",)),
        column("spam_spike.ratio", ratios, ("w",)),
        column("grad_norm.max_abs", largest, ("w",)),
    )


def clipped(at: int, coefficient: float) -> tuple[ColumnBlock, ...]:
    """Norms that clipping holds at a tenth of their size, and at one step shortens by another factor to the same."""
    norms, factors = ([0.1 if t == at else 0.1 * x for t, x in enumerate(WAVE)], [0.1] * 200)
    factors[at] = coefficient
    return column("grad_norm.norm", norms, ("w",)), column("clip.coefficient", factors)


def at_edge(times: float, ratio: float) -> tuple[ColumnBlock, ...]:
    """A jump of one gradient at one step, all on one batch, and the ratio to the edge as it was measured before."""
    return (
        column("grad_norm.norm", [times if t == 150 else x for t, x in enumerate(WAVE)], ("w",)),
        column("edge_of_stability.ratio", [0.5, ratio], steps=[0, 140]),
        column("input_rms.fingerprint", [7.0] * 200, ("input[0]",)),
    )


CASES = (
    Case("×100, clipped to its usual size", clipped(150, 0.001), (("w", 150),), "warning"),
    Case("near miss: clipping shortens it by 4.9 times as much", clipped(150, 0.1 / 4.9)),
    Case("near miss: clipped to 0, since another gradient is infinite", clipped(150, 0.0)),
    Case("×100 in both: in order of execution", (norms(150, 100, 200),), ((W[0], 150), (W[1], 150)), "warning"),
    Case("×100 in the last only", (norms(150, 1, 200),), ((W[1], 150),)),
    Case("near miss: 4.9 times the median", (norms(150, 4.9, 2),)),
    Case(
        "near miss: 20 times the median, but the norm is as wild as that every few steps",
        (column("grad_norm.norm", [10 ** (1.3 * sin(2.4 * t)) for t in range(150)] + [20.0], ("w",)),),
    ),
    Case("near miss: 49 points are no baseline", (column("grad_norm.norm", [1.0] * 49 + [99.0], ("w",)),)),
    Case("50 are", (column("grad_norm.norm", [1.0] * 50 + [99.0], ("w",)),), (("w", 50),)),
    Case(
        "one element 71 times its usual size, with half of the energy",
        (norms(150, 1.4, 2), *elements(150, 5041, 0.51, 1.4)),
        ((W[0], 150),),
    ),
    Case("near miss: 70 times", (norms(150, 1.4, 2), *elements(150, 4900, 0.5, 1.4))),
    Case(
        "near miss: a rare embedding row, 1e6 times but a tenth of the energy",
        (norms(150, 1.4, 2), *elements(150, 1e6, 0.1, 1.4)),
    ),
    Case(
        "near miss: half of the energy lies in an element that is always that large, as the norm says",
        (norms(150, 1.19, 2), *elements(150, 1e6, 0.51, 1.19)),
    ),
    Case("gaps: elements are looked for in every fourth step only", in_turn(148), (("w", 148),)),
    Case("near miss: how much one element holds is known of another step only", in_turn(144)),
    Case(
        "gaps: a module that is used in every second step, the other never after step 60",
        (
            column(
                "grad_norm.norm",
                [[x if t % 2 else None, 1.0 if t < 60 else None] for t, x in enumerate([*WAVE[:151], 100.0])],
                W,
            ),
        ),
        ((W[0], 151),),
    ),
    Case("explained by the edge of stability: see edge_oscillation", at_edge(9.0, 0.97)),
    Case("not explained: below the edge", at_edge(9.0, 0.89), (("w", 150),)),
    Case("not explained: as large as no swing is", at_edge(101.0, 0.97), (("w", 150),)),
    Case(
        "not explained: the jump is one element's",
        (
            *at_edge(9.0, 0.97),
            column("spam_spike.ratio", [1e4 if t == 150 else 50.0 for t in range(200)], ("w",)),
            column("grad_norm.max_abs", [8.0 if t == 150 else 0.1 for t in range(200)], ("w",)),
        ),
        (("w", 150),),
    ),
    Case("constant", (column("grad_norm.norm", [[0.0, 1.0]] * 200, W),)),
    Case(
        "non-finite: neither a spike itself nor part of a baseline",
        (column("grad_norm.norm", [*WAVE[:140], nan, inf, *WAVE[142:150], 100.0], ("w",)),),
        (("w", 150),),
    ),
)
