"""Under torch.compile: no extra graph, no recompilation, the same bits, and what cannot be seen is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

import monitor
from tests.record.trainings import Digest, batches, seed

pytestmark = pytest.mark.usefixtures("nothing_compiled")


class Backend:
    """Counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, example: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, example)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            x = x + b(x)
        return self.head(x)


def whole(model: nn.Module, backend: Backend) -> nn.Module:
    return torch.compile(model, backend=backend)  # pyright: ignore[reportReturnType]


def in_place(model: nn.Module, backend: Backend) -> nn.Module:
    model.compile(backend=backend)
    return model


def blocks(model: nn.Module, backend: Backend) -> nn.Module:
    assert isinstance(model, Net)
    for b in model.blocks:
        b.compile(backend=backend)
    return model


def train(how: Callable[[nn.Module, Backend], nn.Module], watch: Callable[[nn.Module], object], when: str) -> Any:
    seed()
    model, backend, digest = Net(), Backend(), Digest()
    if when == "before":
        watch(model)
    called = how(model, backend)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(x: Tensor, y: Tensor) -> None:
        opt.zero_grad()
        loss = F.cross_entropy(called(x), y)
        loss.backward()
        opt.step()
        digest.add(loss)

    data = list(batches(8))
    for x, y in data[:2]:
        step(x, y)
    if when == "after":
        watch(called)
    with dynamo.patch(error_on_recompile=True):
        for x, y in data[2:]:
            step(x, y)
    with torch.no_grad():
        digest.add(called.eval()(data[0][0]))
    return digest.finish(model, opt), backend.graphs


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", [whole, in_place, blocks])
def test_no_graph_more_and_not_a_bit_different(how: Any, when: str, tmp_path: Path) -> None:
    """Oracle: invariance. The same hash and the same number of graphs, where any recompilation raises."""
    control = train(how, lambda _: None, when)
    handles: list[monitor.Handle] = []
    torch._dynamo.reset()
    assert train(how, lambda m: handles.append(monitor.attach(m, tmp_path / "run")), when) == control
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    expected = 8 if when == "before" else 6
    assert run.steps == expected
    assert len(run.series("grad_norm_total.norm")[0]) == expected
    assert not run.warnings
    losses = len(run.series("loss.value")[0]) if "loss.value" in run.refs() else 0
    if how is in_place:
        assert losses == 0
        assert any("compiled in place" in a["why"] for a in run.info["absent"] if a["what"] == "loss")
    elif how is whole and when == "before":
        assert losses == expected - 1  # the wrapper is found after the first step
    else:
        assert losses == expected


def test_modules_made_inside_a_compiled_function(tmp_path: Path) -> None:
    """Oracle: definition. Its initialisation interrupts the graph, and is called with the mode on the stack."""
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    made = torch.compile(lambda: nn.Linear(4, 2)(x).sum(), backend=Backend())
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(4):
            model(x).square().mean().backward()
            made()
            opt.step()
    assert monitor.open(tmp_path / "run").steps == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside the compiler
def test_inductor_gives_the_same_bits(tmp_path: Path) -> None:
    """Oracle: invariance, under the default backend, which would fuse differently around a graph break."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")

    def run(watch: Callable[[nn.Module], object]) -> str:
        seed()
        model, digest = Net(), Digest()
        watch(model)
        called = torch.compile(model)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for x, y in batches(6):
            opt.zero_grad()
            loss = F.cross_entropy(called(x), y)
            loss.backward()
            opt.step()
            digest.add(loss)
        return digest.finish(model, opt)

    control = run(lambda _: None)
    torch._dynamo.reset()
    assert run(lambda m: monitor.attach(m, tmp_path / "run")) == control
