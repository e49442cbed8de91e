"""Values that the user gives: validation losses, accuracies, anything the training knows and tensors do not show."""

from __future__ import annotations

from typing import Any

import torch

from monitor.record.site import Site


class LoggedSite(Site):
    """Keeps what `Handle.log` was given until the row of the step is closed."""

    name = "logged"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._values: dict[str, float | torch.Tensor] = {}
        self._own: set[str] = set()  # quantities of evaluations that the user logs

    def log(self, name: str, value: float | torch.Tensor) -> None:
        """Remember ``value`` (a number or a one-element tensor) for the step that comes next; the later wins."""
        if "train" not in name.lower():
            self._own |= {kind for kind in ("loss", "acc") if kind in name.lower()}
        self._values[name] = value.detach().reshape(()).clone() if isinstance(value, torch.Tensor) else float(value)

    def evaluated(self, kind: str, value: float | torch.Tensor) -> None:
        """Remember the mean "loss" or "acc" of evaluations, unless the user logs one."""
        if kind not in self._own:
            self._values[f"eval_{kind}"] = value

    def waiting(self) -> bool:
        """True if something was logged after the last step. An evaluation there does not make a step of its own."""
        return bool(self._values)

    def on_row(self) -> None:
        """Record what was logged since the last row."""
        for name, value in self._values.items():
            self.rec.emit(
                "logged", ("value",), name, value.float().view(1) if isinstance(value, torch.Tensor) else (value,)
            )
        self._values.clear()
