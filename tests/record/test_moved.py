"""Models that are changed, converted or exchanged while they are recorded; scripts with defaults of their own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.passes.experts import alike, norms, sample
from tests.record.small import clean, mlp, train

pytestmark = pytest.mark.usefixtures("strict")


def test_made_on_no_device_and_filled_later(tmp_path: Path) -> None:
    """Oracle: definition. Attached on the meta device, a model is recorded once its parameters are real."""
    with torch.device("meta"):
        model = mlp()
    with monitor.attach(model, tmp_path / "run"):
        model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
        train(model)
    assert len(clean(tmp_path / "run", 25).series("grad_norm.norm", "0.weight")[0]) == 25


@pytest.mark.parametrize("change", ["double", "bfloat16", "resize"])
def test_parameters_converted_or_resized_midway(change: str, tmp_path: Path) -> None:
    """Oracle: definition. The recording goes on; what cannot be compared with the step before is left out."""
    model = mlp()
    with monitor.attach(model, tmp_path / "run"):
        train(model)
        if change == "resize":
            model[2].weight.data, model[2].bias.data = torch.randn(7, 16), torch.randn(7)
        else:
            getattr(model, change)()
        dtype = next(model.parameters()).dtype
        train(model, inputs=lambda: torch.randn(8, 12).to(dtype))
    clean(tmp_path / "run", 50)


def test_a_new_head_keeps_its_name_and_a_new_optimizer_the_series(tmp_path: Path) -> None:
    """Oracle: definition. Parameters are called what the model calls them; the loss of a run is one series."""
    model = mlp()
    with monitor.attach(model, tmp_path / "run"):
        train(model)
        model[2] = nn.Linear(16, 5)
        gc.collect()
        train(model)
    run = clean(tmp_path / "run", 50)
    assert set(run.frame("grad_norm")["module"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert len(run.series("loss.value", "")[0]) == 50


def test_a_group_added_midway_is_not_compared_with_an_old_copy(tmp_path: Path) -> None:
    """Oracle: definition, with a copy made before each step. Every recorded update is that of one step."""
    model = mlp()
    opt = torch.optim.SGD(model[2].parameters(), lr=0.1)
    true: dict[tuple[int, str], float] = {}
    with monitor.attach(model, tmp_path / "run"):
        for i in range(45):
            if i == 25:
                opt.add_param_group({"params": list(model[0].parameters())})
            if i == 33:
                model[0].weight.requires_grad_(False)
            opt.zero_grad()
            F.cross_entropy(model(torch.randn(8, 12)), torch.randint(0, 5, (8,))).backward()
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            opt.step()
            true |= {(i, n): (p.detach() - before[n]).norm().item() for n, p in model.named_parameters()}
    frame = clean(tmp_path / "run", 45).frame("update_ratio")
    assert {"0.bias", "2.weight"} <= set(frame["module"])
    for step, module, norm in zip(frame["step"], frame["module"], frame["update_norm"], strict=True):
        assert norm == pytest.approx(true[step, module], rel=1e-4, abs=1e-9)


@contextmanager
def exchanged() -> Iterator[None]:
    """Where modules are moved or converted, parameters are exchanged, as torch always does with sharded ones."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def doubles() -> Tensor:
    return torch.randn(8, 12, dtype=torch.float64)


class Mixture(nn.Module):
    """A router and its experts, a normalisation written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(12, 4), nn.ModuleList(nn.Linear(12, 5) for _ in range(4))
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        """``(row, 12)`` to ``(row, 5)``."""
        x = self.norm(x)
        share, chosen = self.router(x).softmax(-1).topk(2)
        each = torch.stack([expert(x) for expert in self.experts], 1)
        return (each.gather(1, chosen[..., None].expand(-1, -1, 5)) * share[..., None]).sum(1)


def test_parameters_may_be_exchanged(tmp_path: Path) -> None:
    """Oracle: invariance. torch exchanges no parameter that anything refers to weakly: nothing of ours does."""
    model = Mixture()
    with exchanged(), monitor.attach(model, tmp_path / "run"):
        train(model, 12)
        model.double()
        train(model, 12, doubles)
    run = clean(tmp_path / "run", 24)
    assert len(run.series("grad_norm.norm", "router.weight")[0]) == 24
    assert len(run.series("loss.value", "")[0]) == 24


@pytest.mark.parametrize("size", [12, 9000])
def test_a_converted_model_began_where_it_began(size: int, tmp_path: Path) -> None:
    """Oracle: dense float64 reference. The distance goes on, small and sampled parameters alike."""
    model = nn.Sequential(nn.Linear(12, size), nn.Linear(size, 5))
    start = [p.detach().double().clone() for p in model.parameters()]
    with exchanged(), monitor.attach(model, tmp_path / "run"):
        train(model, 15)
        model.double()
        train(model, 6, doubles)
        far = [(p.detach() - s).norm().item() for p, s in zip(model.parameters(), start, strict=True)]
    run = clean(tmp_path / "run", 21)
    for (name, _), distance in zip(model.named_parameters(), far, strict=True):
        steps, values = run.series("distance_from_start.distance", name)
        assert steps.tolist() == [0, 10, 20]
        assert values[-1] == pytest.approx(distance, rel=1e-5 if size == 12 else 0.2)


def test_parameters_that_nobody_has_are_let_go_of(tmp_path: Path) -> None:
    """Oracle: definition. Of a head that was replaced neither the values nor a copy are kept."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 5))
    with monitor.attach(model, tmp_path / "run"):
        train(model, 12)
        gone = weakref.ref(model[1].weight)
        model[1] = nn.Linear(16, 5)
        train(model, 12)
        gc.collect()
        assert gone() is None
    clean(tmp_path / "run", 24)


def test_what_is_logged_has_all_its_bits(tmp_path: Path) -> None:
    """Oracle: closed form. Also where the script has new tensors made in 16 bits."""
    model = nn.Linear(12, 5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with monitor.attach(model, tmp_path / "run") as handle:
            handle.log(val_number=3.14159, val_tensor=torch.tensor(2.71828, dtype=torch.float64))
            opt = torch.optim.SGD(model.parameters(), lr=0.1)
            F.cross_entropy(model(torch.randn(8, 12, dtype=torch.float32)), torch.zeros(8, dtype=torch.long)).backward()
            opt.step()
    finally:
        torch.set_default_dtype(torch.float32)
    run = clean(tmp_path / "run", 1)
    assert run.series("logged.value", "val_number")[1] == pytest.approx(3.14159, rel=1e-7)
    assert run.series("logged.value", "val_tensor")[1] == pytest.approx(2.71828, rel=1e-7)


def test_classes_of_eight_bits(tmp_path: Path) -> None:
    """Oracle: definition. In 8 bits the class 156 looks like -100, which is ignored; it is a class like others."""
    model = nn.Linear(12, 200)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run"):
        loss = F.cross_entropy(model(torch.randn(8, 12)), torch.full((8,), 156, dtype=torch.uint8))
        loss.backward()
        opt.step()
    run = clean(tmp_path / "run", 1)
    assert run.series("loss_zero_frac.rows", "cross_entropy")[1].tolist() == [8]
    assert run.series("nlm_rate.rate", "cross_entropy")[1].tolist() != [0]
    assert np.isfinite(run.series("zscore_target.mean", "cross_entropy")[1]).all()


def test_experts_in_double_precision() -> None:
    """Oracle: dense float64 reference. Fused and in a list."""
    fused = torch.randn(4, 6, 8, dtype=torch.float64)
    for parts in ([fused], [list(fused)]):
        np.testing.assert_allclose(norms(parts)[:, 0], fused.flatten(1).norm(dim=1), rtol=1e-6)
        w = F.normalize(fused.flatten(1), dim=1)
        largest = (w @ w.T)[tuple(torch.triu_indices(4, 4, 1))].max()
        with torch.autocast("cpu", torch.bfloat16):  # in which a script may have everything run
            assert alike(parts, sample(parts))[1].item() == pytest.approx(largest.item(), abs=1e-6)
