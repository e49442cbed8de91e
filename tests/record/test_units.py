"""Units behind activation functions: every call is found and named, read right and once, and nothing else changes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import monitor
from monitor.record.passes import units
from monitor.record.passes.units import OF_UNITS, UnitSizes, unit_sizes, unit_stats
from monitor.record.recorder import _LIVE
from monitor.record.sites.units import GATE, HIDDEN, OUTPUT, UnitsSite
from tests.record.trainings import Digest

# ---- the pass


def counts(kept: UnitSizes, before: Tensor | None = None) -> dict[str, float]:
    found, _ = unit_stats([kept], [before])
    return dict(zip(units.STATS[OF_UNITS], found[0].tolist(), strict=True))


def of_size(*sizes: float) -> Tensor:
    """``(row, unit)`` float64 with these mean magnitudes, which are halves of two values of either sign."""
    return torch.tensor(sizes, dtype=torch.float64) * torch.tensor([[2.0], [0.0], [-1.0], [1.0]])


def test_scores_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: closed form. Magnitudes 0, .01, 1 and 2.99 have a mean of 1: scores equal them; ≤ decides on the edge."""
    kept = unit_sizes(of_size(0, 0.01, 1, 2.99), 1)
    assert kept.rows == 4 and kept.sizes.dtype == torch.float64
    np.testing.assert_allclose(kept.sizes, [0, 0.01, 1, 2.99], rtol=1e-12)
    assert counts(kept) == {"dead": 1, "dormant": 2, "before": 0, "still": 0, "saturated": 0}
    for limit, dormant in ((0.0, 1), (0.01, 2), (0.1, 2), (1.0, 3)):  # in float32 rounding decides at 0.01
        monkeypatch.setattr(units, "DORMANT", limit)
        assert counts(kept)["dormant"] == dormant
    assert counts(unit_sizes(torch.zeros(4, 3), 1)) | {"still": 0} == {
        "dead": 3, "dormant": 3, "before": 0, "still": 0, "saturated": 0,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "axis"), [((40, 12), 1), ((6, 7, 12), 2), ((6, 12, 7), 1), ((5, 12, 3, 4), 1)])
def test_against_float64(dtype: torch.dtype, shape: tuple[int, ...], axis: int) -> None:
    """Oracle: naive transcription of the paper, in float64; and of the share of rows near ±1."""
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 1, 12).reshape([-1 if d == axis else 1 for d in range(len(shape))])
    x = torch.tanh(3 * torch.randn(shape, generator=g) * scale)
    x.select(axis, 4).zero_()
    x = x.to(dtype)
    rows = np.moveaxis(x.double().numpy(), axis, -1).reshape(-1, 12)
    size = np.abs(rows).mean(0)
    score = size / (size.mean() + 1e-9)
    near = ((rows <= -0.98) | (rows >= 0.98)).mean(0)
    before = torch.arange(12) % 2 == 0
    kept = unit_sizes(x, axis, (-1.0, 1.0))
    np.testing.assert_allclose(kept.sizes, size, rtol=1e-6)
    assert kept.near is not None
    np.testing.assert_allclose(kept.near, near, rtol=1e-6)
    dormant = score <= 0.025
    assert counts(kept, before) == {
        "dead": 1, "dormant": dormant.sum(), "before": 6, "still": (dormant & before.numpy()).sum(),
        "saturated": (near > 0.95).sum(),
    }  # fmt: skip
    assert 1 < dormant.sum() < 12


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((64, 16, 30, 30), 1), ((100_000, 8), 1), ((3, 5_000, 64), 2), ((2, 8, 9, 9, 90), 1), ((9, 1 << 21), 1)],
)
def test_of_much_some_rows_are_read(shape: tuple[int, ...], axis: int) -> None:
    """Oracle: closed form. Rows and numbers are bounded, a view is read, and every example but of very many is in."""
    x = torch.zeros(1).expand(shape)
    some = units._some(x, axis)
    rows = some.numel() // some.shape[axis]
    assert some.data_ptr() == x.data_ptr() and some.shape[axis] == shape[axis]
    assert min(x.numel() // x.shape[axis], units.ROWS) / 4 <= rows * max(1, shape[axis] // 1024) <= 1.3 * units.ROWS
    assert some.numel() <= 1.3 * max(units.NUMBERS, shape[axis])
    assert shape[0] > units.ROWS or shape[axis] > 1024 or some.shape[0] == shape[0]


def test_several_as_one_at_a_time() -> None:
    """Oracle: invariance, and planted fault. Read together, calls give the same; a NaN or inf spoils its own alone."""
    g = torch.Generator().manual_seed(1)
    given = [torch.relu(torch.randn(30, 16, generator=g) - 2) for _ in range(4)]
    given[1][3, 2], given[2][4, 5] = torch.nan, torch.inf
    kept = [unit_sizes(x, 1) for x in given]
    assert len({k.kind for k in kept}) == 1
    before = [None, given[0].sum(0) > 0, None, given[3].sum(0) > 0]
    together, dormant = unit_stats(kept, before)
    for i in range(4):
        alone, mask = unit_stats(kept[i : i + 1], before[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, equal_nan=True)
        assert torch.equal(dormant[i], mask[0])
    assert together.isnan().all(1).tolist() == [False, True, True, False]


# ---- found in models


def train(model: nn.Module, folder: Path, x: Tensor, loss: Any = None, steps: int = 1) -> monitor.Run:
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with monitor.attach(model, folder):
        for _ in range(steps):
            opt.zero_grad()
            (model(x).square().mean() if loss is None else loss(model)).backward()
            opt.step()
    run = monitor.open(folder)
    assert not run.warnings
    return run


def site(model: nn.Module) -> UnitsSite:
    """That of the recording of ``model`` that goes on."""
    (recorder,) = (r for r in _LIVE if r.roots and r.roots[0] is model)
    return next(s for s in recorder.sites if isinstance(s, UnitsSite))


def column(run: monitor.Run, name: str, step: int = 0) -> dict[str, float]:
    frame = run.frame("dormant_units")
    rows = frame[frame["step"] == step]
    return dict(zip(rows["module"], rows[name], strict=True))


CALLS: dict[str, Any] = {
    "relu": F.relu, "torch.relu": torch.relu, "method": lambda x: x.relu(), "relu_": lambda x: (x * 1).relu_(),
    "in place": lambda x: F.relu(x * 1, inplace=True), "relu6": F.relu6, "leaky_relu": F.leaky_relu, "elu": F.elu,
    "elu_": lambda x: F.elu_(x * 1), "celu": F.celu, "selu": F.selu, "gelu": F.gelu, "silu": F.silu, "mish": F.mish,
    "hardswish": F.hardswish, "softplus": F.softplus, "softsign": F.softsign, "rrelu": F.rrelu,
    "sigmoid": torch.sigmoid, "sigmoid_": lambda x: (x * 1).sigmoid_(), "F.sigmoid": F.sigmoid, "tanh": torch.tanh,
    "method tanh": lambda x: x.tanh(), "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid, "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    **{m.__name__: m for m in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
                                 nn.Hardswish, nn.Softplus, nn.Softsign, nn.RReLU, nn.Sigmoid, nn.Tanh, nn.Hardtanh,
                                 nn.Hardsigmoid, nn.PReLU)},
}  # fmt: skip


class Calls(nn.Module):
    """A layer for each function, each called in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Calls(f) for f in CALLS.values())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Calls(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.into, self.call = nn.Linear(6, 6), call() if isinstance(call, type) else call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.into(x))


def test_every_function_is_seen(tmp_path: Path) -> None:
    """Oracle: closed form. However it is called, in place or not: one call each, named by the module that makes it."""
    torch.manual_seed(0)
    run = train(Calls(), tmp_path / "run", torch.randn(9, 6))
    names = {
        f"layers.{i}.call" if isinstance(call, type) else f"layers.{i}": name
        for i, (name, call) in enumerate(CALLS.items())
    }
    assert set(column(run, "units")) == set(names)
    assert set(column(run, "units").values()) == {6} and set(column(run, "rows").values()) == {9}
    assert {n for n, role in column(run, "role").items() if role != HIDDEN} == {list(names)[-1]}
    bounded = {names[m] for m in run.frame("saturation")["module"]}
    assert bounded == {n for n in CALLS if any(b in n.lower() for b in ("sigmoid", "tanh"))}


class Shared(nn.Module):
    """One activation module for several layers, and the function itself in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.b(self.act(self.a(x))))
        return self.d(F.gelu(self.c(F.gelu(x))))


def test_a_module_that_is_called_several_times(tmp_path: Path) -> None:
    """Oracle: closed form. Its calls are numbered from the second on; the model's own are named by the function."""
    model = Shared()
    with torch.no_grad():
        model.b.bias.fill_(-100)
    run = train(model, tmp_path / "run", torch.randn(8, 4))
    dead = column(run, "dead")
    assert list(dead) == ["act", "act:2", "gelu", "gelu:2"]
    assert dead["act:2"] == 1 and dead["act"] < 1 and dead["gelu"] == 1 > dead["gelu:2"]


class Axes(nn.Module):
    """Three and four dimensions, of channels and of features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)
        self.conv2 = nn.Conv2d(1, 7, 2)
        self.features, self.mix, self.end = nn.Linear(7, 11), nn.Linear(9, 13), nn.Linear(13, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))  # (batch, 5, 9)
        y = F.elu(self.conv2(x.unsqueeze(1)) + 1)  # (batch, 7, 4, 8)
        y = F.gelu(self.features(y.permute(0, 2, 3, 1)))  # (batch, 4, 8, 11)
        return self.end(F.silu(self.mix(x))).mean() + y.mean()  # mixed over positions: (batch, 5, 13)


def test_channels_and_features(tmp_path: Path) -> None:
    """Oracle: closed form. Behind a convolution, a norm and a sum units are dimension 1; behind a matrix the last."""
    run = train(Axes(), tmp_path / "run", torch.randn(2, 3, 11))
    assert column(run, "units") == {"relu": 5, "elu": 7, "gelu": 11, "silu": 13}
    assert column(run, "rows") == {"relu": 18, "elu": 64, "gelu": 64, "silu": 10}


class Roles(nn.Module):
    """Gates by several ways, and two heads, one of which ends in an activation function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.squash, self.gate, self.out = nn.Tanh(), nn.Sigmoid(), nn.Sigmoid()
        self.swiglu = nn.SiLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.squash(self.a(x))
        h = h * self.gate(self.b(h))
        h = F.dropout(self.swiglu(self.b(h)) * self.a(h), 0.5)
        return self.out(self.c(h)), self.c(h)


def test_outputs_and_gates(tmp_path: Path) -> None:
    """Oracle: closed form. What goes into a product is hidden, what multiplies gates, and what is returned ends."""
    run = train(Roles(), tmp_path / "run", torch.randn(8, 4), lambda m: sum(y.sum() for y in m(torch.randn(8, 4))))
    assert column(run, "role") == {"squash": HIDDEN, "gate": GATE, "swiglu": GATE, "out": OUTPUT}


def test_a_loss_on_hidden_units_makes_them_no_output(tmp_path: Path) -> None:
    """Oracle: closed form. A sparse autoencoder penalises what is hidden; a part's end is another part's input."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.hidden = self.encode(x)
            return self.decode(self.hidden)

    model = Sparse()
    run = train(model, tmp_path / "run", torch.ones(8, 4), lambda m: m(torch.ones(8, 4)).sum() + m.hidden.abs().sum())
    assert column(run, "role") == {"encode.1": HIDDEN}
    parts = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 8), nn.ReLU()), "head": nn.Linear(8, 2)})
    run = train(parts, tmp_path / "parts", torch.ones(8, 4), lambda m: m["head"](m["body"](torch.ones(8, 4))).sum(), 5)
    assert column(run, "role", 3) == {"body.1": HIDDEN}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_transformers(kind: str, checkpointed: bool, tmp_path: Path) -> None:
    """Oracle: independent computation from the test's own hooks. Checkpointing runs blocks twice; once is read."""
    import transformers as t

    torch.manual_seed(0)
    size = {"vocab_size": 64, "use_cache": False}
    if kind == "gpt2":
        config = t.GPT2Config(**size, n_positions=32, n_embd=32, n_layer=2, n_head=2, activation_function="relu")
        model, act = t.GPT2LMHeadModel(config), [f"transformer.h.{i}.mlp.act" for i in range(2)]
    else:
        size |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        model, act = t.LlamaForCausalLM(t.LlamaConfig(**size)), [f"model.layers.{i}.mlp.act_fn" for i in range(2)]
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    made: dict[str, Tensor] = {}
    for n in act:

        def keep(module: nn.Module, args: object, y: Tensor, n: str = n) -> None:
            made.setdefault(n, y.detach().clone())

        model.get_submodule(n).register_forward_hook(keep)
    ids = torch.randint(0, 64, (2, 16))
    run = train(model.train(), tmp_path / "run", ids, lambda m: m(input_ids=ids, labels=ids).loss)
    for i, n in enumerate(act):
        rows = made[n].double().numpy().reshape(32, -1)
        score = np.abs(rows).mean(0) / np.abs(rows).mean()
        assert column(run, "rows")[n] == 32 and column(run, "units")[n] == rows.shape[1]
        assert column(run, "dead")[n] == pytest.approx((score == 0).mean())
        assert column(run, "dormant")[n] == pytest.approx((score <= 0.025).mean())
        assert column(run, "role")[n] == (HIDDEN if kind == "gpt2" else GATE), i
    assert set(column(run, "rows")) == set(act)


def test_what_is_not_trained_on_is_left_out(tmp_path: Path) -> None:
    """Oracle: planted fault. Reentrant checkpointing, a forward in evaluation, one that no backward follows."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.block, self.first(x), use_reentrant=True)
            assert isinstance(y, Tensor)
            return y

    run = train(Model(), tmp_path / "reentrant", torch.randn(8, 4))
    assert "dormant_units" not in run.metrics()
    assert any("reentrant" in a["why"] for a in run.info["absent"] if a["what"] == "dormant_units")

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run"):
        for rows in (5, 6, 7, 8):
            with torch.no_grad():
                model(torch.randn(2, 4))
            model(torch.randn(3, 4))  # its loss is never computed
            assert len(site(model)._calls) <= 1  # nor are the graphs of many such kept alive
            model(torch.randn(3, 4))
            assert len(site(model)._calls) <= 1
            opt.zero_grad()
            model(torch.randn(rows, 4)).sum().backward()
            model(torch.randn(4, 4)).sum().backward()  # the second micro-batch
            opt.step()
    run = monitor.open(tmp_path / "run")
    frame = run.frame("dormant_units")
    assert list(zip(frame["step"], frame["rows"], strict=True)) == [(0, 5), (3, 8)]


def test_between_two_looks_nothing_is_watched(tmp_path: Path) -> None:
    """Oracle: closed form. At 0, 3, 10, 25, 50 and 100 only; else no hook is set and no function is watched."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    heard, looked = [], set()

    def inside(module: nn.Module, args: object) -> None:
        looking = site(model)
        heard.append((F.relu in looking.rec.mode.watched, bool(model[1]._forward_hooks), bool(looking._hooks)))

    model[0].register_forward_pre_hook(inside)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(105):
            model(torch.randn(8, 4)).sum().backward()
            opt.step()
    looked = {i for i, h in enumerate(heard) if all(h)}
    assert looked == {0, 3, 10, 25, 50, 100}
    assert not any(any(h) for i, h in enumerate(heard) if i not in looked)
    assert sorted(set(monitor.open(tmp_path / "run").frame("dormant_units")["step"])) == sorted(looked)
    assert not model[1]._forward_pre_hooks and not model[1]._forward_hooks


@pytest.mark.parametrize("build", [Calls, Shared, Roles], ids=lambda b: b.__name__)
def test_training_is_the_same(build: type[nn.Module], tmp_path: Path) -> None:
    """Oracle: invariance. Losses, parameters and random states are bitwise equal with and without."""

    def digest(folder: Path | None) -> str:
        torch.manual_seed(0)
        model, d = build(), Digest()
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        handle = None if folder is None else monitor.attach(model, folder)
        for _ in range(12):
            opt.zero_grad()
            y = model(torch.randn(8, 6 if build is Calls else 4))
            loss = sum(z.square().mean() for z in (y if isinstance(y, tuple) else (y,)))
            assert isinstance(loss, Tensor)
            loss.backward()
            opt.step()
            d.add(loss)
        if handle is not None:
            handle.close()
        return d.finish(model, opt)

    assert digest(tmp_path / "run") == digest(None)
    assert {0, 3, 10} == set(monitor.open(tmp_path / "run").frame("dormant_units")["step"])


def test_a_compiled_model_says_why_there_is_nothing(tmp_path: Path) -> None:
    """Oracle: planted fault. Absent with a reason, and one graph."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", monitor.errors.MonitorWarning)
        run = train(compiled, tmp_path / "run", torch.randn(8, 4), steps=4)  # pyright: ignore[reportArgumentType]
    assert "dormant_units" not in run.metrics()
    assert any("compiled" in a["why"] for a in run.info["absent"] if a["what"] == "dormant_units")
