"""Spike-aware clipping with momentum reset (SPAM): single elements of a gradient cannot wreck Adam's moments.

Adam divides by a second moment that has not seen a spike yet, so the step is too large; afterwards the lifted second
moment keeps steps too small (6,905 steps until a spike of 1,000 times is forgotten at beta2 = 0.999). Clipping the norm
shrinks every other element instead. SPAM caps just the spiked elements, and now and then begins the moments afresh.

Source: Huang et al. (2025), SPAM: Spike-Aware Adam with Momentum Reset, arXiv 2501.06842, and its official code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.errors import UsageError
from monitor.remedies._gradients import before_update

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
#: The learning rate right after a reset, as a part of the usual one (the official code's 1 - 0.99).
_LOWEST = 0.01


@torch.no_grad()
def clip_spikes_(grads: Iterable[Tensor], second_moments: Iterable[Tensor], threshold: float = 5000.0) -> None:
    """Cap every element of a gradient whose square exceeds ``threshold`` times its second moment, in place.

    ``g² > Θ·v  →  g ← sign(g)·√(Θ·v)``; all other elements keep their bits. Where ``v`` is 0 nothing has been seen yet
    and nothing is capped.

    Args:
        grads: dense gradients.
        second_moments: Adam's ``exp_avg_sq`` for each, as it is *before* the step: after it, ``g²/v`` is at most
            ``1/(1 - beta2)`` and nothing would ever be capped.
        threshold: Θ.

    Cost: two elementwise passes and two temporary copies of the largest gradient; no host sync.
    Numerics: in float32 or better. An infinite element is capped too; NaN stays NaN.
    Source: arXiv 2501.06842. Differs where v is 0: the official code makes such a gradient 0, and 0 for ever after.
    """
    for g, v in zip(grads, second_moments, strict=True):
        dtype = torch.promote_types(torch.promote_types(g.dtype, v.dtype), torch.float32)
        # √Θ·√v, not √(Θ·v): the product of a tiny v leaves the range of float32 later
        limit = v.to(dtype).sqrt().mul_(math.sqrt(threshold))
        spiked = (g.abs() > limit) & (v > 0)
        g.copy_(torch.where(spiked, torch.copysign(limit, g.to(dtype)).to(g.dtype), g))


class SpikeAwareClipping:
    """Make an optimizer of Adam's kind ignore what is spiked in a gradient, and reset its moments now and then.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        SpikeAwareClipping(optimizer)

    It acts in the optimizer's own step, after unscaling and clipping. Nothing is capped in the first ``settle`` steps
    after it is attached and after each reset, when second moments say little.

    Args:
        optimizer: any optimizer that keeps ``exp_avg_sq`` (Adam, AdamW, NAdam, RAdam and their kin).
        threshold: Θ: an element is spiked when ``g² > Θ·v``, |g| > 71 times its usual size for 5000.
        reset_every: ΔT, steps between resets of the moments; 0 for none but those you ask for with `reset`.
        warmup: steps over which the learning rate rises again after a reset, from 1/100, by a cosine.
        settle: steps in which nothing is capped.

    Raises:
        UsageError: if the optimizer has no second moment, or a number is out of range.

    Cost: `clip_spikes_` in each step.
    Source: arXiv 2501.06842; Θ, ΔT, the warm-up and its cosine, and the 20 steps as in the official code. Two
        differences: a reset also sets Adam's own step count to 0, so that its bias correction fits the new moments, and
        decoupled weight decay warms up with the learning rate it is coupled to in PyTorch.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        threshold: float = 5000.0,
        reset_every: int = 500,
        warmup: int = 150,
        settle: int = 20,
    ) -> None:
        if not all("betas" in group for group in optimizer.param_groups):
            raise UsageError(
                f"SpikeAwareClipping: {type(optimizer).__name__} has no second moment to compare gradients with; "
                "expected Adam or its kin. For others, use torch.nn.utils.clip_grad_norm_."
            )
        if threshold <= 0 or reset_every < 0 or warmup < 0 or settle < 1:
            raise UsageError(
                f"SpikeAwareClipping: threshold={threshold}, reset_every={reset_every}, warmup={warmup}, "
                f"settle={settle}; expected threshold > 0, reset_every >= 0, warmup >= 0, settle >= 1."
            )
        self.threshold = threshold
        self.reset_every = reset_every
        self.warmup = warmup
        self.settle = settle
        #: Resets so far, and steps since the last one (or since this was attached).
        self.resets = self.steps = 0
        self._optimizer = optimizer
        self._rates: list[tuple[dict[str, Any], Any]] = []
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            before_update(optimizer, self._clip),
            optimizer.register_step_post_hook(self._after_step),
        )

    def remove(self) -> None:
        """Leave gradients, moments and learning rate alone from the next step on."""
        for hook in self._hooks:
            hook.remove()
        self._restore()

    @torch.no_grad()
    def reset(self) -> None:
        """Begin the moments afresh now, and warm the learning rate up again: after a spike that was not caught."""
        for state in self._optimizer.state.values():
            for name in _MOMENTS:
                if isinstance(state.get(name), Tensor):
                    state[name].zero_()
            if isinstance(state.get("step"), Tensor):
                state["step"].zero_()
            elif "step" in state:
                state["step"] = 0
        self.resets += 1
        self.steps = 0

    def rate(self) -> float:
        """What the learning rate of the next step is multiplied by: 1, or less in the steps after a reset."""
        if not self.resets or self.steps >= self.warmup:
            return 1.0
        return 1 - (1 - _LOWEST) * (1 + math.cos(math.pi * self.steps / self.warmup)) / 2

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()  # if the last step raised, it is still lowered
        if self.reset_every and self.steps >= self.reset_every:
            self.reset()
        rate = self.rate()
        if rate < 1:
            for group in optimizer.param_groups:
                self._rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * rate

    def _clip(self) -> None:
        if self.steps < self.settle:
            return
        scale = getattr(self._optimizer, "grad_scale", None)  # set by GradScaler for optimizers that unscale inside
        grads, seconds = [], []
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                v = self._optimizer.state[p].get("exp_avg_sq") if p in self._optimizer.state else None
                if p.grad is not None and p.grad.layout == torch.strided and isinstance(v, Tensor):
                    grads.append(p.grad)
                    seconds.append(v * scale**2 if isinstance(scale, Tensor) else v)
        clip_spikes_(grads, seconds, self.threshold)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()
        self.steps += 1

    def _restore(self) -> None:
        for group, lr in self._rates:
            group["lr"] = lr
        self._rates.clear()
