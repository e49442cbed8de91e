"""Which processes hold what of a parameter, and what one that is not the first writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from monitor.block import Layout, RawBlock, Segment
from monitor.record import part
from monitor.record.part import Part, Place, is_parted, sharers
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


def test_a_tensor_that_cannot_be_asked() -> None:
    """Oracle: definition. What has no mesh that is understood is not joined, and nothing is raised."""

    class Odd:
        placements = (object(),)

        @property
        def device_mesh(self) -> object:
            raise RuntimeError("not mine to tell")

    assert sharers(Odd()) == frozenset()  # type: ignore[arg-type]
