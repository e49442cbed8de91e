"""Recording in a process that is not the first, where every process holds a part of each parameter.

The first process tells the others its run folder, through the store that they have in common; each writes the
statistics of its own parts there, and the first one's writer thread joins them (`monitor.store.ranks`). No collective
is called: a process that does not take part in one would stop all the others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from monitor.block import Layout, RawBlock
from monitor.record.private import common_store
from monitor.store.layout import TAIL, rank_name
from monitor.store.tail import TailWriter

#: Seconds a process waits to be told the folder. The first one tells when it is attached at the same place.
PATIENCE = 10.0

_recordings = count()


@dataclass(frozen=True)
class Place:
    """Where a run is recorded; ``path`` is empty if it is not."""

    path: str = ""
    attempt: int = 0
    start_step: int = 0


def is_parted(p: Tensor) -> bool:
    """True if every process has a part of ``p`` that no other has, so that the parts make up the whole."""
    placements, mesh = getattr(p, "placements", None), getattr(p, "device_mesh", None)
    if not placements or mesh is None or not dist.is_available() or not dist.is_initialized():
        return False
    return mesh.size() == dist.get_world_size() > 1 and all(x.is_shard() for x in placements)


def parted(models: Iterable[nn.Module]) -> bool:
    """True if some parameter of ``models`` is parted."""
    return any(is_parted(p) for m in models for p in m.parameters())


def tell(place: Place) -> None:
    """Tell the other processes where their next recording goes."""
    store = common_store()
    if store is not None:
        store.set(f"monitor/{next(_recordings)}", json.dumps(asdict(place)))


def hear() -> Place:
    """Where this process's next recording goes; waits up to `PATIENCE` seconds to be told."""
    store, key = common_store(), f"monitor/{next(_recordings)}"
    if store is None:
        return Place()
    try:
        store.wait([key], timedelta(seconds=PATIENCE))
        place = Place(**json.loads(store.get(key)))
    except (RuntimeError, ValueError, TypeError):  # nobody told in time
        return Place()
    return place if place.path and Path(place.path).is_dir() else Place()  # or the disk is another one


class Part:
    """Takes the rows of such a process: into a tail of its own, which the first one reads and clears.

    Args:
        place: where the first process records.
        rank: of this one.

    Raises:
        OSError: if its folder cannot be made.
    """

    def __init__(self, place: Place, rank: int) -> None:
        self.path = Path(place.path)
        folder = self.path / rank_name(rank) / TAIL
        folder.mkdir(parents=True, exist_ok=True)
        self._tail = TailWriter(folder, place.attempt, place.start_step)

    def layout(self, layout: Layout) -> None:
        """From now on rows have this layout."""
        self._tail.layout(layout)

    def row(self, step: int, layout_number: int, payload: bytes) -> None:
        """Write a row."""
        self._tail.row(step, layout_number, payload)

    def take(self, block: RawBlock) -> None:
        """Begin a new segment: the first process removes those that are complete."""
        self._tail.rotate(int(block.steps[-1]) + 1)

    def facts(self, facts: dict[str, Any]) -> None:
        """Are those of the first process."""

    def warn(self, text: str) -> None:
        """Is said by the process itself; the run's warnings belong to the first."""

    def table(self, name: str, step: int, table: Any) -> None:
        """Tables are the first one's."""

    def close(self, status: str, error: str | None) -> bool:
        """Write no more rows."""
        self._tail.close()
        return True


def rank() -> int:
    """Of this process, as launchers say it; 0 if there are no others."""
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdigit() else 0
