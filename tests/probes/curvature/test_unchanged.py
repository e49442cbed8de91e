"""Curvature of a run leaves no trace in the training: the same bits, and every graph freed before the update."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.probes.curvature import Curvature
from tests.probes.curvature.runs import absent, column, dense
from tests.record import trainings
from tests.record.trainings import Watch

#: Trainings whose loss cannot be measured, and what is said about them.
REFUSED = {"checkpointing_reentrant": "use_reentrant=False"}


class Normed(nn.Module):
    """Batch statistics, recurrence, a tied, a frozen and an unused tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 12), nn.BatchNorm1d(12)
        self.second, self.third = nn.Linear(12, 12), nn.Linear(12, 12)
        self.cell = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 5)
        self.second.weight = self.first.weight
        self.third.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(torch.tanh(self.second(self.norm(self.first(x)))))
        return self.head(F.dropout(self.cell(x.unflatten(1, (3, 4)))[0][:, -1], 0.1, self.training))


def normed(watch: Watch) -> str:
    """BatchNorm, LSTM, dropout, tied, frozen and unused parameters."""
    trainings.seed()
    return trainings._loop(Normed(), watch)


def convolutional(watch: Watch) -> str:
    """Convolutions, which the measurement computes its own way, with batch statistics and an activation in place."""
    trainings.seed()
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 2, groups=2)]
    return trainings._loop(nn.Sequential(nn.Unflatten(1, (1, 3, 4)), *layers, nn.Flatten(), nn.Linear(48, 5)), watch)


def compiled(watch: Watch) -> str:
    """A compiled model."""
    trainings.seed()
    model, digest = trainings.mlp(), trainings.Digest()
    fast = torch.compile(model, backend="aot_eager")
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch(fast)  # pyright: ignore[reportArgumentType]
    for x, y in trainings.batches(16):
        opt.zero_grad()
        loss = F.cross_entropy(fast(x), y)
        loss.backward()
        opt.step()
        digest.add(loss)
    return digest.finish(model, opt)


QUICK = ("clipping", "accumulation", "scaler", "checkpointing_reentrant", "lbfgs", "two_optimizers", "eval_mode")
ALL = [
    pytest.param(t, marks=() if t.__name__ in (*QUICK, "normed", "convolutional") else pytest.mark.slow, id=t.__name__)
    for t in (*trainings.ALL, normed, convolutional, compiled)
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("training", ALL)
def test_bitwise_equal(training: Callable[[Watch], str], tmp_path: Path) -> None:
    """Oracle: invariance. Hash of parameters, optimizer state, losses, buffers and all random generators."""
    control = training(lambda _: None)
    handles: list[monitor.Handle] = []
    more = {"blocks": True, "landscape": 0.1} if training is normed else {}
    curvature = Curvature(every=15, full=2, top=2, **more)
    assert training(lambda m: handles.append(monitor.attach(m, tmp_path / "run", curvature=curvature))) == control
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    why = REFUSED.get(training.__name__)
    if why is None:
        assert run.warnings == [] or training is trainings.lbfgs  # of which no edge of stability is known
        assert all(value > 0 for value in column(run, "sharpness.value"))
        assert run.series("sharpness.value")[0][-1] == (15 if run.steps > 15 else 0)
        assert column(run, "sharpness.converged")[0] == 1
    else:
        assert "sharpness.value" not in run.refs()
        assert why in absent(run)["curvature"]


def test_gpt2_in_a_plain_loop(tmp_path: Path) -> None:
    """Oracle: invariance, and the dense float64 Hessian of one layer: fused attention, groups, accumulation, one loss.

    The places alone are measured, in a loop that uses nothing of `transformers` but the model.
    """
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 20, (6, 4, 6), generator=torch.Generator().manual_seed(0))

    def train(watch: Watch) -> tuple[str, nn.Module]:
        trainings.seed()
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=6, n_embd=8, n_layer=2, n_head=2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
        )
        model, digest = transformers.GPT2LMHeadModel(config), trainings.Digest()
        assert model.config._attn_implementation == "sdpa"
        decayed = [p for p in model.parameters() if p.dim() > 1]
        rest = [p for p in model.parameters() if p.dim() == 1]
        opt = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1, "lr": 1e-2}, {"params": rest, "lr": 3e-3}])
        watch(model)
        state: dict[str, Tensor] = {}
        for i, rows in enumerate(ids):
            if i == 4:  # the third update's forward
                state = {k: v.detach().double() for k, v in model.state_dict().items()}
            loss = model(input_ids=rows, labels=rows).loss / 2
            loss.backward()
            digest.add(loss)
            if i % 2:
                opt.step()
                opt.zero_grad()
        found = digest.finish(model, opt)
        model.double().load_state_dict(state)
        return found, model

    control = train(lambda _: None)[0]
    handles: list[monitor.Handle] = []
    curvature = Curvature(every=2, full=9, parameters="transformer.wpe")
    digest, model = train(lambda m: handles.append(monitor.attach(m, tmp_path / "run", curvature=curvature)))
    handles[0].close()
    assert digest == control

    places = model.get_parameter("transformer.wpe.weight").detach().flatten()

    def loss(v: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            total = torch.zeros((), dtype=torch.float64)
            for rows in ids[4:]:
                inputs = {"input_ids": rows, "labels": rows}
                found = torch.func.functional_call(model, {"transformer.wpe.weight": v.view(6, 8)}, kwargs=inputs)
                total = total + found.loss / 2
            return total

    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    assert column(run, "sharpness.parameters") == [48, 48]
    assert column(run, "sharpness.examples") == [8, 8]
    assert column(run, "sharpness.value")[1] == pytest.approx(np.linalg.eigvalsh(dense(loss, places))[-1], rel=1e-3)
    assert 0 < column(run, "edge_of_stability.ratio")[-1] < 10


@pytest.mark.slow
def test_trainer_of_transformers(tmp_path: Path) -> None:
    """Oracle: invariance. GPT-2 under Trainer with accumulation and clipping: same weights, curvature recorded."""
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 60, (64, 12), generator=torch.Generator().manual_seed(0))

    def train(watch: Watch) -> dict[str, Tensor]:
        transformers.set_seed(0)
        config = transformers.GPT2Config(vocab_size=60, n_positions=12, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        data = [{"input_ids": row, "labels": row} for row in ids]
        arguments = transformers.TrainingArguments(
            tmp_path / "out", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=9,
            max_grad_norm=0.5, report_to=[], save_strategy="no", use_cpu=True, logging_steps=3, disable_tqdm=True,
        )  # fmt: skip
        watch(model)
        transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
        return {k: v.clone() for k, v in model.state_dict().items()}

    control = train(lambda _: None)
    handles: list[monitor.Handle] = []
    seen = train(lambda m: handles.append(monitor.attach(m, tmp_path / "run", curvature=Curvature(every=4, full=2))))
    handles[0].close()
    assert all(torch.equal(control[k], seen[k]) for k in control)
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    assert len(column(run, "sharpness.value")) == 3
    assert column(run, "sharpness.examples") == [8, 8, 8]
    assert 0 < column(run, "edge_of_stability.ratio")[-1] < 10


class _Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Boxed(nn.Module):
    """Every tensor that autograd saves in here can be watched."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = trainings.mlp()
        self.saved: list[weakref.ref[_Box]] = []

    def _pack(self, tensor: Tensor) -> _Box:
        box = _Box(tensor.detach())  # an output with its history would hold itself
        self.saved.append(weakref.ref(box))
        return box

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor):
            return self.inner(x)


def test_graphs_are_freed_before_the_update(tmp_path: Path) -> None:
    """Oracle: invariance. With the collector off, no tensor that autograd saved is alive when the update begins."""
    trainings.seed()
    model = Boxed()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    alive: list[int] = []
    before = 0
    handle = monitor.attach(model, tmp_path / "run", curvature=Curvature(every=2, full=2, blocks=True))
    opt.register_step_pre_hook(lambda *_: alive.append(sum(r() is not None for r in model.saved)))
    gc.collect()
    gc.disable()
    try:
        for x, y in trainings.batches(5):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            before = len(model.saved)
            opt.step()
    finally:
        gc.enable()
    handle.close()
    assert len(column(monitor.open(tmp_path / "run"), "sharpness.value")) == 3
    assert before > 60  # the training alone saves some 30 tensors
    # torch runs the optimizer's own hooks after the global ones: the measurement is over
    assert alive == [0] * 5
