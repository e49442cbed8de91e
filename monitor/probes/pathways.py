"""The pathways of the first batch of the run through the experts of the model, measured again and again.

The model runs on that batch as in evaluation: no dropout, no noise of the routers, random state and modes put back. The
probabilities of each router are read from its module while it does; nothing is differentiated.

What comes of it (pathway_distance, pathway_consistency, pathway_churn, routing_dimension) describes routing. None of it
shows generalisation by itself: on labels that cannot be learned the same numbers move the same way, driven by the terms
that regularise the routers, so read them beside router_balance (z, normalised).

Source: Li et al. (2025), Where to find Grokking in LLM Pretraining, arXiv 2506.21551.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from monitor.errors import UsageError
from monitor.record.experts import Router
from monitor.record.passes import pathway
from monitor.record.probe import Moment, Probe, Sparsely
from monitor.record.sites.router import RouterSite

if TYPE_CHECKING:
    from monitor.record.recorder import Recorder

#: Samples of the batch that are followed, evenly spaced, and tokens whose experts are compared with the last time's.
SAMPLES, TOKENS = 256, 1 << 14


@dataclass
class _Layer:
    """One router in one forward."""

    router: Router
    g: np.ndarray  # (sample, expert) float64, mean over tokens
    chosen: Tensor  # (token, expert) bool, on the model's device


class Pathways(Probe):
    """Measures ``pathway_distance``, ``pathway_consistency``, ``pathway_churn`` and ``routing_dimension``.

    Args:
        every: measure at each so many steps. Default: as often as half a per cent of the run's time allows.

    One of the default probes: models without routers are left alone. Of a router that is called several times in one
    forward only the first call counts. Tokens are means over whatever the batch holds, padding included.
    """

    name = "pathway_distance"
    share = 0.005  # nobody has asked for it
    keeps_first = True
    default = True

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self.begin()

    def begin(self) -> None:
        """Forget the run before."""
        self._site: RouterSite | None = None
        self._before: dict[str, tuple[int, Tensor]] = {}
        self._sparsely = Sparsely()
        self._lr = self._top_lr = 0.0

    def wanted(self, recorder: Recorder) -> str | None:
        """A model without routers has no pathways."""
        sites = [s for s in recorder.sites if isinstance(s, RouterSite)]
        self._site = sites[0] if sites else None
        return None if self._site is not None and self._site.routers else "no router of experts was seen"

    def measure(self, moment: Moment) -> None:
        """One forward of the first batch."""
        self._lr = float(moment.optimizer.param_groups[0].get("lr", 0))
        self._top_lr = max(self._top_lr, self._lr)
        layers = self._layers(moment)
        if not layers:
            raise UsageError("none of the routers could be read in evaluation")
        g = [x.g for x in layers]
        moment.emit("pathway_distance", pathway.DISTANCE, "", pathway.distances(g, [x.router.k for x in layers]))
        weights = [x.router.weight for x in layers]
        known = [w.cpu().double().numpy() for w in weights if w is not None]
        if len(known) == len(layers) > 1 and len({w.shape[1] for w in known}) == 1:
            moment.emit("pathway_consistency", pathway.CONSISTENCY, "", pathway.consistency(g, known))
        for x in layers:
            values = [pathway.dimension(x.g), len(x.g), x.router.experts]
            moment.emit("routing_dimension", pathway.DIMENSION, x.router.name, values)
            self._churn(moment, x)
        self._table(moment, layers)

    def _layers(self, moment: Moment) -> list[_Layer]:
        if moment.first is None or self._site is None:
            return []
        found: list[_Layer] = []
        with ExitStack() as stack:
            stack.enter_context(moment.evaluation())
            for router in self._site.routers.values():
                stack.enter_context(_reading(router, moment, moment.samples, found))
            moment.first.replay()
        return found

    def _churn(self, moment: Moment, x: _Layer) -> None:
        step, before = self._before.get(x.router.name, (-1, x.chosen))
        if step >= 0 and before.shape == x.chosen.shape and before.device == x.chosen.device:
            changed, assigned = float((before & ~x.chosen).sum()), float(before.sum())
            values = [changed, assigned, moment.step - step, self._lr / self._top_lr if self._top_lr else float("nan")]
            moment.emit("pathway_churn", pathway.CHURN, x.router.name, values)
        self._before[x.router.name] = moment.step, x.chosen

    def _table(self, moment: Moment, layers: list[_Layer]) -> None:
        if not self._sparsely.due(moment.step):
            return
        paths = pathway.written([pathway.experts_of(x.g, pathway.THRESHOLD) for x in layers])
        moment.table("pathways", {"sample": np.arange(len(paths), dtype=np.int32), "pathway": paths})


@contextmanager
def _reading(router: Router, moment: Moment, samples: int, found: list[_Layer]) -> Iterator[None]:
    """Read the router's probabilities in its first call in here."""
    lineage = router.lineage(moment.models)
    if not lineage:
        yield
        return

    def read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if all(x.router is not router for x in found):
            z = _scores(router, module, args, output)
            if z is not None:
                found.append(_layer(router, z, samples))

    handle = lineage[0].register_forward_hook(read)
    try:
        yield
    finally:
        handle.remove()


def _scores(router: Router, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
    """``(…, expert)`` scores: among what the module returns, or from what it is given."""
    for x in tree_leaves(output):
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and x.shape[-1] == router.experts:
            # probabilities are told from scores by their sum; their logarithms are scores as good
            p = x.detach().float()
            one = bool((p >= 0).all()) and bool(((p.sum(-1) - 1).abs() < 1e-3).all())
            return p.log() if one else p
    weight = router.weight
    if weight is None or not args or not isinstance(args[0], Tensor) or args[0].shape[-1] != weight.shape[1]:
        return None
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor) and bias.shape == (router.experts,):
        return F.linear(args[0].detach().float(), weight.float(), bias.detach().float())
    return F.linear(args[0].detach().float(), weight.float())


def _layer(router: Router, z: Tensor, samples: int) -> _Layer:
    p = z.softmax(-1)
    if p.dim() > 2 and p.shape[0] != samples and p.shape[1] == samples:
        p = p.transpose(0, 1)  # (position, sample, …)
    tokens = p.reshape(-1, router.experts)
    if len(tokens) % samples:
        raise UsageError(f"{len(tokens)} tokens of {router.name} do not belong to {samples} samples alike")
    g = tokens.view(samples, -1, router.experts).mean(1)[:: -(-samples // SAMPLES)]
    some = tokens[:: -(-len(tokens) // TOKENS)]
    chosen = torch.zeros_like(some, dtype=torch.bool).scatter_(1, some.topk(router.k).indices, True)
    return _Layer(router, g.cpu().double().numpy(), chosen)
