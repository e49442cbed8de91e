"""Looking at calls of modules inside a root's forward: hooks that are there for that one forward and no longer."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from monitor.record.facts import clean, compiled_regions, unwrap
from monitor.record.private import transformed
from monitor.record.site import REPLICAS, Site

#: Steps between two looks, and some looks more, since the first steps change most.
EVERY, EARLY = 50, (3, 10, 25)
#: Modules looked at in one forward, unless a site says otherwise.
MOST = 256


class ForwardSite(Site, ABC):
    """Base of sites that look into a root's forward with hooks on modules.

    On few steps, and then in the first forward of each root only, hooks are set when the forward begins and are gone
    when it ends, so that the recomputation of activation checkpointing is not read twice and no evaluation runs with a
    hook. A model with a compiled region gets none. What was read is handed to `record` when the forward is trained on.
    """

    metric = ""
    #: Steps between two looks, and those at which it looks besides.
    every, early = EVERY, EARLY
    #: Modules with hooks in one forward.
    most = MOST

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder)
        self._hooks: list[RemovableHandle] = []
        self._armed = False  # a forward runs into which it looks
        self._looked: dict[int, tuple[int, int]] = {}
        self._open: set[int] = set()
        self._thread = 0
        self._compiled = self._any = False
        self._left_out = 0

    # ---- what a site says

    @abstractmethod
    def choose(self, root: nn.Module, prefix: str) -> Iterable[tuple[nn.Module, str]]:
        """Modules of ``root`` to look at, with their names."""

    @abstractmethod
    def hook(self, module: nn.Module, name: str) -> Iterable[RemovableHandle]:
        """Set the hooks of one module."""

    def forward_ends(self) -> None:
        """The forward in which something was read is over."""

    @abstractmethod
    def record(self) -> None:
        """Emit what was read since the last call; it is being trained on."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what was read: it was never trained on."""

    # ---- when it looks

    def listens(self, step: int) -> bool:
        """True if it is time."""
        return (step % self.every == 0 or step in self.early) and self.due(1, step)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the hooks."""
        self._disarm()
        if self._looked.get(id(module)) == (self.rec.step, self.rec.epoch):
            return
        self._open.add(id(module))
        root = unwrap(module)
        if _compiled(module):
            self._compiled = True
            return
        self._thread = threading.get_ident()
        # the root's own hooks must stay as they are while it runs;
        # in eval() such a layer leaves its fast path when it or a child has a hook, and its numbers change
        fast = [m for m in root.modules() if isinstance(m, nn.TransformerEncoderLayer) and not m.training]
        never = {id(m) for layer in fast for m in layer.modules()}
        chosen = [(m, name) for m, name in self.choose(root, self.rec.prefix(module)) if id(m) not in never]
        self._any |= bool(chosen)
        self._left_out = max(self._left_out, len(chosen) - self.most)
        for m, name in chosen[: self.most]:
            self._hooks += self.hook(m, name)
        self._armed = True

    def on_output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take the hooks away."""
        if self._armed:
            self._disarm()
            self.forward_ends()

    def on_backward(self) -> None:
        """Keep what was read: it is being trained on."""
        self._disarm()
        for key in self._open:  # one forward that is trained on is enough
            self._looked[key] = (self.rec.step, self.rec.epoch)
        self._open.clear()
        self.record()

    def on_step(self, optimizer: Any) -> None:
        """Nothing is looked at across an update."""
        self._disarm()

    def on_row(self) -> None:
        """Forget what was never trained on."""
        self._open.clear()
        self.forget()

    def missing(self) -> Sequence[tuple[str, str]]:
        """What compiled regions and replicas hide, and modules beyond `most`. A model without any lacks nothing."""
        why = "a compiled region is in the model: a hook inside it would recompile it"
        found = [(self.metric, why)] if self._compiled else []
        if self._any and self.rec.replicated:
            found.append((self.metric, REPLICAS))
        if self._left_out > 0:
            found.append((self.metric, f"of so many modules the first {self.most}; {self._left_out} others are not"))
        return found

    def _disarm(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._armed = False


class ModuleSite(ForwardSite):
    """Base of sites that read what modules inside a root are first called with and what they return."""

    @abstractmethod
    def read(self, module: nn.Module, name: str, inputs: Tensor, output: Tensor) -> None:
        """One call: its first floating tensor and what came of it."""

    def hook(self, module: nn.Module, name: str) -> Iterable[RemovableHandle]:
        """A hook that is gone after the first call."""
        look = _Look(self, name)
        # first: where the call of `module` itself has been told of, the end of that call is what takes it away again
        look.handle = module.register_forward_hook(look, with_kwargs=True, prepend=True)
        return (look.handle,)

    def _called(self, module: nn.Module, name: str, given: tuple[Any, ...], result: Any) -> None:
        x, y = local_tensor(given), local_tensor(result if isinstance(result, tuple | list) else (result,))
        if x is not None and y is not None:
            self.read(module, name, x, y)


class _Look:
    """A hook for one call of one module."""

    handle: RemovableHandle

    def __init__(self, site: ModuleSite, name: str) -> None:
        self._site, self._name = site, name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        site = self._site
        if torch.compiler.is_compiling() or transformed():
            return
        if threading.get_ident() != site._thread or not site.rec.inside_forward:
            return
        self.handle.remove()
        site.rec.tell(site, site._called, module, self._name, (*args, *kwargs.values()), output)


def named(root: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """Every module of ``root`` with its name, without what wrappers add."""
    return [((prefix + clean(name)).removesuffix("."), m) for name, m in root.named_modules()]


def _compiled(module: nn.Module) -> bool:
    """True if a call of ``module`` enters a compiled region, also one made by compiling a ``forward``."""
    return bool(compiled_regions(module)) or any(
        hasattr(m.forward, "_torchdynamo_orig_callable") for m in module.modules()
    )


def local_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first floating tensor among ``values``, this rank's part of a distributed one; not detached."""
    for v in values:
        if isinstance(v, Tensor):
            v = v if type(v) is Tensor else getattr(v, "_local_tensor", v)
            if type(v) in (Tensor, nn.Parameter) and v.is_floating_point() and v.layout is torch.strided and v.numel():
                return v
    return None


def alike(kinds: Mapping[str, Hashable]) -> Iterable[list[str]]:
    """The names of each kind, in order."""
    found: dict[Hashable, list[str]] = {}
    for name, kind in kinds.items():
        found.setdefault(kind, []).append(name)
    return found.values()


def emit_rows(
    rec: Any, reads: str, stats: Sequence[str], rows: Mapping[str, np.ndarray | Tensor], at: slice = slice(None)
) -> None:
    """Write the statistics ``at`` of several modules, one row each, all arrays or all tensors."""
    tensors = [v.to(rec.device) for v in rows.values() if isinstance(v, Tensor)]
    arrays = [v for v in rows.values() if isinstance(v, np.ndarray)]
    if rows:
        rec.emit_many(reads, stats, list(rows), torch.stack(tensors) if tensors else np.stack(arrays), at)
