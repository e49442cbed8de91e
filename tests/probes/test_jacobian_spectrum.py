"""The spectrum of the examples' gradients: recorded right, and nothing of the training changed by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import monitor
from monitor.errors import UsageError
from monitor.probes import JacobianSpectrum, jacobian_spectrum
from tests.record import trainings

COLUMNS = ("rows", "rank", "effective_rank", "condition", "largest", "smallest")


def measured(run: monitor.Run, at: int) -> dict[str, float]:
    """All columns of one measurement."""
    return {name: float(run.series(f"jacobian_spectrum.{name}")[1][at]) for name in COLUMNS}


def expected(rows: np.ndarray) -> dict[str, float]:
    """The same from the gradients ``(row, n)``, by numpy's SVD."""
    values = np.linalg.svd(rows, compute_uv=False)
    p = values / values.sum()
    return {
        "rows": len(rows), "rank": len(values), "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "condition": (values[0] / values[-1]) ** 2, "largest": values[0], "smallest": values[-1],
    }  # fmt: skip


@pytest.mark.parametrize("given", [False, True])
def test_naive_gradients(given: bool, tmp_path: Path) -> None:
    """Oracle: naive transcription, and an independent SVD. One backward for each example alone, on a copy.

    Batch statistics and dropout would mix the examples; they are those of evaluation. Given or taken from the run.
    """
    trainings.seed()
    layers = (nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 5))
    model = nn.Sequential(*layers)
    twin = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 5)).eval()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = list(trainings.batches(5, rows=20))
    x, y = batches[0][0].clone(), batches[0][1]
    probe = JacobianSpectrum((F.cross_entropy, (x, y)) if given else None, rows=20, every=4)
    stats: dict[str, torch.Tensor] = {}
    with monitor.attach(model, tmp_path / "run", probes=[probe]):
        for inputs, labels in batches:
            twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
            opt.zero_grad()
            F.cross_entropy(model(inputs), labels, label_smoothing=0.1 if not given else 0.0).backward()
            stats = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
            opt.step()
    twin.load_state_dict(twin.state_dict() | stats)  # as they were after the forward, before the update
    rows = []
    for a, b in zip(x.double(), y, strict=True):
        loss = F.cross_entropy(twin.double()(a[None]), b[None], label_smoothing=0.1 if not given else 0.0)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))]).numpy())
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    assert run.series("jacobian_spectrum.rank")[0].tolist() == [0, 4]
    wanted = expected(np.array(rows))
    assert measured(run, 1) == pytest.approx(wanted, rel=1e-3)
    table = run.table("jacobian_spectrum", 4).column("singular_value").to_numpy()
    assert table[0] == pytest.approx(wanted["largest"], rel=1e-4) and len(table) == 20


def test_examples_that_are_all_alike(tmp_path: Path) -> None:
    """Oracle: closed form. N equal examples of softmax regression: one singular value √N ‖x‖ ‖p − e_y‖, at p = 1/5."""
    model = nn.Linear(12, 5, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.linspace(-1, 1, 12).repeat(16, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run", probes=[JacobianSpectrum(every=1)]):
        F.cross_entropy(model(x), torch.zeros(16, dtype=torch.long)).backward()
        opt.step()
    found = measured(monitor.open(tmp_path / "run"), 0)
    sigma = 4 * float(x[0].norm()) * math.sqrt(0.8**2 + 4 * 0.2**2)
    assert found == pytest.approx(
        {"rows": 16, "rank": 1, "effective_rank": 1, "condition": 1, "largest": sigma, "smallest": sigma}, rel=1e-5
    )


def test_rows_of_sequences_and_a_selection(tmp_path: Path) -> None:
    """Oracle: dense reference. Positions that count are rows; one module's parameters are the columns."""
    trainings.seed()
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    tokens = torch.randint(0, 16, (4, 6))
    target = tokens.roll(-1, 1)
    target[:, -1] = -100
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    with monitor.attach(model, tmp_path / "run", probes=[JacobianSpectrum(parameters="1", rows=10, every=1)]):
        F.cross_entropy(model(tokens).flatten(0, 1), target.flatten()).backward()
        opt.step()
    twin = model.double()
    each = F.cross_entropy(twin(tokens).transpose(1, 2), target, reduction="none")[:, :-1].flatten()
    rows = [each[i] for i in torch.linspace(0, 19, 10).long()]
    grads = [torch.autograd.grad(r, list(twin[1].parameters()), retain_graph=True) for r in rows]
    J = torch.stack([torch.cat([g.flatten() for g in gs]) for gs in grads]).numpy()
    found = measured(monitor.open(tmp_path / "run"), 0)
    assert found == pytest.approx(expected(J), rel=1e-3)


def test_what_is_not_finite_is_recorded_as_such(tmp_path: Path) -> None:
    """Oracle: planted fault. NaN in the weights: NaN in the columns, the number of rows, and no table."""
    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run", probes=[JacobianSpectrum(rows=8, every=1)]):
        for i, (x, y) in enumerate(trainings.batches(2)):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if i == 0:
                next(model.parameters()).data[0, 0] = math.nan
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    found = measured(run, 1)
    assert found.pop("rows") == 8 and all(math.isnan(v) for v in found.values())


@pytest.mark.parametrize(
    ("options", "why"), [({}, "pass loss="), ({"loss": (F.mse_loss, (torch.ones(9, 12), torch.ones(9, 5)))}, None)]
)
def test_a_loss_without_classes(options: dict[str, Any], why: str | None, tmp_path: Path) -> None:
    """Oracle: planted fault. A squared error is refused with a reason, or measured on the loss that is given."""
    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run", probes=[JacobianSpectrum(every=1, **options)]):
        for x, _ in trainings.batches(2):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    absent = [a["why"] for a in run.info["absent"] if a["what"] == "jacobian_spectrum"]
    if why is None:
        assert not absent and run.series("jacobian_spectrum.rows")[1].tolist() == [9, 9]
    else:
        assert why in absent[0]


def test_gradients_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. At 60 kB of room: fewer rows where enough fit, one line and parameters= where not."""
    found = []
    for room in (60_000, 2_500):
        monkeypatch.setattr(jacobian_spectrum, "MEMORY", room)
        trainings.seed()
        model = trainings.mlp()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with monitor.attach(model, tmp_path / str(room), probes=[JacobianSpectrum(every=1)]):
            for x, y in trainings.batches(1):
                F.cross_entropy(model(x), y).backward()
                opt.step()
        found.append(monitor.open(tmp_path / str(room)))
    n = sum(p.numel() for p in trainings.mlp().parameters())
    assert measured(found[0], 0)["rows"] == 60_000 // (4 * n) == 9
    (why,) = [a["why"] for a in found[1].info["absent"] if a["what"] == "jacobian_spectrum"]
    assert "pass parameters=" in why


def test_too_few_rows() -> None:
    """Oracle: planted fault."""
    with pytest.raises(UsageError, match="at least 8"):
        JacobianSpectrum(rows=2)
