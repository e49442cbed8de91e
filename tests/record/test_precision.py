"""What 16 bits lose: updates that are rounded away, and gradients that become 0."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.passes import distance, rounding, side_by_side, underflow

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16


def rounded(now: Tensor, before: Tensor, grad: Tensor) -> dict[str, float]:
    w, b, g = ([distance.sample(x.reshape(-1))] for x in (now, before, grad))
    (values,) = rounding.rounding_stats(w, b, g, [now.numel()]).tolist()
    return dict(zip(rounding.STATS, values, strict=False))


@pytest.mark.parametrize(
    ("change", "lost"), [(-1e-3, 1), (-(2.0**-9), 1), (-(2.0**-8), 0), (2.0**-8, 1), (2.0**-7, 0), (0.0, 1)]
)
def test_one_in_bfloat16(change: float, lost: int) -> None:
    """Oracle: closed form. Below 1 neighbours are 2^-8 apart, above it 2^-7; half of that is rounded to even."""
    before = torch.ones(1, dtype=BFLOAT16)
    found = rounded(before + change, before, torch.ones(1, dtype=BFLOAT16))
    assert found == {"n": 1, "asked": 1, "lost": lost, "elements": 1}


@pytest.mark.parametrize("most", [side_by_side.MOST, 4096], ids=["one buffer", "in pieces"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_lost_elements_are_counted(dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: naive transcription. Elements of several tensors, small and sampled, one after the other."""
    monkeypatch.setattr(side_by_side, "MOST", most)
    g = torch.Generator().manual_seed(0)
    shapes = [(7,), (), (300, 200), (90, 91)]
    before, earlier, steps = ([torch.randn(s, generator=g) for s in shapes] for _ in range(3))
    before, earlier = ([x.to(dtype) for x in xs] for xs in (before, earlier))
    now = [(b + 1e-3 * d.to(dtype)).to(dtype) for b, d in zip(before, steps, strict=True)]
    earlier = [torch.where(e > 0, e, w) for e, w in zip(earlier, now, strict=True)]
    grads = [torch.where(d > -1, d, 0).to(dtype) for d in steps]
    now[2][0, 0], grads[2][0, 1] = math.nan, math.nan
    nows, befores, given, then = ([distance.sample(x.reshape(-1)) for x in xs] for xs in (now, before, grads, earlier))
    found = rounding.rounding_stats(nows, befores, given, [x.numel() for x in now], then)
    for row, w, b, g_, e, whole in zip(found.tolist(), nows, befores, given, then, now, strict=True):
        asked = [i for i in range(w.numel()) if g_.reshape(-1)[i] != 0]
        lost = sum(bool(w.reshape(-1)[i] == b.reshape(-1)[i]) for i in asked)
        still = sum(bool(w.reshape(-1)[i] == e.reshape(-1)[i]) for i in asked)
        assert row == [w.numel(), len(asked), lost, whole.numel(), still]


def least(g: Tensor) -> dict[str, float]:
    (values,) = underflow.underflow_stats([distance.sample(g.reshape(-1))], [g.numel()]).tolist()
    return dict(zip(underflow.STATS, values, strict=True))


def test_what_float16_makes_of_small_numbers() -> None:
    """Oracle: closed form. Uniform on [−8, 8] units of 2^-24: a sixteenth becomes 0, an eighth one unit."""
    unit = 2.0**-24
    exact = torch.linspace(-8 * unit, 8 * unit, 16_001, dtype=torch.float64)
    found = least(exact.to(FLOAT16))
    assert found["least"] == unit
    assert (1 - found["rest"] / found["n"], found["coarse"] / found["n"]) == pytest.approx((1 / 16, 1 / 8), abs=2e-3)
    assert least(exact.float())["coarse"] <= 2
    assert least(exact.to(FLOAT16).float() / 1024 * 0.3)["coarse"] == found["coarse"]  # unscaled and clipped


def test_the_smallest_of_odd_gradients() -> None:
    """Oracle: definition. Zeros only, one element, infinite and NaN ones, those that float32 can hardly hold."""
    assert least(torch.zeros(5)) == {"n": 5, "rest": 0, "least": math.inf, "coarse": 0, "elements": 5}
    assert least(torch.tensor([0.0, -4.0])) == {"n": 2, "rest": 1, "least": 4, "coarse": 1, "elements": 2}
    assert least(torch.tensor([2.0, math.inf, -2.5, 4.0]))["rest"] == 4
    assert math.isnan(least(torch.tensor([2.0, math.nan]))["least"])
    assert least(torch.tensor([1e-37, 1.4e-37, 1.6e-37]))["coarse"] == 2


class Trained(nn.Module):
    """Two layers and an embedding of which most rows are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(100, 16), nn.Linear(16, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(self.embed(x)).relu())


def recorded(folder: Path, dtype: torch.dtype, autocast: torch.dtype | None = None, steps: int = 120) -> monitor.Run:
    torch.manual_seed(0)
    model = Trained().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with monitor.attach(model, folder):
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = F.cross_entropy(model(torch.randint(0, 8, (32,))).float(), torch.randint(0, 3, (32,)))
            loss.backward()
            optimizer.step()
    run = monitor.open(folder)
    assert not run.warnings
    return run


def test_where_it_is_recorded(tmp_path: Path) -> None:
    """Oracle: definition. Rounding of parameters of 16 bits, zeros where float16 is; nothing of either elsewhere."""
    kinds = {
        "float32": (torch.float32, None, set()),
        "autocast": (torch.float32, BFLOAT16, set()),
        "bfloat16": (BFLOAT16, None, {"lost_updates"}),
        "float16": (FLOAT16, None, {"lost_updates", "gradient_zeros"}),
        "float16 autocast": (torch.float32, FLOAT16, {"gradient_zeros"}),
    }
    for name, (dtype, autocast, wanted) in kinds.items():
        run = recorded(tmp_path / name, dtype, autocast, 12)
        assert set(run.metrics()) & {"lost_updates", "gradient_zeros"} == wanted, name


def test_columns_of_a_training(tmp_path: Path) -> None:
    """Oracle: closed form. Of 100 rows of an embedding at most 8 are asked for; what is still the same is known later.

    Plain SGD moves nothing that has no gradient, so rows that are not used do not count as lost.
    """
    run = recorded(tmp_path / "run", BFLOAT16)
    steps, asked = run.series("lost_updates.asked", "embed.weight")
    assert steps.tolist() == list(range(0, 120, 10))
    assert 0 < max(asked) <= 0.08
    assert run.series("lost_updates.still", "embed.weight")[0].tolist() == [100]
    for name, p in Trained().named_parameters():
        assert set(run.series("lost_updates.elements", name)[1]) == {p.numel()}
        assert all(0 <= v <= 1 for v in run.series("lost_updates.frac", name)[1])
