"""Calling the model on a probe's own data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from monitor.errors import UsageError


def outputs(model: nn.Module, *inputs: Tensor) -> Tensor:
    """What the model answers: ``(sample, value)`` float64 on the CPU; of sequences, at the last position.

    Args:
        model: any module; an answer with ``logits`` (transformers) counts as those.
        inputs: its positional arguments, each ``(sample, …)``; moved to the device of its parameters.

    Raises:
        UsageError: if the answer is something else.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    answer = model(*(x.to(device) for x in inputs))
    answer = getattr(answer, "logits", answer)
    if not isinstance(answer, Tensor) or len(answer) != len(inputs[0]):
        kind = f"a tensor of shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise UsageError(f"the model answered with {kind}, expected a tensor of {len(inputs[0])} rows")
    found = answer.detach().cpu().double()
    return found.reshape(len(found), -1) if found.dim() < 3 else found[:, -1].reshape(len(found), -1)
