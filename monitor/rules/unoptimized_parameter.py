"""A trainable parameter is in no optimizer.

What it means:
    The parameter asks for gradients, so every backward pass computes them, but no optimizer ever changes it. Either
    it was forgotten, and part of the model stays at its random start; or it was meant to be frozen, and its gradient
    is computed in vain.

How it is decided:
    From the wiring of the run, without any series: the parameter requires a gradient, and neither it nor a parameter
    tied to it belongs to a group of an optimizer that has stepped.

What to do:
    Pass it to the optimizer, or freeze it with requires_grad_(False).

When it is wrong:
    A parameter that some other code updates by hand (a moving average, a codebook) is trainable only in name. An
    optimizer that has not stepped yet is not known yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from monitor.rule import FactHit, Param, Remedy, Rule


def audit(facts: Mapping[str, Any], p: Mapping[str, float]) -> Iterable[FactHit]:
    """Trainable parameters outside every optimizer.

    Raises:
        KeyError: if the optimizers or the parameters are not known.
    """
    if not facts.get("optimizers"):
        raise KeyError("optimizers")
    optimized = {q["name"] for q in facts["parameters"] if q["optimizer"] is not None}
    for q in facts["parameters"]:
        if q["trainable"] and q["optimizer"] is None and optimized.isdisjoint(q["tied_to"]):
            yield FactHit(q["name"], float(q["numel"]), p["elements"])


RULE = Rule(
    id="unoptimized_parameter",
    title="Trainable parameter in no optimizer",
    severity="warning",
    site="parameter",
    message="{module} ({value:,.0f} elements) requires a gradient, but no optimizer changes it.",
    refute="other code of the script updates it, or its optimizer steps later",
    remedies=(
        Remedy("pass it to the optimizer: optimizer.add_param_group({'params': [parameter]})"),
        Remedy("if it is meant to be frozen: parameter.requires_grad_(False)"),
    ),
    params=(Param("elements", 0, "elements", "definition: one forgotten element is one too many"),),
    audit=audit,
    doc=__doc__ or "",
)
