from __future__ import annotations

import numpy as np
import pytest

from monitor_cli.render import paragraphs, spark


def draw(values: list[float], width: int = 80, log: bool = False, steps: list[int] | None = None) -> str:
    at = np.array(range(len(values)) if steps is None else steps, dtype=np.int64)
    return spark(at, np.array(values, dtype=np.float32), int(at[-1]), width, log)


def test_eight_levels() -> None:
    """Oracle: closed form. Equal steps from the smallest to the largest value are the eight blocks in order."""
    assert draw([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert draw([10.0**k for k in range(8)], log=True) == "▁▂▃▄▅▆▇█"


def test_a_spike_of_one_step_is_never_lost() -> None:
    """Oracle: planted fault. Whatever the width, the one high value is a full block in its place."""
    for width in range(1, 40):
        values = [0.0] * 128
        values[77] = 1.0
        line = draw(values, width)
        assert line.count("█") == 1
        assert line.index("█") == 77 * width // 128


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_its_own_sign(bad: float) -> None:
    """Oracle: planted fault."""
    assert draw([0, bad, 1]) == "▁×█"
    assert draw([bad] * 3, log=True) == "×××"


def test_edges() -> None:
    """Oracle: closed form."""
    assert draw([5, 5, 5]) == "▅▅▅"
    assert draw([0, 0]) == "▁▁"
    assert draw([0, 1, 100], log=True) == "▁▁█"
    assert draw([1, 2], steps=[0, 9]) == "▁█"
    assert draw([1, 2, 3], width=0) == ""
    assert draw([1, 2, 2], width=3, steps=[0, 1, 30]) == "█ █"
    assert draw([1, 2, 3], steps=[5, 9, 6]) == "█ ▅"  # went back to step 6: both values of that cell count


def test_a_docstring_falls_into_headings_formulas_and_prose() -> None:
    doc = """First.

    What it means:
        Two
        lines.

        a = b

    Rest.
    """
    assert list(paragraphs(doc)) == [
        ("", "First."),
        ("What it means", "Two\nlines."),
        ("", "    a = b"),
        ("", "Rest."),
    ]
