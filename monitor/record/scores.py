"""What attention written by hand leaves in the autograd graph: a softmax over products of queries and keys.

A softmax is one of attention if what it is given comes, through scaling, masking and an added bias, from a batched
product of two activations, and if what it gives goes into another product. A router's or a classifier's scores come
from a product with a parameter and are told apart by that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from monitor.record.private import saved

#: Nodes between a softmax and the product it reads, or the product that reads it, at most.
_BETWEEN = 32
#: Nodes looked at to tell a parameter from an activation.
_NEAR = 24
_SHAPES = (
    "View", "UnsafeView", "ReshapeAlias", "ToCopy", "Alias", "Clone", "Expand", "Unsqueeze", "Squeeze", "Slice",
    "Contiguous", "AsStrided",
)  # fmt: skip
_ORDERS = ("Permute", "Transpose")
_VALUES = ("Mul", "Div", "Add", "Sub", "MaskedFill", "Where", "Tanh", "Maximum", "Clamp", "CopySlices")
_PRODUCTS = ("Bmm", "Baddbmm")
_THROUGH = frozenset((*_SHAPES, *_ORDERS, *_VALUES, "NativeDropout"))
#: What makes an activation of whatever it is given.
_MAKES = frozenset((
    "Mm", "Addmm", "Bmm", "Baddbmm", "Convolution", "Embedding", "NativeLayerNorm", "FusedRmsNorm", "Softmax",
))  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """The product behind some attention logits.

    Attributes:
        query: node that the queries come from; None if nothing before them is trained.
        key: the same of the keys.
        norms: queries ``(n, query, d)``, keys ``(n, d, key)`` and the scale of their product, where n runs over batch
            and head; None if they cannot be read, or if the logits are not this product alone, scaled and masked.
    """

    query: Any
    key: Any
    norms: tuple[Tensor, Tensor, Any] | None


def find_scores(node: Any) -> Scores | None:
    """What the input of a softmax, whose node this is, was made from; None if that is no product of two activations."""
    products: list[tuple[Any, Any]] = []
    todo: deque[tuple[Any, Any]] = deque([(node, 1.0)])
    seen: set[Any] = set()
    while todo and len(seen) < _BETWEEN:
        node, scale = todo.popleft()
        kind = _kind(node)
        if node in seen:
            continue
        seen.add(node)
        if kind in _PRODUCTS:
            alpha = getattr(node, "_saved_alpha", 1)  # of baddbmm, whose first term is a bias
            products.append((node, None if scale is None else scale * alpha))
        elif kind in _THROUGH:
            scale = _scaled(node, kind, scale)
            todo.extend((n, scale) for n, _ in node.next_functions if n is not None)
    of_activations = [(n, s) for n, s in products if not any(_parameter_alone(x) for x, _ in n.next_functions[-2:])]
    if not of_activations:
        return None
    product, scale = of_activations[0]
    names = ("self", "mat2") if _kind(product) == "Bmm" else ("batch1", "batch2")
    q, k = (saved(product, name) for name in names)
    (query, _), (key, _) = product.next_functions[-2:]
    if q is None or k is None or scale is None or len(products) > 1:
        return Scores(query, key, None)
    return Scores(query, key, (q, k, scale))


def comes_from(node: Any, origins: Container[Any]) -> Any:
    """The one of ``origins`` that ``node`` was made from by dropout, casts and the like; None if by none."""
    return next((n for n in _back(node) if n in origins), None)


def _back(node: Any) -> Iterator[Any]:
    todo, seen = deque([node] if node is not None else []), set()
    while todo and len(seen) < _BETWEEN:
        node = todo.popleft()
        if node not in seen:
            seen.add(node)
            yield node
            if _kind(node) in _THROUGH:
                todo.extend(n for n, _ in node.next_functions if n is not None)


def _kind(node: Any) -> str:
    """``"Mul"`` for ``MulBackward0``."""
    return type(node).__name__.partition("Backward")[0]


def _scaled(node: Any, kind: str, scale: Any) -> Any:
    """The factor on what goes into ``node``, given that on what comes out; None if it is not one number."""
    if kind in _ORDERS and tuple(getattr(node, "_saved_dims", ()))[:2] != (0, 1):
        return None  # no longer (batch, head, …): whose norm is whose is not known
    if scale is None:
        return None
    if kind not in ("Mul", "Div"):
        return scale
    other = saved(node, "other")
    if other is None or other.dim() > 0:
        return None
    # a number written in the code is one on the CPU; what stands on the device is not waited for
    by = other.double() if other.device.type == "cpu" else other
    return scale * by if kind == "Mul" else scale / by


def _parameter_alone(node: Any) -> bool:
    """True if all that ``node`` comes from is a parameter, perhaps normalised or laid out anew."""
    todo, seen, found = deque([node] if node is not None else []), set(), False
    while todo:
        node = todo.popleft()
        if node in seen:
            continue
        seen.add(node)
        if len(seen) > _NEAR or _kind(node) in _MAKES:
            return False
        found |= type(node).__name__ == "AccumulateGrad"
        todo.extend(n for n, _ in node.next_functions if n is not None)
    return found
