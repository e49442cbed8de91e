"""What a realistic user does to a model that is being recorded, and what he records that is not the textbook case."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import monitor
from monitor.record.site import REPLICAS
from tests.record.small import absent, clean, mlp, train
from tests.warm import run_warm

pytestmark = pytest.mark.usefixtures("strict")


# ---- what is done to the model


def test_an_encoder_layer_as_root_keeps_its_fast_path(tmp_path: Path) -> None:
    """Oracle: invariance. `nn.TransformerEncoderLayer` evaluates to the same bits while it is recorded."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x, mask = torch.randn(4, 6, 16), torch.tensor([[False] * 4 + [True] * 2] * 4)

    def evaluated() -> Tensor:
        model.eval()
        with torch.no_grad():
            out = model(x, src_key_padding_mask=mask)
        model.train()
        return out

    with monitor.attach(model, tmp_path / "run"):
        train(model, 6, lambda: torch.randn(4, 6, 16), lambda z: z.square().mean())
        recorded = evaluated()
    assert torch.equal(recorded, evaluated())


def test_a_closed_recording_lets_go_of_the_model(tmp_path: Path) -> None:
    """Oracle: invariance. A handle that is kept after `close` keeps nothing of the model alive."""
    model = mlp()
    handle = monitor.attach(model, tmp_path / "run")
    train(model, 5)
    handle.close()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert handle.path


class Blocks(nn.Module):
    """Repeated blocks with attention, whose every module some site looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)) for _ in range(3))
        self.head = mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("made", [mlp, Blocks])
def test_a_search_over_models_keeps_only_the_last(made: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Oracle: definition. Attached in a function and dropped, a model is freed when the next one is attached."""
    alive: list[weakref.ref[nn.Module]] = []

    def trial(i: int) -> None:
        model = made()
        monitor.attach(model, tmp_path / f"run{i}")
        train(model, 5)
        alive.append(weakref.ref(model))

    for i in range(4):
        trial(i)
    gc.collect()
    assert [r() is None for r in alive] == [True, True, True, False]
    monitor.attach(mlp(), tmp_path / "last").close()
    assert [monitor.open(tmp_path / f"run{i}").status for i in range(4)] == ["finished"] * 4


def test_a_part_that_is_looked_at_is_called_by_itself(tmp_path: Path) -> None:
    """Oracle: definition. A normalisation that no module calls, but the script, is read like any other, by its name."""
    model = nn.ModuleDict({"body": nn.Linear(12, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 5)})
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(12):
            opt.zero_grad()
            z = model["head"](model["norm"](model["body"](torch.randn(8, 12))))
            F.cross_entropy(z, torch.randint(0, 5, (8,))).backward()
            opt.step()
    run = clean(tmp_path / "run", 12)
    assert run.modules("norm_layer.rms") == ("norm",)
    assert run.series("norm_layer.tokens", "norm")[1].tolist() == [8, 8, 8]


def test_parts_in_a_container_made_for_attach_are_recorded_on(tmp_path: Path) -> None:
    """Oracle: definition. Nobody holds the container, but its parts: that recording is not taken for left behind."""
    one, two = mlp(6, 12), mlp(12, 5)
    handle = monitor.attach(nn.ModuleList([one, two]), tmp_path / "run")
    both = nn.Sequential(one, two)
    train(both, 5, lambda: torch.randn(8, 6))
    del both
    gc.collect()
    monitor.attach(mlp(), tmp_path / "other").close()
    assert handle.recording
    handle.close()


# ---- what transforms it


def test_torch_func_is_not_disturbed(tmp_path: Path) -> None:
    """Oracle: invariance. Per-sample gradients beside the training are the same, and the recording goes on."""
    model = mlp()
    x, y = torch.randn(8, 12), torch.randint(0, 5, (8,))

    def per_sample() -> dict[str, Tensor]:
        def loss(params: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, params, (a[None],)), b[None])

        params = {n: p.detach() for n, p in model.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)

    control = per_sample()
    with monitor.attach(model, tmp_path / "run"):
        found = per_sample()
        train(model, 5)
        per_sample()
        train(model, 5)
    assert all(torch.equal(found[n], control[n]) for n in control)
    clean(tmp_path / "run", 10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_model_holds_none_of_our_operations(tmp_path: Path) -> None:
    """Oracle: invariance. `torch.jit.trace` gives the graph of the model alone."""
    model = mlp()
    x = torch.randn(8, 12)

    def nodes() -> int:
        traced: Any = torch.jit.trace(model, x)
        return len(list(traced.inlined_graph.nodes()))

    control = nodes()
    with monitor.attach(model, tmp_path / "run"):
        train(model, 3)
        assert nodes() == control
        train(model, 3)
    clean(tmp_path / "run", 6)


# ---- what is recorded


class Odd(nn.Module):
    """A model with a parameter of no elements and one of no dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.none, self.scale = mlp(), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Use all of them."""
        return self.body(x) * self.scale + self.none.sum()


def test_empty_and_scalar_parameters(tmp_path: Path) -> None:
    """Oracle: definition. An empty tensor has nothing to record and stops nothing."""
    model = Odd()
    with monitor.attach(model, tmp_path / "run"):
        train(model)
    assert "none" not in set(clean(tmp_path / "run", 25).frame("grad_norm")["module"])


def test_float64_is_recorded_like_float32(tmp_path: Path) -> None:
    """Oracle: definition. Gradient norm, input rms and update of a float64 model against float64 computed here."""
    model = mlp().double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 12, dtype=torch.float64)
    with monitor.attach(model, tmp_path / "run"):
        F.cross_entropy(model(x), torch.randint(0, 5, (8,))).backward()
        opt.step()
    run = clean(tmp_path / "run", 1)
    grad = next(model.parameters()).grad
    assert grad is not None
    norm = grad.norm().item()
    assert run.series("grad_norm.norm", "0.weight")[1] == pytest.approx([norm], rel=1e-6)
    assert run.series("update_ratio.update_norm", "0.weight")[1] == pytest.approx([0.1 * norm], rel=1e-6)
    assert run.series("input_rms.rms", "input[0]")[1] == pytest.approx([x.square().mean().sqrt().item()], rel=1e-6)


def test_mixed_dtypes_in_one_optimizer(tmp_path: Path) -> None:
    """Oracle: definition. Small parameters of several dtypes in one group are each recorded."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 5).double())
    with monitor.attach(model, tmp_path / "run"):
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            F.cross_entropy(model[1](model[0](torch.randn(8, 12)).double()), torch.randint(0, 5, (8,))).backward()
            opt.step()
    run = clean(tmp_path / "run", 3)
    assert set(run.frame("update_ratio")["module"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}


class Uncounted(torch.optim.Adam):
    """Counts its updates in its groups, as some optimizers of others do."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["exp_avg_sq"] = torch.ones_like(p)
        return None


@pytest.mark.parametrize(
    ("kind", "steps", "why"),
    [
        (torch.optim.SGD, 3, "no optimizer keeps"),
        (torch.optim.Adam, 1, "too few updates"),
        (Uncounted, 3, "does not count its updates"),
    ],
)
def test_why_there_are_no_spikes(kind: Any, steps: int, why: str, tmp_path: Path) -> None:
    """Oracle: definition. Nothing to compare gradients with, not enough of it, or nobody knows how much."""
    model = mlp()
    opt = kind(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(steps):
            model(torch.randn(8, 12)).square().mean().backward()
            opt.step()
    said = [a["why"] for a in monitor.open(tmp_path / "run").info["absent"] if a["what"] == "spam_spike"]
    assert len(said) == 1
    assert why in said[0]


def test_sparse_gradients_have_a_norm_and_no_spikes(tmp_path: Path) -> None:
    """Oracle: definition. What cannot be compared is declared absent, and the rest of the site goes on."""
    model = nn.EmbeddingBag(100, 5, sparse=True)
    with monitor.attach(model, tmp_path / "run"):
        opt = torch.optim.SparseAdam(model.parameters())
        train(model, 30, lambda: torch.randint(0, 100, (8, 4)), optimizer=opt)
    run = clean(tmp_path / "run", 30)
    assert len(run.series("grad_norm.norm", "weight")[0]) == 30
    assert "spam_spike" in absent(run)


def test_complex_parameters_are_declared_absent(tmp_path: Path) -> None:
    """Oracle: definition. What is not read is said."""

    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(12, 5, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex64) @ self.w).abs()

    model = Complex()
    with monitor.attach(model, tmp_path / "run"):
        train(model)
    assert absent(clean(tmp_path / "run", 25))["grad_norm"] == "complex gradients are not read"


def test_one_class_is_no_collapse(tmp_path: Path) -> None:
    """Oracle: definition. Over one class the loss is 0 whatever the model does; that is no softmax collapse."""
    model = mlp(classes=1)
    with monitor.attach(model, tmp_path / "run"):
        train(model, 40, loss=lambda z: F.cross_entropy(z, torch.zeros(8, dtype=torch.long)))
    assert not clean(tmp_path / "run", 40).findings()


# ---- where it runs


BARE = """
import os, sys, torch, monitor
torch.set_num_threads(1)
m = torch.nn.Linear(4, 4)
opt = torch.optim.SGD(m.parameters(), lr=0.1)
monitor.attach(m, sys.argv[1])
for _ in range(5):
    opt.zero_grad(); m(torch.randn(2, 4)).sum().backward(); opt.step()
sys.exit(0 if (monitor.__doc__ is None) == (sys.argv[2] == "-OO") else 3)
"""
#: What makes a process that has begun already as bare as the flag, or the closed stream, would have.
LAID_BARE = {
    "-OO": """
import sys
from importlib.machinery import SourceFileLoader
from types import SimpleNamespace
sys.flags = SimpleNamespace(**{n: getattr(sys.flags, n) for n in dir(sys.flags) if n[0] != "_"} | {"optimize": 2})
SourceFileLoader.get_code = lambda self, name: compile(
    self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=2
)
for name in [n for n in sys.modules if n.split(".")[0] == "monitor"]:
    del sys.modules[name]
""",
    "stderr closed": """
import os, sys
os.close(2)
sys.stderr = sys.__stderr__ = None
""",
}


@pytest.mark.parametrize("how", LAID_BARE)
def test_a_bare_interpreter(how: str, tmp_path: Path) -> None:
    """Oracle: invariance. Without docstrings, or without standard error, the script ends as it would have."""
    script = tmp_path / "train.py"
    script.write_text(LAID_BARE[how] + BARE)
    assert run_warm(script, tmp_path / "run", how, cwd=tmp_path).returncode == 0
    assert monitor.open(tmp_path / "run").steps == 5


@pytest.mark.slow
@pytest.mark.parametrize("how", LAID_BARE)
def test_an_interpreter_that_begins_bare(how: str, tmp_path: Path) -> None:
    """Oracle: invariance. The same from the beginning, where torch is compiled for the flag too."""
    script = tmp_path / "train.py"
    script.write_text(BARE)
    flags = ["-OO"] if how == "-OO" else []
    before = (lambda: os.close(2)) if how == "stderr closed" else None
    done = subprocess.run(
        [sys.executable, *flags, str(script), str(tmp_path / "run"), how], preexec_fn=before, check=False, timeout=240
    )
    assert done.returncode == 0
    assert monitor.open(tmp_path / "run").steps == 5


def test_training_in_another_thread_than_attach(tmp_path: Path) -> None:
    """Oracle: invariance. The thread that trains is the one that is watched, from its first loss on."""
    model = mlp()
    with monitor.attach(model, tmp_path / "run"):
        thread = threading.Thread(target=train, args=(model, 5))
        thread.start()
        thread.join()
    assert clean(tmp_path / "run", 5).series("loss.value")[0].tolist() == [0, 1, 2, 3, 4]


def test_a_thread_that_evaluates_is_left_alone(tmp_path: Path) -> None:
    """Oracle: invariance. It called the model first, with gradients; its evaluations are then what they are without.

    A layer in evaluation leaves its fast path where a mode is on the thread's stack, and its bits change.
    """

    def recorded(folder: Path | None) -> tuple[list[float], list[int]]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 4))
        opt = torch.optim.SGD(model.parameters(), 0.1)
        x, y = torch.randn(8, 5, 16), torch.randint(0, 4, (8, 5)).flatten()
        seen: list[float] = []
        left: list[int] = []

        def evaluate() -> None:
            with torch.no_grad():
                seen.append(float(F.cross_entropy(model.eval()(x).flatten(0, 1), y)))
            left.append(len(_get_current_function_mode_stack()))

        with contextlib.nullcontext() if folder is None else monitor.attach(model, folder), ThreadPoolExecutor(1) as it:
            it.submit(lambda: F.cross_entropy(model(x).flatten(0, 1), y)).result()
            for _ in range(4):
                opt.zero_grad()
                F.cross_entropy(model.train()(x).flatten(0, 1), y).backward()
                opt.step()
                it.submit(evaluate).result()
        return seen, left

    seen, left = recorded(tmp_path / "run")
    assert left == [0] * 4
    assert seen == recorded(None)[0]
    assert clean(tmp_path / "run", 4).series("loss.value")[0].tolist() == [1, 2, 3]


def test_an_error_at_attach_is_no_reason_not_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. Whatever fails while the recording is set up, the model trains unrecorded."""

    def broken(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("monitor.record.rows.Ring", broken)
    model = mlp()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        handle = monitor.attach(model, tmp_path / "run")
    assert "planted" in said.getvalue()
    assert not handle.recording
    train(model, 3)


@pytest.mark.parametrize("where", ["forward", "whole loop", "default", "both"])
def test_a_device_context_ends_where_it_did(where: str, tmp_path: Path) -> None:
    """Oracle: invariance. After ``with torch.device`` and `torch.set_default_device` no mode is left on the stack."""
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    inside = torch.device("cpu") if where in ("forward", "both") else contextlib.nullcontext()
    around = torch.device("cpu") if where == "whole loop" else contextlib.nullcontext()
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(3):
            opt.zero_grad()
            if where in ("default", "both"):
                torch.set_default_device("cpu")
            with around:
                with inside:
                    out = model(torch.randn(8, 12))
                F.cross_entropy(out, torch.randint(0, 5, (8,))).backward()
                if where in ("default", "both"):
                    torch.set_default_device(None)
                opt.step()
            assert not _get_current_function_mode_stack()
    assert len(clean(tmp_path / "run", 3).series("loss.value")[0]) == 3


def test_a_mode_entered_for_one_call_sees_what_it_saw(tmp_path: Path) -> None:
    """Oracle: invariance. A user's mode round the forward, backward or step counts the same calls."""

    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            """Count."""
            type(self).calls += 1
            return func(*args, **(kwargs or {}))

    def count(watch: Callable[[nn.Module], object]) -> int:
        Counting.calls = 0
        model = mlp()
        opt = torch.optim.Adam(model.parameters())
        watch(model)
        for _ in range(12):
            opt.zero_grad()
            with Counting():
                out = model(torch.randn(8, 12))
            loss = F.cross_entropy(out, torch.randint(0, 5, (8,)))
            with Counting():
                loss.backward()
            with Counting():
                opt.step()
        return Counting.calls

    control = count(lambda _: None)
    assert count(lambda m: monitor.attach(m, tmp_path / "run")) == control


class SelfAttention(nn.Module):
    """Attention, and experts that a router chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.router, self.head = nn.Linear(12, 36), nn.Linear(12, 4), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, 12)`` to ``(batch, 5)``."""
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v)[:, 0]
        share, _ = self.router(x).softmax(-1).topk(2, -1)
        return self.head(x * share.sum(-1, keepdim=True)).mean(1)


class DataParallel(nn.DataParallel):
    """Does what torch's does with several devices: calls a copy of the module in a thread of its own."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """What the copy gives."""
        copy = self.module._replicate_for_data_parallel()
        copy._parameters = dict(self.module._parameters)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(copy, *inputs, **kwargs).result()


def test_why_nothing_is_seen_inside_replicas(tmp_path: Path) -> None:
    """Oracle: definition. Attention and routers are absent, with the reason; a model without any lacks none."""
    for i, (model, x) in enumerate(((SelfAttention(), torch.randn(8, 6, 12)), (mlp(), torch.randn(8, 12)))):
        replicated = DataParallel(model)
        with monitor.attach(replicated, tmp_path / str(i)):
            train(replicated, 5, lambda x=x: x)
        why = absent(clean(tmp_path / str(i), 5))
        for metric in ("attn_logit_max", "router_balance"):
            assert why.get(metric) == (REPLICAS if i == 0 else None)
