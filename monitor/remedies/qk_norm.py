"""QK-norm: queries and keys normalised per head, so that attention logits have a bound that training cannot move.

Attention logits grow because queries and keys grow, not because they align; at a high learning rate they grow until
the softmax is one-hot and its gradient 0. Once normalised, the largest possible logit is known.

Source: Dehghani et al. (2023), ViT-22B, arXiv 2302.05442, section 2; Wortsman et al. (2023), arXiv 2309.14322, for what
it does to the learning rates that still train; Henry et al. (2020), arXiv 2010.04245, where it began.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monitor.errors import UsageError


class QKNorm(nn.Module):
    """Normalise queries and keys over each head, before rotary embedding and before the dot product.

        self.qk_norm = QKNorm(head_dim)
        ...
        q, k = self.qk_norm(q, k)
        out = F.scaled_dot_product_attention(q, k, v)

    Args:
        head_dim: size of a head, the last axis of queries and keys.
        kind: "rms" divides by the root mean square; "layer" subtracts the mean first, as in ViT-22B.
        gain: True learns one factor per dimension, for queries and for keys, shared by the heads. Without it logits are
            bounded by ``√head_dim`` for ever; with it, by `bound`.
        eps: added to the mean square.

    Shape: queries and keys ``(…, head_dim)``, in any layout of batch, heads and tokens; the same comes back, in the
        dtype that came in.
    Numerics: normalised in float32 or better.
    Source: arXiv 2302.05442, sec. 2: LayerNorm without bias. The "rms" kind is that of OLMo 2 and Qwen 3.
    """

    def __init__(self, head_dim: int, *, kind: str = "rms", gain: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        if kind not in ("rms", "layer"):
            raise UsageError(f'QKNorm: kind is {kind!r}; expected "rms" or "layer".')
        self.head_dim = head_dim
        self.kind = kind
        self.eps = eps
        self.query_gain = nn.Parameter(torch.ones(head_dim)) if gain else None
        self.key_gain = nn.Parameter(torch.ones(head_dim)) if gain else None

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised queries and keys."""
        return self._normalised(q, self.query_gain), self._normalised(k, self.key_gain)

    @torch.no_grad()
    def bound(self) -> float:
        """What no logit ``⟨q, k⟩ / √head_dim`` can exceed in magnitude, in nats.

        Each normalised vector has length at most ``√head_dim``, so the bound is ``√head_dim · max_j |γq_j · γk_j|``.
        Waits for the device.
        """
        largest = 1.0
        if self.query_gain is not None and self.key_gain is not None:
            largest = (self.query_gain * self.key_gain).abs().max().item()
        return math.sqrt(self.head_dim) * largest

    def _normalised(self, x: Tensor, gain: Tensor | None) -> Tensor:
        if x.shape[-1] != self.head_dim:
            raise UsageError(
                f"QKNorm: the last axis of shape {tuple(x.shape)} is {x.shape[-1]}; expected head_dim = "
                f"{self.head_dim}. Split the heads before normalising."
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = None if gain is None else gain.to(dtype)
        if self.kind == "rms":
            y = F.rms_norm(x.to(dtype), (self.head_dim,), weight, self.eps)
        else:
            y = F.layer_norm(x.to(dtype), (self.head_dim,), weight, None, self.eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.head_dim}, kind={self.kind!r}, gain={self.query_gain is not None}, eps={self.eps}"
