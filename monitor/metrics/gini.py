"""How sparse an embedding is in a basis: 0 if all directions carry the same, 1 − 1/n if one carries everything.

    gini = Σ_i (2i − n − 1) x_(i) / (n Σ x),   x_(1) ≤ … ≤ x_(n)

x are the norms of the embedding's projections on the Fourier basis of its rows (for cyclic tasks), or its singular
values. Measured by the probe `monitor.probes.EmbeddingGini`.

Healthy: rises smoothly as structure forms, in modular addition long before the held-out accuracy does.

Unhealthy: flat while the training accuracy is 1 and the norms of the parameters rise: pure memorisation. A rise alone
promises nothing: in addition modulo 41 it went from .06 to .21 where the network came to generalise, and from .04 to
.06, as steadily, where it had too few pairs and never did.

Source: Gini (1912); Nanda et al. (2023), arXiv 2301.05217, sec. 5.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan

from monitor.metric import Block, Case, Column, Metric, Plot, Result
from monitor.metrics._columns import recorded


def compute(block: Block) -> Mapping[str, Result]:
    """As the probe measured it."""
    return {"gini": recorded(block, "gini")}


def oracle() -> Iterable[Case]:
    """One table; not measured; NaN."""
    values = [[0.25], [None], [nan]]
    yield Case({"gini": values}, {"gini": values}, "recorded values pass unchanged", modules=("embed.weight",))


METRIC = Metric(
    id="gini",
    title="Gini coefficient of embeddings",
    site="parameter",
    columns=(Column("gini", "fraction", "of the norms in the Fourier basis, or of the singular values"),),
    compute=compute,
    source="Gini 1912; arXiv 2301.05217 sec. 5.1",
    cost="on request: one product of the table with a square matrix, or its singular values",
    plot=Plot("gini"),
    oracle=oracle,
    reads="embedding_gini",
    doc=__doc__ or "",
)
