"""Recording in a process that is not the first, where processes hold parts of parameters.

The first process tells the others its run folder, through the store that they have in common; each writes the
statistics of its own parts there, and the first one's writer thread joins them (`monitor.store.ranks`). No collective
is called: a process that does not take part in one would stop all the others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from monitor.block import Layout, RawBlock
from monitor.record.facts import clean, unwrap
from monitor.record.flush import to_stderr
from monitor.record.private import common_store
from monitor.store.layout import TAIL, names, rank_name
from monitor.store.parts import Vectors
from monitor.store.tail import TailWriter

#: Seconds a process waits to be told the folder. The first one tells when it is attached at the same place, which it
#: may come to some seconds later.
PATIENCE = 10.0
#: Seconds after which it says that it waits: it may be the only one that is attached.
SILENCE = 1.5
#: Segments of its tail that wait for the first process: of more, it has stopped reading them.
MOST = 64

_recordings: Counter[str] = Counter()


@dataclass(frozen=True)
class Place:
    """Where a run is recorded; ``path`` is empty if it is not."""

    path: str = ""
    attempt: int = 0
    start_step: int = 0


def sharers(p: Tensor) -> frozenset[int]:
    """Ranks of the processes whose parts make up ``p``, each of its elements once, the first process among them.

    Of several copies, each of which is sharded by itself, these are the processes that share the first one's. Empty if
    ``p`` is no distributed tensor, its parts do not simply make up the whole, or it cannot be told.
    """
    with suppress(Exception):  # asked by `attach`, outside every guard, of tensors of any library
        return _sharers(p)
    return frozenset()


def _sharers(p: Tensor) -> frozenset[int]:
    placements, mesh = getattr(p, "placements", None), getattr(p, "device_mesh", None)
    if not placements or mesh is None or not dist.is_available() or not dist.is_initialized():
        return frozenset()
    ranks = mesh.mesh.numpy()
    first = np.argwhere(ranks == 0)
    if len(first) != 1:
        return frozenset()
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            ranks = ranks.take([first[0, dim]], axis=dim)
        elif not (placement.is_shard() or type(placement).__name__ == "_StridedShard"):
            return frozenset()
    return frozenset(map(int, ranks.flat))


def is_parted(p: Tensor) -> bool:
    """True if this process has a part of ``p`` that no other of its `sharers` has."""
    ranks = sharers(p)
    return len(ranks) > 1 and rank() in ranks


def ranks_with_parts(models: Iterable[nn.Module]) -> tuple[int, ...]:
    """Ranks of the processes that have parts of parameters of ``models``, beside the first; in order."""
    return tuple(sorted({r for m in models for p in m.parameters() for r in sharers(p)} - {0}))


def next_recording(models: Sequence[nn.Module]) -> str:
    """Name of the recording of ``models`` that begins.

    The same in every process that has parts of them, whatever else each records: made of the names and shapes of their
    parameters as a whole, and of how many recordings of just these have begun before.
    """
    parameters = [(clean(name), *p.shape) for m in models for name, p in unwrap(m).named_parameters()]
    kind = hashlib.sha256(json.dumps(parameters).encode()).hexdigest()[:16]
    _recordings[kind] += 1
    return f"monitor/{kind}/{_recordings[kind]}"


def tell(recording: str, place: Place) -> None:
    """Tell the other processes where this recording goes."""
    store = common_store()
    if store is not None:
        with suppress(RuntimeError):  # the process that keeps the store is gone
            store.set(recording, json.dumps(asdict(place)))


def hear(recording: str) -> Place:
    """Where this recording goes; waits up to `PATIENCE` seconds to be told, and says so after `SILENCE`."""
    store = common_store()
    if store is None:
        return Place()
    try:
        try:
            store.wait([recording], timedelta(seconds=SILENCE))
        except RuntimeError:
            to_stderr(
                f"process {rank()} waits {PATIENCE:g} s for the first process to begin this recording; "
                "otherwise it records nothing"
            )
            store.wait([recording], timedelta(seconds=PATIENCE - SILENCE))
        place = Place(**json.loads(store.get(recording)))
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
        self._segments = 0
        self._stopped = False

    def layout(self, layout: Layout) -> None:
        """From now on rows have this layout."""
        self._tail.layout(layout)

    def row(self, step: int, layout_number: int, payload: bytes) -> None:
        """Write a row."""
        if not self._stopped:
            self._tail.row(step, layout_number, payload)

    def take(self, block: RawBlock) -> None:
        """Begin a new segment: the first process removes those that are complete."""
        self._tail.rotate(int(block.steps[-1]) + 1)
        self._segments += 1
        if self._segments % MOST == 0 and len(names(self.path, TAIL, rank())) >= MOST:
            self._stopped = True

    def facts(self, facts: dict[str, Any]) -> None:
        """Are those of the first process."""

    def warn(self, text: str) -> None:
        """Is said by the process itself, which writes no more: what it leaves out would be taken for no part at all."""
        self._stopped = True

    def table(self, name: str, step: int, vectors: Vectors) -> None:
        """Tables are the first one's."""

    def close(self, status: str, error: str | None) -> bool:
        """Write no more rows."""
        self._tail.close()
        return True


def rank() -> int:
    """Of this process, as torch or else launchers say it; 0 if there are no others."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdigit() else 0
