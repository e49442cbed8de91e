"""How sparse an embedding is in a basis in which it may become so: the Fourier basis of a cyclic task, or its own.

Gini(x) = sum_i (2i - n - 1) x_(i) / (n sum x), |x| ascending: 0 if all coefficients are equal, 1 - 1/n if all but one
are 0. The coefficients are the norms of the projections of the table on the Fourier basis of its rows (constant, cos
and sin of every frequency), or its singular values.

Source: Gini (1912); for embeddings of modular addition, Nanda et al. (2023), arXiv 2301.05217, sec. 5.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from monitor.record.probe import Moment, Probe

STATS = ("gini",)


class EmbeddingGini(Probe):
    """Measures ``gini`` of every embedding table.

    Args:
        modulus: the first so many rows stand for the residues of a cyclic task: their Fourier basis is used. Default:
            singular values of the whole table.
        every: measure at each so many steps. Default: as often as 1 % of the run's time allows.

    Example:
        monitor.attach(model, probes=[EmbeddingGini(modulus=113, every=100)])
    """

    name = "gini"

    def __init__(self, modulus: int | None = None, every: int | None = None) -> None:
        self.modulus = modulus
        self.every = every

    def measure(self, moment: Moment) -> None:
        """Every table that is large enough, once."""
        tables = {m.weight: None for r in moment.models for m in r.modules() if isinstance(m, nn.Embedding)}
        for table in tables:
            rows = len(table) if self.modulus is None else self.modulus
            if len(table) < rows:
                continue
            w = table.detach()[:rows].cpu().double()
            x = fourier_norms(w) if self.modulus else torch.linalg.svdvals(w)
            moment.emit("embedding_gini", STATS, moment.parameter(table), (gini(x),))


def gini(x: Tensor) -> float:
    """The Gini coefficient of ``|x|``, ``(n,)``: in [0, 1 - 1/n]; NaN if all are 0."""
    x = x.double().abs().sort().values
    n = len(x)
    weight = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return ((weight * x).sum() / (n * x.sum())).item()


def fourier_norms(table: Tensor) -> Tensor:
    """Norms ``(row,)`` of the projections of ``table`` ``(row, width)`` on the Fourier basis of its rows."""
    n = len(table)
    at = torch.arange(n, dtype=torch.float64)
    angle = 2 * math.pi / n * torch.arange(1, (n + 1) // 2, dtype=torch.float64)[:, None] * at
    constant = torch.full((1, n), n**-0.5, dtype=torch.float64)
    alternating = [(1 - 2 * at.remainder(2))[None] * n**-0.5] if n % 2 == 0 else []
    waves = (math.sqrt(2 / n) * angle.cos(), math.sqrt(2 / n) * angle.sin())
    return (torch.cat([constant, *alternating, *waves]) @ table.double()).norm(dim=1)
