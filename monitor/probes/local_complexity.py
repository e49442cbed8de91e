"""How many linear regions the network has around given inputs.

Around an input x lie the 2P vertices x ± r·v_p of a cross-polytope, v_p orthonormal directions. A unit whose
pre-activation is positive at some of them and not at others has its kink in between; their number, summed over layers
and averaged over inputs, measures how finely the input space is cut there.

Source: Humayun, Balestriero and Baraniuk (2024), Deep Networks Always Grok and Here is Why (arXiv 2402.15555), sec. 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from monitor.errors import UsageError
from monitor.record.probe import Moment, Probe

STATS = ("n", "cut", "units")
#: What makes a kink (or bends, at 0). `relu_` and the methods are what in-place modules end in.
_ACTIVATIONS = frozenset((
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.gelu, F.silu, F.mish, F.hardswish,
    F.softplus, F.prelu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, torch.prelu,
))  # fmt: skip


class LocalComplexity(Probe):
    """Measures ``local_complexity`` at fixed inputs.

    Args:
        inputs: ``(sample, …)`` floating point.
        radius: r, in units of the inputs. The paper has .005 to 5.
        directions: P, at most the number of elements of an input; the paper has 25.
        every: measure at each so many steps. Default: as often as 1 % of the run's time allows.

    Raises:
        UsageError: if the inputs are not floating point, or there are more directions than elements.

    The directions are drawn once, so that two steps differ by the network alone. Cost: 2P forwards of the inputs.

    Example:
        monitor.attach(model, probes=[LocalComplexity(x[:100], radius=0.05, every=500)])
    """

    name = "local_complexity"

    def __init__(self, inputs: Tensor, radius: float = 0.05, directions: int = 25, every: int | None = None) -> None:
        size = inputs[0].numel() if inputs.dim() > 1 and len(inputs) else 0
        if not inputs.is_floating_point() or not 0 < directions <= size or not radius > 0:
            raise UsageError(
                f"inputs are {inputs.dtype} of shape {list(inputs.shape)} with {directions} directions and radius "
                f"{radius}, expected floating ones with at least as many elements as directions, and radius > 0"
            )
        self.inputs = inputs.detach().clone()
        self.radius = radius
        self.vectors = orthonormal(directions, size)
        self.every = every
        self.cost = 2.0 * directions

    def measure(self, moment: Moment) -> None:
        """Count the units that change sign between the vertices, layer by layer."""
        with moment.evaluation():
            counts = cuts(moment.model, self.inputs, self.radius * self.vectors)
        for layer, values in counts.items():
            moment.emit("local_complexity", STATS, layer, values)


def orthonormal(count: int, size: int) -> Tensor:
    """``(count, size)`` float32 random orthonormal rows, always the same; the global random state is left alone."""
    drawn = torch.randn(size, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T.float()


def cuts(model: nn.Module, inputs: Tensor, offsets: Tensor) -> dict[str, Sequence[float]]:
    """`STATS` of every layer with an activation function: samples, cut units summed over them, units.

    Args:
        model: any module whose activations are torch's own.
        inputs: ``(sample, …)``.
        offsets: ``(direction, element)``: a vertex is an input plus or minus one of them.

    Returns:
        By the name of the module that the activation function is called in, numbered if there are several.

    Raises:
        UsageError: if no activation function is called.

    Cost: 2 x directions forwards, one vertex of all inputs at a time; two bools per unit and sample.
    """
    device = next((p.device for p in model.parameters()), inputs.device)
    x = inputs.to(device)
    vectors = offsets.to(x).reshape(len(offsets), 1, *x.shape[1:])
    above: dict[str, Tensor] = {}
    below: dict[str, Tensor] = {}
    for v in (*vectors, *-vectors):
        for layer, positive in _signs(model, x + v):
            above[layer] = above[layer] | positive if layer in above else positive
            below[layer] = below[layer] | ~positive if layer in below else ~positive
    if not above:
        raise UsageError("the model calls no activation function of torch")
    n = len(inputs)
    return {layer: (n, float((above[layer] & below[layer]).sum()), above[layer].numel() / n) for layer in above}


def _signs(model: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    """Where what every activation function is called on in one forward is positive, with a name for the place."""
    found: list[tuple[str, Tensor]] = []
    inside: list[str] = []

    class Seen(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func in _ACTIVATIONS:
                name = inside[-1] if inside else ""
                again = sum(n == name or n.startswith(f"{name}[") for n, _ in found)
                z = args[0] if args else (kwargs or {})["input"]
                found.append((f"{name}[{again}]" if again else name, z.detach() > 0))
            return func(*args, **(kwargs or {}))

    with _named(model, inside), Seen():
        model(x)
    return found


@contextmanager
def _named(model: nn.Module, inside: list[str]) -> Iterator[None]:
    """Keep in ``inside`` the names of the modules whose forward is running."""
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: inside.append(name)))
        hooks.append(module.register_forward_hook(lambda m, a, r: inside.pop() and None, always_call=True))
    try:
        yield
    finally:
        for h in hooks:
            h.remove()
