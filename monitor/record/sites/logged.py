"""Values that the user gives: validation losses, accuracies, anything the training knows and tensors do not show.

Of evaluations that nobody logs, the loss is taken from the model's output, where it is in there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from monitor.record.site import Site

#: Name of the loss of evaluations, the mean over their batches.
EVALUATED = "eval_loss"


class LoggedSite(Site):
    """Keeps what `Handle.log` was given until the row of the step is closed."""

    name = "logged"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._values: dict[str, float | torch.Tensor] = {}
        self._own = False  # the user logs losses of evaluations
        self._sum: float | torch.Tensor = 0.0  # of the losses of evaluated batches
        self._batches = 0

    def log(self, name: str, value: float | torch.Tensor) -> None:
        """Remember ``value`` (a number or a one-element tensor) for the step that comes next; the later wins."""
        self._own |= "loss" in name.lower() and "train" not in name.lower()
        self._values[name] = value.detach().reshape(()).clone() if isinstance(value, torch.Tensor) else float(value)

    def waiting(self) -> bool:
        """True if something was logged after the last step. An evaluation there does not make a step of its own."""
        return bool(self._values)

    def on_evaluation(self, module: nn.Module, output: Any) -> None:
        """Keep the loss that a model in evaluation gave back."""
        loss = None if self._own else _loss(output)
        if loss is not None:
            self._sum = self._sum + (loss.item() if self.rec.on_cpu else loss.detach().float().reshape(()))
            self._batches += 1

    def on_row(self) -> None:
        """Record what was logged since the last row."""
        if self._batches and not self._own:
            self._values[EVALUATED] = self._sum / self._batches
        self._sum, self._batches = 0.0, 0
        for name, value in self._values.items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            self.rec.emit("logged", ("value",), name, tensor.float().view(1))
        self._values.clear()


def _loss(output: Any) -> torch.Tensor | None:
    """The one number in a model's output that is a loss: the output itself, its ``loss``, or in a tuple the first."""
    if isinstance(output, tuple | list):
        given = output
    else:
        given = [output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)]
    numbers = (x for x in given if isinstance(x, torch.Tensor))
    return next((x for x in numbers if x.dim() == 0 and x.is_floating_point()), None)
