"""The function mode is on the stack inside a forward only when something called in there is of interest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import monitor
from monitor.record.site import START

pytestmark = pytest.mark.usefixtures("nothing_compiled")
STEPS = 23


class Model(nn.Module):
    """A classifier that makes its loss itself from step ``inside`` on."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.layer, self.inside = nn.Linear(4, 3), inside
        self.seen: list[bool] = []

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``(row, 4)`` and ``(row,)`` to logits or the loss."""
        self.seen.append(bool(_get_current_function_mode_stack()))
        z = self.layer(x)
        return F.cross_entropy(z, y) if len(self.seen) > self.inside else z


def recorded(model: Model, run: Path, resume: bool = False) -> list[int]:
    """Steps of a training of ``model`` at which the classification loss was seen."""
    optimizer = torch.optim.Adam(model.parameters())
    generator = torch.Generator().manual_seed(0)
    with monitor.attach(model, run, resume=resume):
        for _ in range(STEPS):
            x, y = torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)
            out = model(x, y)
            (out if out.dim() == 0 else F.cross_entropy(out, y)).backward()
            optimizer.step()
            optimizer.zero_grad()
    frame = monitor.open(run).frame("loss_zero_frac")
    return sorted({int(step) for step in frame["step"]})


def test_a_forward_without_a_loss_is_watched_at_the_first_steps_and_then_at_every_fifth(tmp_path: Path) -> None:
    """Oracle: definition. The loss, made after the forward, is recorded at every step."""
    model = Model(inside=STEPS)
    assert recorded(model, tmp_path / "run") == list(range(STEPS))
    assert model.seen == [step < START or step % 5 == 0 for step in range(STEPS)]


def test_a_loss_made_inside_the_forward_is_seen_at_every_step(tmp_path: Path) -> None:
    """Oracle: definition. Also where a run goes on, at a step at which nothing else would be looked at."""
    for resume in (False, True):
        model = Model(inside=0)
        assert recorded(model, tmp_path / "run", resume) == list(range((1 + resume) * STEPS))
        assert all(model.seen)


def test_a_loss_that_moves_into_the_forward_is_found_at_the_next_look(tmp_path: Path) -> None:
    """Oracle: definition. It moves at step 12, the next look is at step 15, and from there on every step is watched."""
    model = Model(inside=12)
    assert recorded(model, tmp_path / "run") == [*range(12), *range(15, STEPS)]
    assert model.seen == [step < START or step >= 15 or step % 5 == 0 for step in range(STEPS)]
