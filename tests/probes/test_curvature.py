"""Curvature of a run: recorded right, refused where it would be wrong, and without a trace in the training."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import monitor
from monitor.errors import UsageError
from monitor.probes.curvature import GUESS, Curvature
from tests.record import trainings
from tests.record.trainings import Watch

#: Trainings whose loss cannot be measured, and what is said about them.
REFUSED = {"checkpointing_reentrant": "use_reentrant=False", "lbfgs": "no call of backward was seen"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def absent(run: monitor.Run) -> dict[str, str]:
    """What was not recorded, and why."""
    return {a["what"]: a["why"] for a in json.loads((run.path / "run.json").read_text())["absent"]}


def column(run: monitor.Run, ref: str, module: str = "") -> list[float]:
    return run.series(ref, module)[1].tolist()


# Nothing changes ------------------------------------------------------------------------------------------------------


class _Normed(nn.Module):
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
    return trainings._loop(_Normed(), watch)


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
    pytest.param(t, marks=() if t.__name__ in (*QUICK, "normed") else pytest.mark.slow, id=t.__name__)
    for t in (*trainings.ALL, normed, compiled)
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
        assert not run.warnings
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


class _Boxed(nn.Module):
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
    model = _Boxed()
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


# The numbers are right ------------------------------------------------------------------------------------------------


def dense(loss: Callable[[Tensor], Tensor], at: Tensor) -> np.ndarray:
    """The Hessian in float64."""
    return torch.autograd.functional.hessian(loss, at.double()).numpy()  # pyright: ignore[reportAttributeAccessIssue]


def test_linear_regression(tmp_path: Path) -> None:
    """Oracle: closed form. L = mean (Xw − y)² has H = 2 X'X / N everywhere, and gradient descent the edge 2/η."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4) * torch.tensor([3.0, 1.0, 0.5, 0.1]), torch.randn(20, 1)
    model = nn.Linear(4, 1, bias=False)
    opt = torch.optim.SGD(model.parameters(), lr=0.02)
    gradients = []
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=3, full=2, top=4)):
        for _ in range(7):
            opt.zero_grad()
            F.mse_loss(model(x), y).backward()
            gradients.append(model.weight.grad.double().flatten().numpy().copy())  # pyright: ignore
            opt.step()
    H = 2 * (x.double().T @ x.double() / 20).numpy()
    eigenvalues = np.linalg.eigvalsh(H)[::-1]
    run = monitor.open(tmp_path / "run")
    assert column(run, "sharpness.value") == pytest.approx([eigenvalues[0]] * 3, rel=1e-5)
    assert column(run, "sharpness.parameters") == [4] * 3
    assert column(run, "sharpness.examples") == [20] * 3
    assert column(run, "sharpness.loss") == pytest.approx(column(run, "loss.value")[::3], rel=1e-6)
    for i in range(4):
        found = column(run, "hessian_eigenvalue.value", f"eigenvalue[{i + 1}]")
        assert found == pytest.approx([eigenvalues[i]] * 2, rel=1e-4)
    assert column(run, "hessian_trace.trace") == pytest.approx([H.trace()] * 2, rel=1e-5)
    assert column(run, "hessian_trace.frobenius") == pytest.approx([np.linalg.norm(H)] * 2, rel=1e-5)
    assert column(run, "hessian_trace.samples") == [0, 0]
    assert column(run, "spectral_density.smallest") == pytest.approx([eigenvalues[-1]] * 2, rel=1e-3)
    assert column(run, "edge_of_stability.ratio") == pytest.approx([0.02 * eigenvalues[0] / 2] * 3, rel=1e-5)
    assert column(run, "edge_of_stability.threshold") == pytest.approx([100] * 3)
    assert column(run, "edge_of_stability.stable_lr") == pytest.approx([2 / eigenvalues[0]] * 3, rel=1e-5)
    assert column(run, "sgd_stability.ratio") == pytest.approx([0.01 * H.trace()] * 2, rel=1e-5)
    along = [g @ H @ g / (g @ g) for g in gradients[::3]]
    assert column(run, "batch_sharpness.value") == pytest.approx(along, rel=1e-4)
    assert column(run, "batch_sharpness.gradient_norm") == pytest.approx(
        [np.linalg.norm(g) for g in gradients[::3]], rel=1e-5
    )
    assert "preconditioned_sharpness.value" not in run.refs()
    assert [name for name, *_ in run.tables()] == ["spectral_density"] * 2
    table = run.table("spectral_density", 0).to_pydict()
    assert sum(table["weight"]) == pytest.approx(1)
    assert sorted(table["node"]) == pytest.approx(eigenvalues[::-1], rel=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_network_under_adam(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Oracle: dense float64 reference, and naive transcription for the preconditioner of Adam's own state."""
    trainings.seed()
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    wanted, blocks, conditioned = [], [], []
    curvature = Curvature(every=4, full=1, blocks=("0", "2"), dtype=dtype)
    with monitor.attach(model, tmp_path / "run", curvature=curvature):
        for step in range(9):
            x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if step % 4 == 0:
                w = nn.utils.parameters_to_vector(model.parameters()).detach()

                def loss(v: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
                    a, b, c, d = v.split([30, 5, 15, 3])
                    z = torch.tanh(x.double() @ a.view(5, 6).T + b) @ c.view(3, 5).T + d
                    return F.cross_entropy(z, y)

                H = dense(loss, w)
                wanted.append(H)
                blocks.append([np.linalg.eigvalsh(part)[-1] for part in (H[:35, :35], H[35:, 35:])])
                if step:
                    state = [opt.state[p] for p in model.parameters()]
                    v = torch.cat([s["exp_avg_sq"].flatten() for s in state]).double().numpy()
                    P = (1 - 0.8**step) * (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
                    conditioned.append(np.linalg.eigvalsh(H / np.sqrt(P[:, None] * P))[-1])
            opt.step()
    run = monitor.open(tmp_path / "run")
    top = [np.linalg.eigvalsh(H)[::-1] for H in wanted]
    assert column(run, "sharpness.value") == pytest.approx([t[0] for t in top], rel=2e-4)
    assert column(run, "spectral_density.smallest") == pytest.approx([t[-1] for t in top], rel=2e-3)
    assert column(run, "hessian_trace.frobenius") == pytest.approx([np.linalg.norm(H) for H in wanted], rel=0.05)
    for i, name in enumerate(("0", "2")):
        assert column(run, "block_sharpness.value", name) == pytest.approx([b[i] for b in blocks], rel=2e-4)
    threshold = (2 + 2 * 0.8) / (1 - 0.8) / 0.01
    assert column(run, "preconditioned_sharpness.value") == pytest.approx(conditioned, rel=2e-3)
    assert column(run, "preconditioned_sharpness.threshold") == pytest.approx([threshold] * 2)
    assert column(run, "edge_of_stability.ratio") == pytest.approx([c / threshold for c in conditioned], rel=2e-3)


def test_landscape(tmp_path: Path) -> None:
    """Oracle: closed form. Along the eigenvectors of a quadratic, L(a, b) = L + a g_1 + b g_2 + (λ₁ a² + λ₂ b²) / 2."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 4) * torch.tensor([3.0, 1.0, 0.5, 0.1]), torch.randn(20, 1)
    model = nn.Linear(4, 1)
    model.bias.requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), lr=0.02)
    values: list[float] = []
    slopes: list[np.ndarray] = []
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=2, full=1, landscape=0.5)):
        for _ in range(3):
            opt.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            values.append(loss.item())
            slopes.append(model.weight.grad.double().flatten().numpy().copy())  # pyright: ignore
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert [step for name, _, step in run.tables() if name == "landscape"] == [0, 2]
    table = run.table("landscape", 2).to_pydict()
    a, b, found = (np.array(table[c]).reshape(11, 11) for c in ("first", "second", "loss"))
    assert a[:, 0] == pytest.approx(np.linspace(-0.5, 0.5, 11)) == b[0]
    curvature, vectors = np.linalg.eigh(2 * (x.double().T @ x.double() / 20).numpy())
    one, two = vectors[:, -1] @ slopes[2], vectors[:, -2] @ slopes[2]
    one = math.copysign(one, found[-1, 5] - found[0, 5])  # an eigenvector's sign is arbitrary
    two = math.copysign(two, found[5, -1] - found[5, 0])
    expected = values[2] + a * one + b * two + (curvature[-1] * a**2 + curvature[-2] * b**2) / 2
    assert found == pytest.approx(expected, rel=1e-3)


def test_opposing_rows(tmp_path: Path) -> None:
    """Oracle: naive transcription. Every row's own gradient, by one backward each, along the dense top eigenvector."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3, bias=False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    y[5] = -100
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=1, full=1)):
        w = model.weight.detach().flatten().clone()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    H = dense(lambda v: F.cross_entropy(x.double() @ v.view(3, 4).T, y), w)
    u = np.linalg.eigh(H)[1][:, -1]
    p = {}
    for i in range(12):
        v = w.double().requires_grad_()
        loss = F.cross_entropy(x[i : i + 1].double() @ v.view(3, 4).T, y[i : i + 1], reduction="sum")
        p[i] = float(torch.autograd.grad(loss, v)[0].numpy() @ u)
    run = monitor.open(tmp_path / "run")
    table = run.table("opposing_signals", 0).to_pydict()
    assert 5 not in table["row"]
    sign = np.sign(p[table["row"][0]] * table["projection"][0])
    assert table["projection"] == pytest.approx([sign * p[i] for i in table["row"]], rel=1e-3, abs=1e-4)
    counted = np.array([p[i] for i in range(12) if i != 5])
    assert column(run, "opposing_signals.rows") == [11]
    assert column(run, "opposing_signals.typical") == pytest.approx([np.median(np.abs(counted))], rel=1e-3)
    cancelled = 1 - abs(counted.sum()) / np.abs(counted).sum()
    assert column(run, "opposing_signals.cancelled") == pytest.approx([cancelled], rel=1e-3)


# What is not the run's loss is refused --------------------------------------------------------------------------------


def noisy(watch: Watch, steps: int = 12) -> nn.Module:
    """Gradients with noise, which no loss has."""
    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    watch(model)
    for x, y in trainings.batches(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.add_(torch.randn_like(p.grad), alpha=0.05)
        opt.step()
    return model


def test_a_gradient_that_is_not_the_losss_is_refused(tmp_path: Path) -> None:
    """Oracle: planted fault. Nothing is recorded, and one line says why and what to pass."""
    handles: list[monitor.Handle] = []
    noisy(lambda m: handles.append(monitor.attach(m, tmp_path / "run", curvature=Curvature(every=2))))
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    assert "sharpness.value" not in run.refs()
    (warning,) = run.warnings
    assert "from step 4 on" in warning  # the third attempt
    assert "cosine" in warning
    assert "loss_closure=" in absent(run)["curvature"]


def test_a_loss_of_the_users_is_taken(tmp_path: Path) -> None:
    """Oracle: definition. The same training, measured on data of its own: the sharpness that `spectrum` gives."""
    x, y = torch.randn(32, 12), torch.randint(0, 5, (32,))
    found, model = [], nn.Module()
    for i, loss in enumerate(((F.cross_entropy, (x, y)), None)):
        handles: list[monitor.Handle] = []

        def watch(m: nn.Module, loss: Any = loss, i: int = i, handles: list[monitor.Handle] = handles) -> None:
            given = loss or (lambda: F.cross_entropy(m(x), y))
            curvature = Curvature(every=11, loss_closure=given, mode="eval")
            handles.append(monitor.attach(m, tmp_path / f"run{i}", curvature=curvature))

        model = noisy(watch, steps=12)
        handles[0].close()
        run = monitor.open(tmp_path / f"run{i}")
        assert not run.warnings
        found.append(column(run, "sharpness.value"))
    assert found[0] == found[1]
    assert len(found[0]) == 2
    # one more update would have been made on this
    later = monitor.curvature.spectrum(model, F.cross_entropy, (x, y), top=1, steps=0, samples=0).sharpness
    assert found[0][-1] == pytest.approx(later, rel=0.2)


def test_losses_are_accepted_whatever_terms_they_have(tmp_path: Path) -> None:
    """Oracle: closed form. An L2 term of weight c adds 2c to every eigenvalue; a tape has it, a loss function not."""
    sharp = []
    for c in (0.0, 1.0):
        trainings.seed()
        model = trainings.mlp()
        opt = torch.optim.SGD(model.parameters(), lr=1e-3)
        folder = tmp_path / f"run{c}"
        with monitor.attach(model, folder, curvature=Curvature(every=1, full=9)):
            for x, y in trainings.batches(1):
                loss = F.cross_entropy(model(x), y) + c * sum(p.square().sum() for p in model.parameters())
                loss.backward()
                opt.step()
        sharp.append(column(monitor.open(folder), "sharpness.value")[0])
    assert sharp[1] - sharp[0] == pytest.approx(2, rel=1e-3)


def test_unknown_optimizers_have_a_sharpness_but_no_edge(tmp_path: Path) -> None:
    """Oracle: planted fault. One warning names the optimizer; the sharpness is there."""
    trainings.seed()
    model = trainings.mlp()
    opt = torch.optim.Rprop(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=2, full=9)):
        for x, y in trainings.batches(5):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert len(column(run, "sharpness.value")) == 3
    assert "edge_of_stability.ratio" not in run.refs()
    (warning,) = run.warnings
    assert "Rprop" in warning


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g * ctx.saved_tensors[0].exp()


class _Odd(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.linear, self.reentrant = nn.Linear(12, 5), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:
            return checkpoint(self.linear, x.requires_grad_(), use_reentrant=True)  # pyright: ignore
        return _OnceOnly.apply(self.linear(x))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("reentrant", "why"), [(True, "use_reentrant=False"), (False, "once_differentiable")])
def test_what_cannot_be_differentiated_twice_is_named(reentrant: bool, why: str, tmp_path: Path) -> None:
    """Oracle: planted fault. The reason stands in the run; training goes on."""
    trainings.seed()
    model = _Odd(reentrant)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run", curvature=Curvature(every=2)):
        for x, y in trainings.batches(3):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert run.steps == 3
    assert why in absent(run)["curvature"]


# What is found --------------------------------------------------------------------------------------------------------


def descent(folder: Path, lr: float, steps: int, every: int) -> monitor.Run:
    """Full-batch gradient descent on digits, squared loss."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:256] / 16, dtype=torch.float32), torch.tensor(labels[:256])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    with monitor.attach(model, folder, curvature=Curvature(every=every, full=1000)):
        for _ in range(steps):
            opt.zero_grad()
            (5 * F.mse_loss(model(x), F.one_hot(y, 10).float())).backward()
            opt.step()
    return monitor.open(folder)


@pytest.mark.parametrize(
    ("lr", "steps", "every", "rule"), [(0.2, 400, 10, None), (0.8, 30, 3, "above_edge_of_stability")]
)
def test_what_full_batch_descent_shows(lr: float, steps: int, every: int, rule: str | None, tmp_path: Path) -> None:
    """Oracle: planted fault. At the edge nothing is said; above it, it is."""
    run = descent(tmp_path / "run", lr, steps, every)
    known = {"above_edge_of_stability", "catapult", "sharpness_blow_up", "learning_rate_too_small"}
    found = {f.rule for f in run.findings()} & known
    assert found == ({rule} if rule else set())
    if rule is None:  # gradient descent settles at 2/η (Cohen et al. 2021)
        assert 0.95 < np.mean(column(run, "edge_of_stability.ratio")[-10:]) < 1.15


def full_batch(
    folder: Path, model: nn.Module, loss: Callable[[], Tensor], lr: float, steps: int, every: int = 40
) -> set[str]:
    """Full-batch gradient descent; every measurement is full. What was found."""
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    with monitor.attach(model, folder, curvature=Curvature(every=every, full=1)):
        for _ in range(steps):
            opt.zero_grad()
            loss().backward()
            opt.step()
    return {f.rule for f in monitor.open(folder).findings()}


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_saddle_is_found(scale: float, tmp_path: Path) -> None:
    """Oracle: planted fault. Weights a thousandth of the usual size hold gradient descent where it guesses."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:256] / 16, dtype=torch.float32), torch.tensor(labels[:256])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    found = full_batch(tmp_path / "run", model, lambda: F.cross_entropy(model(x), y), 0.05, 130)
    assert ("indefinite_curvature" in found) == (scale < 1)


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_one_direction_is_found(mean: float, tmp_path: Path) -> None:
    """Oracle: planted fault, closed form. The mean of inputs is an eigenvector of X'X, far sharper than the others."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 8) + mean, torch.randn(200, 1)
    model = nn.Linear(8, 1)
    found = full_batch(tmp_path / "run", model, lambda: F.mse_loss(model(x), y), 1e-4, 100, 20)
    X = torch.cat([x, torch.ones(200, 1)], 1).double().numpy()
    first, second = np.linalg.eigvalsh(2 * X.T @ X / 200)[::-1][:2]
    assert ("ill_conditioned" in found) == (first / second > 10) == (mean > 0)


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "patch"), [(0.4, True), (0.4, False), (0.1, True)])
def test_opposing_groups_are_found(lr: float, patch: bool, tmp_path: Path) -> None:
    """Oracle: planted fault. Twenty of 1,000 digits share a bright corner, half of them labelled 0, half 1."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1000]
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    if patch:
        x.view(-1, 8, 8)[:20, :2, :2] = 6.0
        y[:20] = torch.tensor([0, 1]).repeat_interleave(10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    found = full_batch(tmp_path / "run", model, lambda: F.cross_entropy(model(x), y), lr, 400)
    assert ("opposing_groups" in found) == (patch and lr == 0.4)
    if found:
        run = monitor.open(tmp_path / "run")
        rows = run.table("opposing_signals", 360).to_pydict()["row"]
        assert sum(row < 20 for row in (*rows[:5], *rows[-5:])) >= 8


# When ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_time_stays_inside_the_budget(factor: float) -> None:
    """Oracle: naive simulation. Whatever measurements really cost, the share is kept but for the first guess."""
    curvature, step, spent = Curvature(budget=0.05), 0.01, 0.0
    cost = {kind: factor * steps * step for kind, steps in GUESS.items()}
    kinds: list[str] = []
    for n in range(10, 60_000):
        if curvature.affordable(n * step, step, spent, None):
            now = curvature._now
            kind = now.planned or ""
            kinds.append(kind)
            spent += cost[kind]
            now.seconds[kind] = cost[kind]
            if kind == "batch":
                now.between += cost[kind]
            else:
                now.measured += 1
            assert spent <= 0.05 * n * step * max(1, factor) + 1e-9
    assert 0.9 * 0.05 < spent / (60_000 * step) <= 0.05
    assert set(kinds) == {"batch", "sharpness", "full"}
    assert kinds.count("sharpness") == pytest.approx(7 * kinds.count("full"), abs=7)


def test_a_run_too_short_for_the_sharpness_says_so() -> None:
    """Oracle: definition. The expected time, until a sharpness was measured."""
    curvature = Curvature(budget=0.05)
    now = curvature._now
    assert curvature.unmet() is None
    assert curvature.affordable(10.0, 0.01, 0.0, None) and now.planned == "batch"
    now.between = now.seconds["batch"] = 0.1
    assert not curvature.affordable(10.0, 0.01, 0.45, None)
    assert "takes about 1 s, more than 5%" in (curvature.unmet() or "")
    now.measured = 1
    assert curvature.unmet() is None


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"budget": 0.0}, {"budget": 5}, {"top": 0}, {"mode": "test"}, {"landscape": 0}]
)
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    """Oracle: planted fault."""
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Curvature(**wrong)
