"""What happens where memory ends: a process of its own may take so much and no more."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.curvature import Hessian, LossClosure
from monitor.errors import MonitorError
from tests.warm import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

WIDTH, ROWS, LAYERS = 64, 6_000, 12


def deep(rows: int = ROWS, layers: int = LAYERS) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A narrow network and a batch so long that what autograd keeps is nearly all of the memory."""
    torch.manual_seed(0)
    hidden = [f for _ in range(layers) for f in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 5)), torch.randn(rows, WIDTH), torch.randint(0, 5, (rows,))


def hessian(way: Any, rows: int = ROWS, layers: int = LAYERS) -> Hessian:
    model, x, y = deep(rows, layers)
    return Hessian(LossClosure(model, F.cross_entropy, (x, y)), way=way)


def proc(field: str) -> int:
    """Bytes of address space, as the kernel counts them."""
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{field}:")]
    return int(line.split()[1]) << 10


def confine(room: float) -> None:
    """Allow ``room`` bytes more than there are now."""
    limit = proc("VmSize") + int(room)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def in_a_fork(work: Callable[..., Any], *args: Any) -> Any:
    """What ``work`` returns in a copy of this process, whose memory and limit are its own."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            answer = work(*args)
        except BaseException as e:
            answer = f"{type(e).__name__}: {e}"
        os.write(write, pickle.dumps(answer))
        os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read, "rb") as pipe:
        return pickle.loads(pipe.read())


def room_of(way: str) -> int:
    """Bytes that two products take, besides what is there before them."""
    H = hessian(way)
    before = proc("VmSize")
    for _ in range(2):
        H(torch.ones(H.n))
    return proc("VmPeak") - before


def products(way: str, room: float, held: int = 0) -> tuple[list[str], float]:
    """The way after each of two products in so much room, of which ``held`` is taken between both, and their norm."""
    H = hessian(way)
    confine(room)
    ways, norms, more = [], [], []
    for _ in range(2):
        norms.append(float(H(torch.ones(H.n)).norm()))
        ways.append(H.way)
        more.append(torch.ones(held, dtype=torch.uint8))
    assert norms[0] == norms[1]
    return ways, norms[0]


def run(folder: str, room: float | None) -> tuple[str, float]:
    """Why there is no curvature of a training that has room for itself, and a checksum of what it learned."""
    model, x, y = deep()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    curvature = None if room is None else monitor.Curvature(every=1)
    with monitor.attach(model, folder, curvature=curvature):
        if room is not None:
            confine(room)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    absent = {a["what"]: a["why"] for a in monitor.open(folder).info["absent"]}
    return absent.get("curvature", ""), sum(float(p.detach().sum()) for p in model.parameters())


def all_of_it(folder: str) -> dict[str, Any]:
    """In the process of its own."""
    torch.set_num_threads(1)
    for way in ("cached", "recompute", "forward"):  # what is loaded at the first use counts for nobody
        small = hessian(way, rows=8, layers=1)
        small(torch.ones(small.n))
    cached, recompute = in_a_fork(room_of, "cached"), in_a_fork(room_of, "recompute")
    between = (cached + recompute) / 2
    return {
        "rooms": (cached, recompute),
        "cached": in_a_fork(products, "cached", between),
        "recompute": in_a_fork(products, "recompute", between),
        "auto": in_a_fork(products, "auto", between),
        "grown": in_a_fork(products, "auto", 1.05 * cached, int(0.6 * (cached - recompute))),
        "none": in_a_fork(products, "auto", 0.5 * recompute),
        "run": in_a_fork(run, f"{folder}/run", 0.8 * recompute),
        "control": in_a_fork(run, f"{folder}/control", None),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # glibc gives back what is mapped by itself, so that no free list hides what is used; threads share one arena
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    code = f"import json, sys; from {__name__} import all_of_it; print(json.dumps(all_of_it(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path_factory.mktemp("memory"))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_graph_that_does_not_fit_is_recomputed(found: dict[str, Any]) -> None:
    """Oracle: planted fault, in room that the kept graph exceeds and the recomputed one does not: the same product."""
    cached, recompute = found["rooms"]
    assert cached > 1.15 * recompute
    assert "can't allocate memory" in found["cached"]
    assert found["recompute"][0] == ["recompute"] * 2
    assert found["auto"] == found["recompute"]


def test_a_graph_is_given_up_when_memory_ends_later(found: dict[str, Any]) -> None:
    """Oracle: planted fault: the caller takes memory after the first product; the same product comes out."""
    assert found["grown"][0] == ["cached", "recompute"]
    assert found["grown"][1] == pytest.approx(found["recompute"][1], rel=1e-6)


def test_no_way_fits(found: dict[str, Any]) -> None:
    """Oracle: planted fault: one error that says so of every way."""
    assert found["none"].startswith(MonitorError.__name__)
    assert found["none"].count("can't allocate memory") >= 2


def test_training_goes_on_where_curvature_does_not_fit(found: dict[str, Any]) -> None:
    """Oracle: planted fault, and invariance: the run says why, and the weights are those without curvature."""
    (why, weights), (_, control) = found["run"], found["control"]
    assert "can't allocate memory" in why
    assert weights == control
