"""Single examples: which ones have labels that contradict what is learned from the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monitor.record.mode import Watcher
from monitor.record.passes.example import STATS, VISITS, Book, margins
from monitor.record.site import Site
from monitor.remedies.fingerprints import fingerprints

#: Steps between two looks at the rows of a batch, on a CPU and on an accelerator; with ids that the user notes it is
#: every step.
EVERY, EVERY_DEVICE = 5, 20
#: Steps between two records of what they come to.
RECORDED = 100
#: Classes above which labels are tokens rather than classes.
CLASSES = 1000
#: Examples after which some must have come twice.
_DISTINCT, _AGAIN = 50_000, 0.01
#: Visits after which labels that change from one to the next are no labels; and the share that is let pass.
_JUDGED, _CHANGED = 200, 0.05
#: Growth of the mean number of visits from one table to the next.
_NEXT = 1.25
_IGNORE = -100


class ExampleSite(Site):
    """Keeps a book of the margins of every example that comes with one class, by what it looks like or by its id."""

    name = "example"

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._book = Book()
        self._ids: list[Hashable] | None = None  # of the coming batch
        self._noted = False
        self._names: Tensor | list[Hashable] | None = None  # of the batch in the forward
        self._pending: tuple[Tensor | list[Hashable], Tensor, Tensor] | None = None
        self._arriving: deque[tuple[torch.Event, Tensor | list[Hashable], Tensor, Tensor]] = deque()
        self._written = VISITS / _NEXT
        self._why = ""

    def listens(self, step: int) -> bool:
        """True if it is time."""
        every = EVERY if self.rec.on_cpu else EVERY_DEVICE
        return not self._why and (self._noted or self.due(every, step, first=0))

    def noted(self, note: object) -> None:
        """The user has noted something of the coming batch: its ids, if it is a row of numbers or of words."""
        if isinstance(note, Tensor | np.ndarray):
            note = note.tolist()
        if isinstance(note, list | tuple) and note and all(isinstance(x, int | str) for x in note):
            self._ids = list(note)
            if not self._noted:
                self._noted = True
                self._book = Book()  # under other names
                self.rec.listen_anew()

    def after(self) -> dict[Any, Watcher]:
        """Watch the two functions that every classification loss of torch ends in."""
        return dict.fromkeys((F.cross_entropy, F.nll_loss), self._classified)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Name the examples that the model is called with."""
        self._names, self._ids = self._ids, None
        if self._noted:
            return
        for x in (*args, *kwargs.values()):
            if type(x) is Tensor and x.dim() > 1 and x.numel() and x.layout == torch.strided and not x.is_complex():
                self._names = fingerprints(x)
                return

    def _classified(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        names, self._names = self._names, None
        z = args[0] if args else kwargs.get("input")
        y = args[1] if len(args) > 1 else kwargs.get("target")
        if names is None or not (isinstance(z, Tensor) and isinstance(y, Tensor) and isinstance(result, Tensor)):
            return
        if not (self.rec.training and result.requires_grad and z.dim() == 2 and y.dim() == 1 and len(y) == len(names)):
            return
        if y.is_floating_point() or not 2 <= z.shape[1] <= CLASSES:
            return
        ignore = int(kwargs.get("ignore_index", args[4] if len(args) > 4 else _IGNORE))
        self._pending = names, y, margins(z.detach(), y.long(), ignore)

    def on_backward(self) -> None:
        """What was seen since the last backward is being trained on."""
        if self._pending is None:
            return
        names, y, found = self._pending
        self._pending = None
        if found.is_cpu:
            self._enter(names, y, found)
            return
        here = [names if isinstance(names, list) else _sent(names), _sent(y), _sent(found)]
        event = torch.Event(found.device)
        event.record()
        self._arriving.append((event, *here))  # pyright: ignore[reportArgumentType]

    def on_row(self) -> None:
        """Take what has arrived from an accelerator, and record what it comes to now and then."""
        self._names = self._pending = None
        while self._arriving and self._arriving[0][0].query():
            self._enter(*self._arriving.popleft()[1:])
        if self._why or not len(self._book) or not self.due(RECORDED, first=0):
            return
        self._judge()
        values = self._book.statistics()
        if self._why or values is None:
            return
        self.rec.emit("example", STATS, "", values)
        if values[1] >= _NEXT * self._written:
            self._written = values[1]
            self.rec.flusher.table("examples", self.rec.step, self._book.table())

    def _enter(self, names: Tensor | list[Hashable], y: Tensor, found: Tensor) -> None:
        self._book.enter(names.tolist() if isinstance(names, Tensor) else names, y.numpy(), found.numpy())

    def _judge(self) -> None:
        """Give up where examples cannot be told apart, or have no label of their own."""
        book = self._book
        if not self._noted and len(book) >= _DISTINCT and book.visits < (1 + _AGAIN) * len(book):
            self._why = "no input comes twice, as under augmentation: handle.note(ids) tells examples apart"
        elif book.visits >= _JUDGED and book.changed > _CHANGED * book.visits:
            self._why = "the label of an example changes from one visit to the next"
        if self._why:
            self._book = Book()
            self.rec.listen_anew()

    def missing(self) -> Sequence[tuple[str, str]]:
        """Margins, where examples could not be followed. A training without classes lacks nothing."""
        return (("example_margin", self._why),) if self._why else ()


def _sent(x: Tensor) -> Tensor:
    """``x`` on the host, once an event that is recorded now has passed."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
