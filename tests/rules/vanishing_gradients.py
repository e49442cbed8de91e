from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, nan
from typing import Any

from monitor.block import ColumnBlock
from tests.rules.series import Case, Value, column

LAYERS = 6
WEIGHTS = tuple(f"layers.{i}.weight" for i in range(LAYERS))
OTHERS = ("embed.weight", "norm.weight", "layers.0.bias", "cell.weight_hh_l0")


def facts(numel: int = 64, optimizers: Sequence[int] = (0,) * LAYERS, prefix: str = "") -> Mapping[str, Any]:
    """A chain of matrices behind an embedding, and what is left out."""
    shapes = {"embed.weight": [32, 8], "norm.weight": [8], "layers.0.bias": [8], "cell.weight_hh_l0": [32, 8]}
    parameters = [{"name": prefix + n, "shape": s, "numel": 8, "optimizer": 0} for n, s in shapes.items()]
    for name, optimizer in zip(WEIGHTS, optimizers, strict=True):
        parameters.append({"name": prefix + name, "shape": [8, 8], "numel": numel, "optimizer": optimizer})
    modules = [{"name": "embed", "class": "Embedding"}, {"name": "norm", "class": "LayerNorm"}]
    return {"parameters": parameters, "modules": modules}


def norms(*rows: tuple[int, Sequence[Value]], prefix: str = "") -> tuple[ColumnBlock]:
    """So many steps each with these norms; those that are left out are 1e-9."""
    values = [[*[1e-9] * len(OTHERS), *row] for n, row in rows for _ in range(n)]
    return (column("grad_norm.norm", values, tuple(prefix + n for n in (*OTHERS, *WEIGHTS))),)


FALLING = [8 * 10.0 ** (i - 5) for i in range(LAYERS)]  # 1e-5 to 1, root mean square
SOUND = [2.0] * LAYERS
FIRST = WEIGHTS[0]

CASES = (
    Case("ten times a layer, from the start", norms((150, FALLING)), ((FIRST, 0),), "warning", facts()),
    Case(
        "later, until it gets out of it", norms((40, SOUND), (120, FALLING), (90, SOUND)), ((FIRST, 40),), "", facts()
    ),
    Case(
        "the second of two models, named by its first matrix",
        norms((150, FALLING), prefix="model[1]."),
        ((f"model[1].{FIRST}", 0),),
        "",
        facts(prefix="model[1]."),
    ),
    Case(
        "one of the six is exactly 0 and left out",
        norms((150, [0.0, *FALLING[1:-1], 80.0])),
        ((FIRST, 0),),
        "",
        facts(),
    ),
    Case("near miss: 9,999 times", norms((300, [8e-4 * 1.001, *FALLING[2:], 8.0])), (), "", facts()),
    Case("near miss: 99 steps", norms((99, FALLING), (50, SOUND), (99, FALLING), (50, SOUND)), (), "", facts()),
    Case("near miss: the first alone is small", norms((300, [1e-6, 8.0, 7.0, 6.0, 5.0, 4.0])), (), "", facts()),
    Case("near miss: in the other direction", norms((300, FALLING[::-1])), (), "", facts()),
    Case("near miss: two halves, each with an optimizer", norms((300, FALLING)), (), "", facts(64, (0, 0, 0, 1, 1, 1))),
    Case("near miss: four that are not 0", norms((300, [0.0, 0.0, *FALLING[2:]])), (), "", facts()),
    Case("near miss: it is not known which are matrices", norms((300, FALLING))),
    Case("gaps", norms(*[(1, FALLING if t % 2 else [None] * LAYERS) for t in range(240)]), ((FIRST, 1),), "", facts()),
    Case("constant", norms((300, SOUND)), (), "", facts()),
    Case("non-finite: these are left out", norms((150, [nan, inf, *FALLING[2:]])), (), "", facts()),
)
