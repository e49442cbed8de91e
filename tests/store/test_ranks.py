"""Joining what several processes say of their parts of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from monitor.block import ABSENT, ABSENT_BITS, Layout, RawBlock, Segment
from monitor.record.passes import alignment, distance, gradient, update
from monitor.store import ranks
from monitor.store.layout import TAIL, rank_name
from monitor.store.ranks import WAYS, Others, join
from monitor.store.tail import TailWriter

STATS = ("norm", "max_abs", "nonfinite", "spikes", "spike_ratio")


def rows(steps: Sequence[int], modules: dict[str, Sequence[Sequence[float]]], number: int = 1) -> RawBlock:
    """Rows of the gradient pass: for each module the statistics at each step."""
    values = np.array([modules[m] for m in modules], dtype=np.float32).transpose(1, 0, 2)
    segment = Segment("gradient", STATS, tuple(modules), 0)
    return RawBlock(Layout(number, (segment,)), np.array(steps), values.reshape(len(steps), -1))


def of(block: RawBlock, module: str) -> np.ndarray:
    """``(step, statistic)``, absent ones as -1."""
    segment = block.layout.segments[0]
    part = block.rows.reshape(len(block.steps), len(segment.modules), len(segment.stats))
    found = np.ascontiguousarray(part[:, segment.modules.index(module)])
    return np.where(found.view(np.uint32) == ABSENT_BITS, -1, found)


def test_every_statistic_has_its_way() -> None:
    """Oracle: definition. No statistic of these passes is left as one process has it."""
    for name, kind in (("gradient", gradient), ("update", update), ("distance", distance), ("alignment", alignment)):
        assert tuple(WAYS[name]) == kind.STATS


def test_closed_form() -> None:
    """Oracle: closed form. Norms 3 and 4 are one of 5, with 12 one of 13; counts add up, the larger extreme counts."""
    first = rows([7], {"w": [[3, 1, 0, 2, 50]], "b": [[1, 1, 0, 0, 0]]})
    second = rows([6, 7, 8], {"w": [[9] * 5, [4, 6, 1, 3, 20], [9] * 5]})
    third = rows([7], {"w": [[12, 2, 2, 0, 0]]})
    assert of(join(first, [[second]]), "w").tolist() == [[5, 6, 1, 5, 50]]
    whole = join(first, [[second], [third]])
    assert of(whole, "w").tolist() == [[13, 6, 3, 5, 50]]
    assert of(whole, "b").tolist() == [[1, 1, 0, 0, 0]]  # every process has the whole of it


def test_what_one_has_not_said_is_absent() -> None:
    """Oracle: definition. A step, a statistic, and a part: the first two are missing, the last one is not there."""
    a = float(ABSENT)
    first = rows([1, 2, 3], {"w": [[3, 1, 0, a, a]] * 3, "tiny": [[2, 2, 0, 0, 0]] * 3})
    first.rows[0, 3:5] = ABSENT
    second = rows([1, 3], {"w": [[4, 1, 0, 7, 7], [4, 1, 0, 7, 7]]})
    second.rows[1, 0] = ABSENT
    third = rows([1, 2, 3], {"tiny": [[0, 0, 0, 0, 0]] * 3})
    whole = join(first, [[second], [third]])
    assert of(whole, "w")[0].tolist() == [5, 1, 0, -1, -1]
    assert of(whole, "w")[1].tolist() == [-1] * 5
    assert of(whole, "w")[2, :3].tolist() == [-1, 1, 0]
    assert of(whole, "tiny").tolist() == [[2, 2, 0, 0, 0], [-1] * 5, [2, 2, 0, 0, 0]]


def test_values_that_are_not_finite_stay() -> None:
    """Oracle: definition. NaN is not hidden by an infinity, nor either by a number; nothing overflows on the way."""
    first = rows([0, 1, 2], {"w": [[np.nan, 1, 1, 0, 0], [np.inf, np.inf, 1, 0, 0], [3e38, 1, 0, 0, 0]]})
    second = rows([0, 1, 2], {"w": [[np.inf, np.nan, 2, 0, 0], [1, 1, 0, 0, 0], [1e38, 1, 0, 0, 0]]})
    norm, peak, bad = of(join(first, [[second]]), "w").T[:3]
    np.testing.assert_equal(norm[:2], [np.nan, np.inf])
    assert norm[2] == pytest.approx(np.sqrt(10) * 1e38)
    np.testing.assert_equal(peak[:2], [np.nan, np.inf])
    assert bad.tolist() == [3, 1, 0]


def test_nothing_is_joined_while_one_is_silent() -> None:
    """Oracle: definition. A sum that lacks a part would pass for the whole."""
    first, second = rows([0], {"w": [[3, 1, 0, 0, 0]]}), rows([0], {"w": [[4, 1, 0, 0, 0]]})
    assert join(first, [[second], []]) is first
    assert join(first, []) is first


def test_a_layout_that_changes() -> None:
    """Oracle: invariance. Rows of one process in one layout, of the other in two."""
    first = rows([0, 1, 2], {"w": [[3, 1, 0, 0, 0]] * 3, "late": [[3, 1, 0, 0, 0]] * 3})
    early, late = rows([0], {"w": [[4, 1, 0, 0, 0]]}), rows([1, 2], {"late": [[4] * 5] * 2, "w": [[4] * 5] * 2}, 2)
    whole = join(first, [[early, late]])
    assert of(whole, "w")[:, 0].tolist() == [5, 5, 5]
    assert of(whole, "late")[:, 0].tolist() == [3, 5, 5]


def test_one_that_falls_silent_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. Its parts are absent from then on, also when nothing of it is left."""
    monkeypatch.setattr(ranks, "PATIENCE", 0.0)
    tails = {}
    for rank in (1, 2):
        folder = tmp_path / rank_name(rank) / TAIL
        folder.mkdir(parents=True)
        tails[rank] = TailWriter(folder, 0, 0)
        tails[rank].layout(rows([0], {"w": [[4] * 5]}).layout)

    def write(rank: int, steps: Sequence[int]) -> None:
        for step in steps:
            tails[rank].row(step, 1, rows([step], {"w": [[4, 1, 0, 0, 0]]}).rows.tobytes())
            tails[rank].rotate(step + 1)

    others = Others(tmp_path, 0, [1, 2])

    def joined(steps: Sequence[int]) -> list[float]:
        block = others.join(rows(steps, {"w": [[2, 1, 0, 0, 0]] * len(steps)}))
        others.drop(steps[-1])
        return of(block, "w")[:, 0].tolist()

    write(1, range(3))
    write(2, range(2))
    assert joined([0, 1]) == [6, 6]
    assert others.behind == {}
    assert joined([2, 3]) == [-1, -1]
    assert others.behind == {1: (2, 3), 2: (1, 3)}
    write(2, range(2, 6))
    for segment in (tmp_path / rank_name(1) / TAIL).iterdir():
        segment.unlink()
    assert joined([4, 5]) == [-1, -1]
    assert others.behind == {1: (2, 5), 2: (1, 3)}
    assert others.silent == []
    assert others.last == 5


def test_the_writer_waits_a_little_and_clears_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: definition. Segments go when what was made of them is in parts; one that is behind is waited for once."""
    folder = tmp_path / rank_name(1) / TAIL
    folder.mkdir(parents=True)
    block = rows([0, 1], {"w": [[4, 1, 0, 0, 0]] * 2})
    tail = TailWriter(folder, 0, 0)
    tail.layout(block.layout)
    for step, row in zip(block.steps.tolist(), block.rows, strict=True):
        tail.row(step, block.layout.number, row.tobytes())
        tail.rotate(step + 1)
    monkeypatch.setattr(ranks, "PATIENCE", 0.05)
    others = Others(tmp_path, 0, [1])
    assert of(others.join(rows([0, 1], {"w": [[3, 1, 0, 0, 0]] * 2})), "w")[:, 0].tolist() == [5, 5]
    assert others.silent == []
    assert others.alone is None
    assert of(others.join(rows([2], {"w": [[3, 1, 0, 0, 0]]})), "w")[:, 0].tolist() == [-1]
    others.drop(0)
    assert [p.name for p in folder.iterdir()] == ["0-000000001.tail"]
    others.drop(5)  # the newest may still be written to
    assert len(list(folder.iterdir())) == 1
    others.drop(5, ended=True)
    assert list(tmp_path.iterdir()) == []
    others = Others(tmp_path, 0, [1])
    others.join(block)
    assert others.silent == [1]
    assert others.alone == 1
