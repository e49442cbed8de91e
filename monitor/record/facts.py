"""What is known about a run without looking into a tensor: model, parameters, optimizers, precision, versions."""

from __future__ import annotations

import numbers
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import monitor
from monitor.record.processes import count

_WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def clean(name: str) -> str:
    """A module's or parameter's dotted name without the prefixes that wrappers add."""
    return _WRAPPERS.sub(lambda m: m.group(1), name).replace("..", ".").strip(".")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, of data parallelism and of libraries such as Fabric."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None:
            inner = _wrapped(model)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _wrapped(model: nn.Module) -> nn.Module | None:
    """What a private class of an installed library holds and nothing besides; some are made anew for every call."""
    kind = type(model)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    if not kind.__name__.startswith("_") or not {"site-packages", "dist-packages"} & set(Path(file).parts):
        return None
    held = set(map(id, model.parameters()))
    same = (child for child in model.children() if held == set(map(id, child.parameters())))
    return next(same, None) if held else None


def compiled_regions(model: nn.Module) -> list[str]:
    """Names of the modules that `torch.compile` runs ("" is the model itself)."""
    return [
        clean(name)
        for name, m in model.named_modules()
        if getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod")
    ]


def parameter_names(models: Iterable[nn.Module]) -> dict[int, str]:
    """``id(parameter) -> name`` over all models in order of definition; with several models names carry an index."""
    roots = list(models)
    names: dict[int, str] = {}
    for i, root in enumerate(roots):
        prefix = "" if len(roots) == 1 else f"model[{i}]."
        for name, p in root.named_parameters():
            names.setdefault(id(p), prefix + clean(name))
    return names


def model_facts(
    models: Iterable[nn.Module],
    optimizers: Iterable[Optimizer],
    awaited: Iterable[Optimizer] = (),
    copies: Mapping[int, Tensor] | None = None,
) -> dict[str, Any]:
    """The facts of a run as plain data; see ``facts`` in run.json.

    Args:
        models: root modules, unwrapped.
        optimizers: those known so far, in the order in which they first stepped.
        awaited: those that are there but have not stepped yet.
        copies: what is trained in the place of a parameter, by its id.

    Returns:
        Keys ``modules``, ``parameters``, ``optimizers``, ``precision``, ``compiled``, ``class``, and ``processes``: how
        many train together. Of a parameter in none of the ``optimizers`` also whether one of the awaited has it, and
        whether it has a gradient now.
    """
    roots, opts = list(models), list(optimizers)
    owner: dict[int, tuple[int, int]] = {}
    for i, opt in enumerate(opts):
        for j, group in enumerate(opt.param_groups):
            for p in group["params"]:
                owner.setdefault(id(p), (i, j))
    coming = {id(p) for opt in awaited for group in opt.param_groups for p in group["params"]}
    names = parameter_names(roots)
    aliases: dict[int, list[str]] = {}
    for root in roots:
        for name, p in root.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(p), []).append(clean(name))
    parameters, seen = [], set()
    for root in roots:
        for p in root.parameters():
            if id(p) in seen:
                continue
            seen.add(id(p))
            where = owner.get(id((copies or {}).get(id(p), p)))
            parameters.append(
                {
                    "name": names[id(p)],
                    "shape": list(p.shape),
                    "dtype": str(p.dtype).removeprefix("torch."),
                    "numel": p.numel(),
                    "trainable": p.requires_grad,
                    "optimizer": where[0] if where else None,
                    "group": where[1] if where else None,
                    "tied_to": [a for a in dict.fromkeys(aliases[id(p)]) if a != names[id(p)]],
                }
                | ({} if where else {"awaited": id(p) in coming, "gradient": p.grad is not None})
            )
    return {
        "class": ", ".join(type(r).__name__ for r in roots),
        "modules": [
            {
                "name": clean(name),
                "class": type(m).__name__,
                "parameters": sum(p.numel() for p in m.parameters(recurse=False)),
            }
            for root in roots
            for name, m in root.named_modules()
        ],
        "parameters": parameters,
        "optimizers": [{"class": type(o).__name__, "groups": [_plain(g) for g in o.param_groups]} for o in opts],
        "precision": {
            "autocast": torch.is_autocast_enabled(),
            "matmul": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "compiled": any(compiled_regions(r) for r in roots),
        "processes": count(),
    }


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"parameters": len(group["params"])}
    for key, value in group.items():
        if isinstance(value, (str, bool, type(None))):
            found[key] = value
        elif isinstance(value, numbers.Real):
            found[key] = float(value)
        elif isinstance(value, tuple) and all(isinstance(v, numbers.Real) for v in value):
            found[key] = [float(v) for v in value]
    return found


def versions() -> dict[str, str]:
    """Versions of what the recording depends on."""
    return {
        "monitor": monitor.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
    }
