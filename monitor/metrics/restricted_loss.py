"""Loss of what a modular-addition network has on its key frequencies, and of all the rest.

    restricted = CE of Σ_{w key} C_w z + mean over pairs of the rest, on held-out pairs
    excluded = CE of z − Σ_{w key} C_w z on training pairs;   excluded_one = max over key w of CE of z − C_w z

C_w projects the logits z of all p² pairs (a, b) on cos(2πw(a+b)/p) and sin(2πw(a+b)/p); w is key if C_w z holds more
than 2 % of the energy of z. Float64 throughout. Measured by the probe `monitor.probes.FourierLosses`; the shares of all
frequencies are in the table ``fourier``.

Healthy: memorisation (excluded = train), then the circuit forms (restricted falls, excluded rises, test still bad),
then the rest is cleaned up (test falls).

Unhealthy: restricted stays at the loss of guessing while train is near 0: pure memorisation. A step in ``restricted``
together with one in ``keys`` is a frequency passing 2 %, not the network.

Source: Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability, arXiv 2301.05217,
sec. 5.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded

_COLUMNS = (
    Column("restricted", "nats", "held-out loss of the key frequencies alone"),
    Column("excluded", "nats", "training loss without the key frequencies"),
    Column("excluded_one", "nats", "training loss without one key frequency, the largest"),
    Column("train", "nats", "training loss"),
    Column("test", "nats", "held-out loss"),
    Column("keys", "count", "key frequencies"),
    Column("key_share", "fraction", "energy of the logits on the key frequencies"),
)


def compute(block: Block) -> Mapping[str, Result]:
    """As the probe measured them."""
    return {c.name: recorded(block, c.name) for c in _COLUMNS}


def oracle() -> Iterable[Case]:
    """One split; not measured; NaN."""
    stats = {c.name: [[float(i)], [None], [nan]] for i, c in enumerate(_COLUMNS)}
    yield Case(stats, stats, "recorded values pass unchanged")


METRIC = Metric(
    id="restricted_loss",
    title="Restricted and excluded loss",
    site="logits",
    columns=_COLUMNS,
    compute=compute,
    source="arXiv 2301.05217 sec. 5.1",
    cost="on request: one forward of all p² pairs and p³ operations",
    plot=Plot("restricted", log=True),
    oracle=oracle,
    reads="fourier",
    doc=__doc__ or "",
)
