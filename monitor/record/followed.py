"""What a recording follows: root modules, the names of their parameters, and the optimizers that train them."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from monitor.record.facts import compiled_regions, model_facts, parameter_names, unwrap
from monitor.record.private import quiet

#: Updates of another optimizer until one that is there but has not stepped is no longer waited for.
PATIENCE = 100
#: Parameters that are often trained through a copy of more bits, and numbers of it that are looked at.
NARROW, SEEN = (torch.bfloat16, torch.float16), 1024
#: Layers that compute otherwise in evaluation when a mode is on the stack.
FAST = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


class Followed:
    """Root modules and optimizers of one recording.

    Args:
        only: follow these optimizers alone; default: every one that trains a parameter of the roots.
        stranger: told of a model that a followed optimizer trains and that is no root yet; None: those are left alone.
    """

    def __init__(self, only: Sequence[Optimizer], stranger: Callable[[nn.Module], None] | None) -> None:
        #: Root modules, unwrapped.
        self.roots: list[nn.Module] = []
        self._only = {id(o) for o in only}
        self._stranger = stranger
        self._names: dict[int, str] = {}
        self._named_at = -1
        self._copies: dict[int, weakref.ref[Tensor]] = {}  # of parameters, by the id of what they are copies of
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._updates: dict[int, int] = {}
        self._mine: dict[int, bool] = {}
        self._signature: tuple[int, ...] = ()
        self._awaited: list[weakref.ref[Optimizer]] = []

    def add(self, model: nn.Module) -> nn.Module:
        """Follow ``model`` too; a root inside it is no root any more.

        Returns:
            The root itself, without wrappers.
        """
        root = unwrap(model)
        if all(root is not r for r in self.roots):
            inner = set(map(id, root.modules()))
            self.roots = [r for r in self.roots if id(r) not in inner] + [root]
            self._names = parameter_names(self.roots)
        return root

    def parameter(self, p: Tensor, step: int) -> str:
        """Name of a parameter; one that belongs to no root is named by its place in an optimizer."""
        name = self._names.get(id(p))
        if name is None:
            self._look_up_names(step)  # the user may have given the model a new head
            name = self._names.setdefault(id(p), f"parameter[{len(self._names)}]")
        return name

    def _look_up_names(self, step: int) -> None:
        """Read the roots' parameter names again, once a step at most; ids of dead parameters are forgotten."""
        if self._named_at == step:
            return
        self._named_at = step
        strangers = {key: name for key, name in self._names.items() if name.startswith("parameter[")}
        self._names = strangers | parameter_names(self.roots)
        for key, known in self._copies.items():
            if (copy := known()) is not None and key in self._names:
                self._names[id(copy)] = self._names[key]

    def _look_up_copies(self, optimizer: Optimizer) -> None:
        """Find what the tensors of an optimizer that are no parameters of the roots are 32-bit copies of."""
        groups = [[p for p in g["params"] if id(p) not in self._names] for g in optimizer.param_groups]
        own = {id(p) for g in optimizer.param_groups for p in g["params"]}
        narrow = [p for root in self.roots for p in root.parameters() if p.requires_grad and p.dtype in NARROW]
        with quiet():
            found = copies([p for p in narrow if id(p) not in own], groups)
        for p, copy in found:
            self._copies[id(p)] = weakref.ref(copy)
            self._named_at = -1

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that have made an update and are alive."""
        return [o for known in self._optimizers if (o := known()) is not None]

    def label(self, optimizer: Optimizer) -> str:
        """Name of an optimizer: empty for the first that stepped, so that a second one does not rename it."""
        known = [id(o()) for o in self._optimizers]
        return "" if len(known) < 2 or known[0] == id(optimizer) else f"optimizer[{known.index(id(optimizer))}]"

    def updates(self, optimizer: Optimizer) -> int:
        """Updates of this optimizer since it was first seen, including one under way."""
        return self._updates.get(id(optimizer), 0)

    def is_gradient(self, t: Tensor) -> bool:
        """True if ``t`` is the gradient of a parameter of the roots."""
        copies = (copy for known in self._copies.values() if (copy := known()) is not None)
        return any(p.grad is t for root in self.roots for p in root.parameters()) or any(c.grad is t for c in copies)

    def follows(self, optimizer: Optimizer, step: int) -> bool:
        """True if the steps of this optimizer are steps of this recording."""
        known = self._mine.get(id(optimizer))
        if known is None:
            params = [p for g in optimizer.param_groups for p in g["params"]]
            if not all(id(p) in self._names for p in params):
                self._look_up_copies(optimizer)
                self._look_up_names(step)
            trained = [id(p) in self._names for p in params]
            known = id(optimizer) in self._only if self._only else any(trained)
            if not self._only and self._stranger is not None and not all(trained):
                for model in find_models(optimizer):
                    self._stranger(model)
                known = True
            self._mine[id(optimizer)] = known
            # the id of a dead optimizer may be given to another
            weakref.finalize(optimizer, self._mine.pop, id(optimizer), None)
        return known

    def living(self, ids: frozenset[int]) -> frozenset[int]:
        """Those of ``ids`` whose optimizers are still there: one made anew for every step is not waited for."""
        return frozenset(i for i in ids if i in self._mine)

    @property
    def stepped(self) -> bool:
        """True once an optimizer has made a step."""
        return bool(self._optimizers)

    def count(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Note that ``optimizer`` has made an update.

        Returns:
            The facts of the run if they have changed.
        """
        known = [o() for o in self._optimizers]
        fresh = optimizer not in known
        if fresh:
            self._updates[id(optimizer)] = 0
            # one that takes the place of a dead one goes on with its series
            at = known.index(None) if None in known else len(known)
            self._optimizers[at : at + 1] = [weakref.ref(optimizer)]
        self._updates[id(optimizer)] += 1
        if self._updates[id(optimizer)] > PATIENCE:
            self._awaited.clear()
        awaited = [o for ref in self._awaited if (o := ref()) is not None and id(o) not in self._updates]
        signature = (len(awaited), *(len(g["params"]) for x in known if x is not None for g in x.param_groups))
        if not fresh and signature == self._signature:
            return None
        self._signature = signature
        held = {key: copy for key, known in self._copies.items() if (copy := known()) is not None}
        return model_facts(self.roots, self.optimizers, awaited, held)

    def alive(self, step: int) -> Iterable[int]:
        """Ids of the optimizers there are for the roots: taken to make a step together, until they do not."""
        there = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
        # a wrapper round another optimizer does not step by itself
        there = [o for o in there if not isinstance(getattr(o, "optimizer", None), Optimizer) and self.follows(o, step)]
        self._awaited = [weakref.ref(o) for o in there]
        return [id(o) for o in there]

    @property
    def device(self) -> torch.device:
        """Where the first parameter that is anywhere is."""
        for root in self.roots:
            if (found := _device(root)) is not None:
                return found
        return torch.device("cpu")

    @property
    def sharded(self) -> bool:
        """True if this process holds only a part of some parameter."""
        parts = ((p, getattr(p, "_local_tensor", p)) for root in self.roots for p in root.parameters())
        return any(part.shape != p.shape for p, part in parts)

    def orphaned(self) -> bool:
        """True if the optimizers are gone and nobody else holds a module of the roots: they cannot train any more."""
        if not self._optimizers or any(o() is not None for o in self._optimizers):
            return False
        modules = [m for root in self.roots for m in root.modules()]
        # a module that is left has one reference more than a fresh object here: its parent's, or ours to the root
        return set(_references(modules)) == {_references([object()])[0] + 1}


def copies(narrow: Sequence[Tensor], groups: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a 16-bit parameter and what an optimizer trains in its place: the same numbers in float32.

    Args:
        narrow: parameters of 16 bits, in order.
        groups: what the optimizer was given, before it has changed it.

    Returns:
        Pairs of one shape whose first numbers are equal. Of several that are equal to each other, as biases that begin
        at zero, the order decides, where it is known to be that of ``narrow``: the other pairs of each group have it.
        Waits for the device.
    """
    others = [(x, g) for g, group in enumerate(groups) for x in group if x.dtype == torch.float32 and not _odd(x)]
    shapes = {(x.shape, x.device) for x, _ in others}
    equal: dict[object, tuple[list[int], list[tuple[Tensor, int]]]] = {}
    for i, p in enumerate(narrow):
        if (p.shape, p.device) in shapes and not _odd(p):
            equal.setdefault(_sample(p, p.dtype), ([], []))[0].append(i)
    for x, g in others:
        for dtype in NARROW:
            if (held := equal.get(_sample(x, dtype))) is not None:
                held[1].append((x, g))
                break
    found = [(at[0], *copy[0]) for at, copy in equal.values() if len(at) == len(copy) == 1]
    where = {id(x): n for n, (x, _) in enumerate(others)}
    found.sort(key=lambda pair: where[id(pair[1])])
    if len(found) > 1 and all(i < j or g != h for (i, _, g), (j, _, h) in pairwise(found)):
        for at, copy in equal.values():
            if len(at) == len(copy) > 1 and len({g for _, g in copy}) == 1:
                found += [(i, *c) for i, c in zip(at, copy, strict=True)]
    return [(narrow[i], x) for i, x, _ in found]


def _odd(t: Tensor) -> bool:
    """True if ``t`` is no plain tensor, as one of several processes, or there is nothing in it to compare."""
    return type(t) not in (Tensor, nn.Parameter) or t.device.type == "meta"


def _sample(t: Tensor, dtype: torch.dtype) -> object:
    """The first numbers of ``t`` in 16 bits, and what else must be the same of a copy."""
    first = t.detach().reshape(-1)[:SEEN].to(dtype).view(torch.int16)
    return t.shape, t.device, dtype, first.cpu().numpy().tobytes()


def _device(module: nn.Module) -> torch.device | None:
    """As `Followed.device`, of one module: asked at every step, and the first of `parameters` takes longer."""
    for p in module._parameters.values():
        if p is not None and not p.is_meta:
            return p.device
    for child in module._modules.values():
        if child is not None and (found := _device(child)) is not None:
            return found
    return None


def _references(held: Sequence[object]) -> list[int]:
    return [sys.getrefcount(x) for x in held]


def children_called(module: nn.Module, prefix: str = "") -> Iterable[tuple[str, nn.Module]]:
    """Children of ``module`` that have a forward of their own, with their names; containers are looked into."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return  # it drops its fast path also when one of its children has hooks
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from children_called(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def find_models(optimizer: Optimizer) -> list[nn.Module]:
    """The smallest modules alive that hold this optimizer's parameters, largest share first.

    Args:
        optimizer: any optimizer.

    Returns:
        Usually one module; several if no single module holds all parameters; empty if they belong to none.
    """
    wanted = {id(p) for g in optimizer.param_groups for p in g["params"]}
    # most of what is alive is no module, and isinstance runs code of lazy proxies: look at the type alone
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    held = [(m, {id(p) for p in m.parameters()}) for m in modules if not hasattr(m, "_orig_mod")]
    found: list[nn.Module] = []
    while wanted:
        # of modules that hold the same parameters, the outermost: its names say most
        best = max(held, key=lambda x: (len(x[1] & wanted), -len(x[1]), sum(1 for _ in x[0].modules())), default=None)
        if best is None or not best[1] & wanted:
            break
        found.append(best[0])
        wanted -= best[1]
    return found


def find_whole(part: nn.Module) -> nn.Module:
    """The outermost module alive that ``part`` is a part of: itself if of none."""
    whole, most = part, 0
    for m in gc.get_objects():
        if issubclass(type(m), nn.Module):
            with suppress(Exception):  # one that is half made
                parts = list(m.modules())
                if len(parts) > most and any(x is part for x in parts):
                    whole, most = m, len(parts)
    return whole


def find_bystanders(roots: Sequence[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """The outermost modules alive beside ``roots`` that a mode on the stack would disturb: a teacher, a critic.

    Args:
        roots: root modules that are followed.

    Returns:
        Modules that hold a layer with a fast path, or one that is compiled, and whether they do the latter. None that a
        root is a part of.
    """
    mine = {id(m) for root in roots for m in root.modules()}
    inner: set[int] = set()
    outer: list[tuple[nn.Module, bool]] = []
    for m in gc.get_objects():
        if not issubclass(type(m), nn.Module) or id(m) in mine:
            continue
        with suppress(Exception):  # one that is half made, or has a way of its own of telling its parts
            parts = list(m.modules())
            if any(id(x) in mine for x in parts):
                continue
            inner.update(id(child) for child in m.children())
            # a layer with a fast path of its own drops it for a hook as well
            compiled = bool(compiled_regions(m))
            if not isinstance(m, FAST[1:]) and (compiled or any(isinstance(x, FAST) for x in parts)):
                outer.append((m, compiled))
    return [(m, compiled) for m, compiled in outer if id(m) not in inner]
