"""Which processes hold what of a parameter, and what one that is not the first writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import monitor
from monitor.block import Layout, RawBlock, Segment
from monitor.record import part
from monitor.record.attach import _missing
from monitor.record.part import Part, Place, is_parted, sharers
from monitor.store import ranks
from monitor.store.ranks import Others
from monitor.store.tail import read_tail


@pytest.fixture
def four() -> Iterator[None]:
    """A process that is the first of four, which are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("mesh", "placements", "expected"),
    [
        ([0, 1, 2, 3], [Shard(0)], {0, 1, 2, 3}),
        ([0, 1, 2, 3], [Replicate()], {0}),
        ([[0, 1], [2, 3]], [Replicate(), Shard(0)], {0, 1}),
        ([[0, 1], [2, 3]], [Shard(1), Replicate()], {0, 2}),
        ([[0, 1], [2, 3]], [_StridedShard(0, split_factor=2), Shard(0)], {0, 1, 2, 3}),
        ([0, 2], [Shard(0)], {0, 2}),
        ([[0, 1], [2, 3]], [Partial(), Shard(0)], set()),
        ([1, 3], [Shard(0)], set()),
    ],
)
def test_who_shares_a_parameter(four: None, mesh: Any, placements: list[Any], expected: set[int]) -> None:
    """Oracle: definition. Of copies the first process's one counts; what is no cutting into parts has no sharers."""
    where = DeviceMesh("cpu", torch.tensor(mesh), _init_backend=False)
    p = DTensor.from_local(torch.ones(2, 2), where, placements, run_check=False)
    assert sharers(p) == expected
    assert is_parted(p) == (len(expected) > 1)
    assert sharers(torch.ones(2)) == frozenset()


def a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, warned_at: int = -1) -> list[int]:
    """Steps that stand in the tail of a process that was given these."""
    monkeypatch.setenv("RANK", "1")
    taker = Part(Place(str(tmp_path), 0, 0), 1)
    layout = Layout(1, (Segment("update", ("norm",), ("w",), 0),))
    taker.layout(layout)
    for step in range(steps):
        if step == warned_at:
            taker.warn("a site is broken")
        row = np.ones((1, 1), np.float32)
        taker.row(step, 1, row.tobytes())
        taker.take(RawBlock(layout, np.array([step]), row))
    taker.close("finished", None)
    return [int(s) for segment in read_tail(tmp_path, 1) for b in segment.blocks for s in b.steps]


def test_what_is_broken_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: definition. Rows that lack a site would say that there is no such part; so there are none."""
    assert a_part(tmp_path, monkeypatch, 5, warned_at=3) == [0, 1, 2]


def test_rows_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: definition. If the first process records no longer, the others do not fill the disk."""
    monkeypatch.setattr(part, "MOST", 4)
    assert len(a_part(tmp_path, monkeypatch, 50)) == 4


class Cut(nn.Module):
    """One parameter of which this process has a quarter."""

    def __init__(self) -> None:
        super().__init__()
        where = DeviceMesh("cpu", torch.arange(4), _init_backend=False)
        self.weight = nn.Parameter(DTensor.from_local(torch.ones(2, 3), where, [Shard(0)], run_check=False))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight.to_local() * x).sum()  # type: ignore[operator]


def test_what_the_run_says_of_the_others(four: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: definition. Until which step the norms are those of one process, or that they are while one is silent."""
    monkeypatch.setattr(ranks, "PATIENCE", 0.0)
    model = Cut()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run") as handle:
        for _ in range(3):
            opt.zero_grad()
            model(torch.ones(3)).backward()
            opt.step()
        recorder = handle._recorder
        assert recorder is not None

        def said(others: Others | None) -> str:
            return next((why for what, why in _missing(recorder, others) if what == "grad_norm"), "")

        alone = "the parameters are sharded: norms are those of this process alone"
        assert said(None) == alone
        layout = Layout(1, (Segment("update", ("update_norm", "param_norm"), ("weight",), 0),))
        first = RawBlock(layout, np.arange(12), np.ones((12, 2), np.float32))
        others = Others(tmp_path / "parts", 0, [1])
        others.join(first)
        assert said(others) == f"{alone}, for process 1 recorded nothing here"
        taker = Part(Place(str(tmp_path / "parts"), 0, 12), 1)
        taker.layout(layout)
        for step in range(12, 15):
            taker.row(step, 1, np.ones((1, 2), np.float32).tobytes())
        taker.close("finished", None)
        whole = others.join(RawBlock(layout, np.arange(12, 15), np.ones((3, 2), np.float32)))
        np.testing.assert_allclose(whole.rows, np.sqrt(2), rtol=1e-6)
        assert said(others) == f"{alone}, up to step 11: another began to record later"
        assert said(Others(tmp_path / "parts", 0, [1])) == ""
        others.alone = None
        others.join(RawBlock(layout, np.arange(15, 17), np.ones((2, 2), np.float32)))
        silent = "process 1 fell silent after step 14: what it has parts of is absent from then on"
        assert said(others) == silent
        others.last = 20
        assert said(others) == "process 1 was late between steps 14 and 16: what it has parts of may be absent there"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """What processes have in common, while this one waits to hear less long than it would."""
    kept = dist.HashStore()
    monkeypatch.setattr(part, "common_store", lambda: kept)
    monkeypatch.setattr(part, "SILENCE", 0.05)
    monkeypatch.setattr(part, "PATIENCE", 0.3)
    return kept


def test_one_that_waits_for_the_first_says_so(
    store: dist.Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: definition. Nothing is said if it is told at once, one line if it is told later, or never."""
    part.tell("monitor/0", Place(str(tmp_path), 2, 7))
    assert part.hear("monitor/0") == Place(str(tmp_path), 2, 7)
    assert capsys.readouterr().err == ""
    later = threading.Timer(0.15, part.tell, ("monitor/1", Place(str(tmp_path))))
    later.start()
    assert part.hear("monitor/1") == Place(str(tmp_path))
    later.join()
    assert capsys.readouterr().err == (
        "monitor: process 0 waits 0.3 s for the first process to begin this recording; otherwise it records nothing\n"
    )
    assert part.hear("monitor/2") == Place()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_tensor_that_cannot_be_asked() -> None:
    """Oracle: definition. What has no mesh that is understood is not joined, and nothing is raised."""

    class Odd:
        placements = (object(),)

        @property
        def device_mesh(self) -> object:
            raise RuntimeError("not mine to tell")

    assert sharers(Odd()) == frozenset()  # type: ignore[arg-type]
