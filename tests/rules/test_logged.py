"""What rules make of the script's own numbers: names, gaps, pooled batches."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.metric import Block
from monitor.rules._series import filled, logged_as, pooled


def test_names() -> None:
    """Oracle: definition. A word for the data and one for the quantity, in any spelling; the usual one first."""
    names = [
        "test/accuracy",
        "eval_loss",
        "ValAcc",
        "train_acc",
        "loss",
        "validation accuracy 5",
        "contest_acc",
        "testLoss",
    ]
    assert logged_as(names, "accuracy") == ["ValAcc", "validation accuracy 5", "test/accuracy"]
    assert logged_as(names, "loss") == ["eval_loss", "testLoss"]
    assert logged_as(names, "accuracy", train=True) == ["train_acc"]
    assert logged_as(names, "loss", train=True) == []


def test_filled() -> None:
    """Oracle: closed form. A gap keeps the last value for as many rows as told, and a recorded NaN is one."""
    values = np.array([[np.nan, 7], [1, 7], [0, 7], [0, 7], [0, 7], [np.nan, 7]], dtype=np.float64)
    has = np.array([[0, 1], [1, 1], [0, 1], [0, 1], [0, 1], [1, 1]], dtype=np.bool_)
    block = Block(np.arange(6), ("a", "b"), {"x": values}, {"x": has})
    np.testing.assert_array_equal(filled(block, "a", 2), [np.nan, 1, 1, 1, np.nan, np.nan])
    np.testing.assert_array_equal(filled(block, "b", 0), np.full(6, 7.0))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8) | st.none()), min_size=1, max_size=30), st.integers(1, 6)
)
def test_pooled(batches: list[tuple[int, int | None]], most: int) -> None:
    """Oracle: naive transcription. Right answers over rows of so many batches; cut anywhere with that overlap."""
    rows = np.array([np.nan if n is None else float(n) for _, n in batches])
    right = np.array([min(r, n or 0) for r, n in batches], dtype=np.float64)
    share = right / rows
    got = pooled(share, rows, 12, most)
    for i, (_, n) in enumerate(batches):
        if n is None:
            assert np.isnan(got[i])
            continue
        back = min(max(-(-12 // n), 1), most)
        pool = [j for j in range(max(0, i + 1 - back), i + 1) if batches[j][1] is not None]
        assert got[i] == right[pool].sum() / rows[pool].sum()
    half = len(batches) // 2
    start = max(0, half - most)
    np.testing.assert_array_equal(got[half:], pooled(share[start:], rows[start:], 12, most)[half - start :])
