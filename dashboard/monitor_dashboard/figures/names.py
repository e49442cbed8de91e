"""Dotted names of modules made short enough for their place, and still told apart."""

from __future__ import annotations

import re
from collections.abc import Sequence

from monitor.diagnosis.text import plain

#: What is left out of a name, with the dots around it.
_GAP = re.compile(r"\.*…[.…]*")


def short_names(names: Sequence[str]) -> list[str]:
    """``names`` without the dotted prefix that all of them share, which is replaced by "…"."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return ["…" * bool(shared) + ".".join(part[shared:]) for part in parts]


def fitted(names: Sequence[str], room: Sequence[int]) -> list[str]:
    """``names`` on one line each, none longer than its room in characters, and no two alike if that can be.

    What is cut is the middle; or, where two would then be alike, what all names have in common.
    """
    whole = [plain(name) for name in names]
    middle = [_GAP.sub("…", plain(name, width)) for name, width in zip(whole, room, strict=True)]
    for cut in (middle, short_names(whole), _varying(whole)):
        if len({*cut}) == len({*whole}) and all(len(n) <= width for n, width in zip(cut, room, strict=True)):
            return cut
    return [n if len(n) <= width else f"…{n[1 - width :]}" for n, width in zip(_varying(whole), room, strict=True)]


def _varying(names: Sequence[str]) -> list[str]:
    """Names of equally many parts without those that all have in common, which are replaced by "…"."""
    parts = [name.split(".") for name in names]
    if len({len(p) for p in parts}) > 1:
        return [*names]
    shared = [len(set(column)) == 1 for column in zip(*parts, strict=True)]
    short = [".".join("…" if same else part for part, same in zip(p, shared, strict=True)) for p in parts]
    return [_GAP.sub("…", name) for name in short]
