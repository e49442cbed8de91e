"""A trainable parameter is in no optimizer.

What it means:
    The parameter asks for gradients, so every backward pass computes them, but no optimizer ever changes it. Either
    it was forgotten, and part of the model stays at its random start; or it was meant to be frozen, and its gradient
    is computed in vain.

How it is decided:
    From the wiring of the run, without any series: the parameter requires a gradient and was given one, and neither it
    nor a parameter tied to it belongs to a group of an optimizer that has stepped. One whose optimizer was there in the
    first step is waited for until another has made 100 updates: layers may be trained one after the other. Where an
    optimizer has tensors that are no parameters, those of 16 bits are not judged, which may be trained through a copy
    of all of them in one, as DeepSpeed keeps it; nor is any if none at all is in an optimizer.

What to do:
    Pass it to the optimizer, or freeze it with requires_grad_(False).

When it is wrong:
    A parameter that other code updates by hand from its gradient is in no optimizer rightly; a moving average, which is
    given none, is not meant. One that no sample of the first batch reached (an expert) is missed. An optimizer that is
    made, or steps for the first time, later than that is not known yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from monitor.rule import FactHit, Param, Remedy, Rule

_NARROW = ("bfloat16", "float16")


def audit(facts: Mapping[str, Any], p: Mapping[str, float]) -> Iterable[FactHit]:
    """Trainable parameters outside every optimizer.

    Raises:
        KeyError: if the optimizers or the parameters are not known.
    """
    if not facts.get("optimizers"):
        raise KeyError("optimizers")
    optimized = {q["name"] for q in facts["parameters"] if q["optimizer"] is not None}
    held = sum(group.get("parameters", 0) for o in facts["optimizers"] for group in o["groups"])
    if held and not optimized:
        return
    copied = _NARROW if held > len(optimized) else ()
    for q in facts["parameters"]:
        forgotten = q["optimizer"] is None and q.get("gradient", True) and not q.get("awaited")
        forgotten = forgotten and q["dtype"] not in copied
        if q["trainable"] and forgotten and optimized.isdisjoint(q["tied_to"]):
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
