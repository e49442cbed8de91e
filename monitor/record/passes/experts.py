"""The parameters of the experts of one router: how large each is, and how alike they are.

norm_e = ‖W_e‖,   c_ij = ⟨w_i, w_j⟩ / (‖w_i‖ ‖w_j‖)   over a fixed random sample w of the entries of all matrices W
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.record.passes.dtype import sum_dtype

#: Of the pass ``expert``, per expert; of the pass ``experts``, per router.
NORM_STATS = ("norm",)
ALIKE_STATS = ("mean_cosine", "max_cosine", "entries")
#: Entries of the matrices of all experts that are compared, and the fewest of one expert. Cosines of unrelated experts
#: scatter round 0 by one over the square root of an expert's.
ENTRIES, FEWEST = 1 << 16, 1 << 10


def norms(parts: Sequence[Tensor | list[Tensor]]) -> Tensor:
    """``(expert, 1)`` float32 norms over all parameters of each expert.

    Args:
        parts: parameters; each is fused, ``(expert, …)``, or one tensor per expert.

    Cost: one read of the parameters. Numerics: accumulated in float32, or float64 of parameters in that.
    """
    found = []
    for p in parts:
        if isinstance(p, Tensor):
            found.append(torch.linalg.vector_norm(p.flatten(1), dim=1, dtype=sum_dtype(p)))
        else:
            found.append(torch.stack(torch._foreach_norm(p, dtype=sum_dtype(p[0]))))
    return torch.linalg.vector_norm(torch.stack(found), dim=0).float().unsqueeze(1)


def sample(parts: Sequence[Tensor | list[Tensor]]) -> list[Tensor]:
    """Which entries of the flattened matrices are compared: for each part ``(entry,)`` int64, the same in every run.

    Vectors, such as biases, are left out: they begin alike. Entries are shared out by size.
    """
    first = [p[0] for p in parts]
    sizes = [p.numel() if p.dim() > 1 else 0 for p in first]
    share = max(FEWEST, ENTRIES // len(parts[0])) / max(1, sum(sizes))
    g = torch.Generator().manual_seed(0)
    found = []
    for p, size in zip(first, sizes, strict=True):
        number = min(size, max(1, round(share * size)))
        found.append(torch.randperm(size, generator=g)[:number].sort().values.to(p.device, non_blocking=True))
    return found


def alike(parts: Sequence[Tensor | list[Tensor]], at: Sequence[Tensor]) -> Tensor:
    """``(len(ALIKE_STATS),)`` float32: mean and largest cosine between two experts, and the entries of each compared.

    Args:
        parts: as in `norms`.
        at: of `sample`.

    Cost: gathers at most `ENTRIES` entries and multiplies an ``(expert, entry)`` matrix with itself.
    """
    columns = []
    for p, i in zip(parts, at, strict=True):
        if len(i):
            each = p.flatten(1)[:, i] if isinstance(p, Tensor) else torch.stack([q.flatten()[i] for q in p])
            columns.append(each.float())
    w = torch.cat(columns, 1)
    w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
    with torch.autocast(w.device.type, enabled=False):
        c = w @ w.T
    n = len(c)
    pairs = c[tuple(torch.triu_indices(n, n, 1, device=c.device))]
    return torch.stack((pairs.mean(), pairs.max(), torch.full_like(c[0, 0], w.shape[1])))
