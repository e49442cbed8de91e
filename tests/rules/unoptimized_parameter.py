from __future__ import annotations

from typing import Any

from tests.rules.series import Case


def facts(*parameters: dict[str, Any], optimizers: int = 1, held: int = 1) -> dict[str, Any]:
    """``held``: tensors that each optimizer has."""
    basic = {"shape": [4], "dtype": "float32", "numel": 4, "trainable": True, "optimizer": 0, "group": 0, "tied_to": []}
    return {
        "modules": [],
        "parameters": [basic | p for p in parameters],
        "optimizers": [{"class": "SGD", "groups": [{"lr": 0.1, "parameters": held}]}] * optimizers,
    }


OUT = {"optimizer": None, "group": None}
CASES = (
    Case(
        "two of three forgotten",
        found=(("b", 0), ("c", 0)),
        severity="warning",
        facts=facts({"name": "a"}, {"name": "b", **OUT}, {"name": "c", **OUT}),
    ),
    Case("near miss: frozen", facts=facts({"name": "a"}, {"name": "b", "trainable": False, **OUT})),
    Case(
        "near miss: tied to one that is optimized", facts=facts({"name": "a"}, {"name": "b", "tied_to": ["a"], **OUT})
    ),
    Case(
        "near miss: its optimizer has not stepped yet",
        facts=facts({"name": "a"}, {"name": "b", "awaited": True, **OUT}),
    ),
    Case("near miss: a copy without gradient", facts=facts({"name": "a"}, {"name": "b", "gradient": False, **OUT})),
    Case(
        "near miss: of 16 bits, and the optimizer has a tensor that is no parameter",
        facts=facts({"name": "a"}, {"name": "b", "dtype": "bfloat16", **OUT}, held=2),
    ),
    Case(
        "of 32 bits, though the optimizer has such a tensor",
        found=(("b", 0),),
        facts=facts({"name": "a"}, {"name": "b", **OUT}, {"name": "c", "dtype": "float16", **OUT}, held=2),
    ),
    Case(
        "of 16 bits, and the optimizer has nothing but parameters",
        found=(("b", 0),),
        facts=facts({"name": "a"}, {"name": "b", "dtype": "bfloat16", **OUT}),
    ),
    Case("near miss: the optimizer has nothing but others", facts=facts({"name": "a", **OUT}, {"name": "b", **OUT})),
    Case("gaps: no optimizer has stepped yet", facts=facts({"name": "a", **OUT}, optimizers=0)),
    Case("gaps: no facts at all"),
    Case("constant: everything in its place", facts=facts({"name": "a"}, {"name": "b"})),
    Case(
        "non-finite: an empty parameter counts too",
        found=(("e", 0),),
        facts=facts({"name": "a"}, {"name": "e", "numel": 0, **OUT}),
    ),
)
