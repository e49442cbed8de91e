"""Curvature on the emulated device, against float64 on the host. Run as a script: ``LIBRARY [no float64]``.

Prints JSON: relative errors.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monitor.curvature import (
    Hessian,
    LossClosure,
    Operator,
    SpectralDensity,
    diagonal,
    jacobian,
    lanczos,
    spectrum,
    traces,
    xtrace,
)
from monitor.curvature.precision import dot
from monitor.errors import UsageError
from tests.accelerator import emulated

#: Longer than what is summed up at once.
LONG = 200_000


def _trained(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 4)).to(device)
    x, y = torch.randn(64, 8).to(device), torch.randint(0, 4, (64,)).to(device)
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(100):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model, x, y


def _of_a_network(device: torch.device) -> dict[str, float]:
    model, x, y = _trained(device)
    host = copy.deepcopy(model).cpu()
    wide = Hessian(LossClosure(host, F.cross_entropy, (x.cpu(), y.cpu()), dtype=torch.float64))
    A = wide.dense().numpy()
    known = np.linalg.eigvalsh(A)
    found = spectrum(model, F.cross_entropy, (x, y), top=5, steps=20, seed=1)
    H = Hessian(LossClosure(model, F.cross_entropy, (x, y)))
    every = lanczos(H, 1, 1, steps=H.n)
    trace, frobenius = traces(H, every)
    some = lanczos(H, 1, steps=12, max_products=12, seed=2)
    v = some.basis[0][0].cpu().double().numpy()
    seen = SpectralDensity.of([some], H.n)
    moments = [abs(seen.moment(k) / (v @ np.linalg.matrix_power(A, k) @ v) - 1) for k in (1, 2, 3)]
    J = jacobian(H.closure).singular.values
    K = jacobian(wide.closure).singular.values
    return {
        "largest": float(np.abs(found.largest.values / known[::-1][:5] - 1).max()),
        "smallest": abs(float(found.smallest.values[0]) / known[0] - 1),
        "all eigenvalues": float(np.abs(np.sort(every.nodes) - known).max() / known[-1]),
        "trace": abs(trace.value / known.sum() - 1),
        "frobenius": abs(frobenius.value / float(np.sqrt((known**2).sum())) - 1),
        "moments": float(max(moments)),
        "loss": abs(found.loss / wide.closure.value() - 1),
        "singular values": float(np.abs(J - K).max() / K[0]),
    }


def _of_a_long_vector(device: torch.device) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    d = torch.rand(LONG, generator=generator)
    d[:3] = torch.tensor([9.0, 7.0, 5.0])
    on = d.to(device)
    A = Operator(lambda v: on * v, LONG, device=device)
    run = lanczos(A, 3, steps=40)
    V = torch.cat([rows.cpu() for rows in run.basis]).double()
    total = float(d.double().sum())
    longer = on.repeat(25)
    return {
        "inner product": abs(dot(longer, longer) / (25 * float(d.double() @ d.double())) - 1),
        "largest of many": float(np.abs(run.largest.values / [9.0, 7.0, 5.0] - 1).max()),
        "overlap": float((V @ V.T - torch.eye(len(V))).abs().max()),
        "trace of many": abs(traces(A)[0].value / total - 1),
        "xtrace of many": abs(xtrace(A, products=4).value / total - 1),
        "diagonal": float((diagonal(A, samples=1).cpu() - d).abs().max()),
    }


def _refused(device: torch.device) -> str:
    model, x, y = _trained(device)
    try:
        LossClosure(model, F.cross_entropy, (x, y), dtype=torch.float64)
    except UsageError as e:
        return str(e)
    return ""


def main(library: str, *options: str) -> dict[str, Any]:
    """The errors, and why float64 is refused."""
    device = torch.device(emulated.start(Path(library)).type, 0)
    if "no float64" in options:
        torch.ops.emulated.use_float64(False)
    return {"errors": _of_a_network(device) | _of_a_long_vector(device), "refused": _refused(device)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
