"""Residual stream and normalisation layers: found in models, read right, read once, and left alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import monitor
from monitor.record.passes import norm, stream
from monitor.record.passes.middle import ends_and_middle
from monitor.record.passes.norm import gain_offset, gain_stats, gains_stats, input_stats, norm_sizes, norm_stats
from monitor.record.passes.stream import output_sizes, output_stats, stream_stats
from monitor.record.sites import norm as norm_site
from monitor.record.sites import stream as stream_site
from monitor.record.sites._modules import MOST, _Look
from tests.record import trainings


def measured(x: Tensor, start: int = 0) -> dict[str, float]:
    values = stream_stats(x, start)
    assert isinstance(values, list)
    return dict(zip(stream.STATS, values, strict=True))


def on_device(x: Tensor, start: int = 0) -> dict[str, float]:
    """What an accelerator gives, for the second of three outputs that are read together."""
    found = output_stats([output_sizes(y, start) for y in (torch.ones_like(x), x, -2 * x)])
    return dict(zip(stream.STATS[stream.READ], found[1].tolist(), strict=True)) | {"rows": measured(x)["rows"]}


# ---- the passes


def test_plus_and_minus_one() -> None:
    """Oracle: closed form. ±1: rms, median and kurtosis 1; one element of 2,000: a massive channel."""
    x = torch.ones(8, 16)
    x[::2] = -1
    assert measured(x) == {
        "rms": pytest.approx(1, rel=1e-7), "max_abs": 1, "std": 1, "kurtosis": 1, "median": 1, "massive": 0,
        "nonfinite": 0, "rows": 8,
    }  # fmt: skip
    x[3, 5] = -2000
    found = measured(x)
    assert (found["max_abs"], found["massive"], found["median"]) == (2000, 1, 1)
    assert found["rms"] == pytest.approx(math.sqrt((127 + 4e6) / 128), rel=1e-6)
    assert measured(0.04 * x)["massive"] == 0  # 80 is beyond 1,000 times the median, not beyond 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stream_against_float64(dtype: torch.dtype) -> None:
    """Oracle: dense float64 reference, by scipy, over all rows and over those sampled; also as an accelerator does."""
    from scipy.stats import kurtosis

    x = torch.randn(5, 60, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    x = x.to(dtype)
    a = x.double().numpy().reshape(-1, 24)
    some = a[2::5][:64]
    found = measured(x, start=7)  # 300 rows: every fifth
    expected = {
        "rms": np.sqrt(np.mean(a**2)), "max_abs": np.abs(a).max(), "std": some.std(), "median": np.median(np.abs(some)),
        "kurtosis": kurtosis(some.ravel(), fisher=False), "massive": 0, "nonfinite": 0, "rows": 60,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-6)
    assert on_device(x, start=7) == pytest.approx(found, rel=2e-5)


def test_not_finite_is_kept() -> None:
    """Oracle: planted fault. One NaN and one inf are counted, whether their rows are sampled or not."""
    x = torch.ones(300, 4)
    x[1, 1], x[7, 2] = math.nan, math.inf
    found = measured(x)
    assert found["nonfinite"] == 2 and math.isnan(found["max_abs"]) and math.isnan(found["rms"])
    x[7, 2] = 2000
    for fault, row in ((math.nan, 1), (math.inf, 1), (-math.inf, 0), (math.nan, 0)):  # row 0 is sampled
        x[1, 1], x[0, 1] = 1, 1
        x[row, 1] = fault
        assert on_device(x) == pytest.approx(measured(x), rel=2e-5, nan_ok=True)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_the_middle_of_rows(n: int) -> None:
    """Oracle: independent library. Smallest, median and largest as numpy has them, of a NaN and of infinities too."""
    x = torch.randn(6, n, generator=torch.Generator().manual_seed(0))
    x[1, 0], x[2, n // 2], x[3], x[4, 0] = math.nan, math.inf, math.inf, -math.inf
    x[5, n // 2 :] = math.nan
    got = ends_and_middle(x).numpy()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got[:, 0], np.min(x.numpy(), 1))
        np.testing.assert_allclose(got[:, 1], np.median(x.numpy(), 1), rtol=1e-6)
        np.testing.assert_array_equal(got[:, 2], np.max(x.numpy(), 1))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", [(3, 20, 16), (60, 16), (4, 1, 16), (1, 16), (2, 5, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_several_inputs_as_one_at_a_time(centred: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Oracle: invariance. Inputs of three layers, one of them with a NaN and one with an infinity, read together."""
    g = torch.Generator().manual_seed(0)
    given = [(torch.randn(shape, generator=g) + 0.7).to(dtype) for _ in range(4)]
    given[1].view(-1)[5], given[2].view(-1)[3] = math.nan, math.inf
    want = np.stack([norm_stats(x, centred) for x in given])
    kept = [norm_sizes(x, centred) for x in given]
    assert len({k.kind for k in kept}) == 1
    np.testing.assert_allclose(input_stats(kept), want[:, norm.SIZES], rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal([k.counts for k in kept], want[:, norm.COUNTS])


def test_in_parts_where_there_is_much_to_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. With room for two of five, they are read in three parts."""
    x = torch.randn(5, 3, 7, 16, generator=torch.Generator().manual_seed(0))
    inputs, outputs = [norm_sizes(y, True) for y in x], [output_sizes(y) for y in x]
    whole = input_stats(inputs), output_stats(outputs)
    monkeypatch.setattr(norm, "MOST", 2 * 21)
    monkeypatch.setattr(stream, "MOST", 2 * 21 * 16)
    torch.testing.assert_close((input_stats(inputs), output_stats(outputs)), whole)


def inputs(x: Tensor, centred: bool) -> dict[str, float]:
    return dict(zip(norm.STATS[norm.INPUT], np.asarray(norm_stats(x, centred)).tolist(), strict=True))


def test_norm_input_against_float64() -> None:
    """Oracle: dense float64 reference. A first token of 50 times the size stands out of `sigma_mean`."""
    x = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(1)) + 0.7
    x[:, 0] *= 50
    a = x.double().numpy()
    rms, std = np.sqrt(np.mean(a**2, axis=-1)), a.std(axis=-1)
    for centred, sigma in ((True, std), (False, rms)):
        assert inputs(x, centred) == pytest.approx(
            {
                "rms_mean": rms.mean(), "rms_max": rms.max(), "rms_median": np.median(rms), "tokens": 60,
                "sigma_mean": sigma[:, 1:].mean(), "sigma_std": sigma[:, 1:].std(), "sigma_first": sigma[:, 0].mean(),
                "firsts": 3,
            }, rel=2e-6,
        )  # fmt: skip


def test_equal_tokens_make_a_layer_linear() -> None:
    """Oracle: closed form. Tokens of one size: σ does not vary; without sequences there is no first token."""
    x = torch.tensor([[3.0, -3.0], [-3.0, 3.0], [3.0, 3.0]])
    found = inputs(x, centred=False)
    assert (found["rms_mean"], found["sigma_std"], found["firsts"]) == (3, 0, 0)


def test_gain() -> None:
    """Oracle: closed form, and planted fault: which of γ and 1 + γ a layer multiplies by is seen in what it does."""
    assert np.asarray(gain_stats(torch.tensor([-2.0, 0.5, 1.0]))).tolist() == [0.5, 1, 2]
    assert np.asarray(gain_stats(torch.tensor([-1.0, 0.0, 0.5]), 1.0)).tolist() == [0, 1, 1.5]
    g = torch.Generator().manual_seed(4)
    weights = [torch.randn(16, generator=g) for _ in range(3)]
    weights[1][3] = math.nan
    np.testing.assert_allclose(gains_stats(weights, []), [gain_stats(w) for w in weights], rtol=1e-6)
    offsets = [torch.tensor(x) for x in (0.0, 1.0, 1.0)]
    together = [gain_stats(w, x) for w, x in zip(weights, offsets, strict=True)]
    np.testing.assert_allclose(gains_stats(weights, offsets), together, rtol=1e-6)
    x, bias = torch.randn(8, 32, generator=torch.Generator().manual_seed(2)), torch.full((32,), 3.0)
    for offset in (0.0, 1.0):
        for scale in (0.1, 0.9, 3.0):
            w = scale * torch.rand(32, generator=torch.Generator().manual_seed(3))
            y = F.rms_norm(x, (32,), w + offset)
            assert gain_offset(x, y, w, None) == offset
            assert gain_offset(x, F.layer_norm(x, (32,), w + offset, bias), w, bias) == offset


# ---- found in models


class Record:
    """Inputs and outputs of chosen modules, by the test's own hooks."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.given: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda m, a, k, out, n=name: self.keep(n, a, k, out), with_kwargs=True
            )

    def keep(self, name: str, args: tuple, kwargs: dict, out: object) -> None:
        first = out[0] if isinstance(out, tuple) else out
        given = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(first, Tensor)
        self.given.setdefault(name, given.detach().clone())
        self.made.setdefault(name, first.detach().clone())


def language(kind: str) -> tuple[nn.Module, list[str], list[str]]:
    """A tiny model of transformers, its blocks and its normalisation layers."""
    import transformers as t

    torch.manual_seed(0)
    if kind == "gpt2":
        c = t.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=3, n_head=2, use_cache=False)
        blocks = [f"transformer.h.{i}" for i in range(3)]
        return t.GPT2LMHeadModel(c), blocks, [f"{b}.ln_{i}" for b in blocks for i in (1, 2)] + ["transformer.ln_f"]
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "use_cache": False,
            "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    blocks = [f"model.layers.{i}" for i in range(3)]
    norms = [f"{b}.{n}" for b in blocks for n in ("input_layernorm", "post_attention_layernorm")] + ["model.norm"]
    made = (
        t.LlamaForCausalLM(t.LlamaConfig(**size))
        if kind == "llama"
        else t.GemmaForCausalLM(t.GemmaConfig(**size, head_dim=16))
    )
    return made, blocks, norms


def train(model: nn.Module, folder: Path, loss: Callable[[nn.Module], Tensor], steps: int = 1) -> monitor.Run:
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with monitor.attach(model, folder):
        for _ in range(steps):
            opt.zero_grad()
            loss(model).backward()
            assert ours(model) == 0
            opt.step()
    return monitor.open(folder)


def ours(model: nn.Module) -> int:
    return sum(isinstance(h, _Look) for m in model.modules() for h in m._forward_hooks.values())


def tokens(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 64, (2, 16))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma"])
def test_models_of_transformers(kind: str, checkpointed: bool, tmp_path: Path) -> None:
    """Oracle: independent computation from the test's own hooks. Checkpointing runs blocks twice; once is read."""
    model, blocks, norms = language(kind)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
    for n in norms:
        with torch.no_grad():
            model.get_submodule(n).weight.add_(torch.rand(32) / 2)  # pyright: ignore[reportArgumentType, reportCallIssue]
    weights = {n: model.get_submodule(n).weight.detach().clone() for n in norms}  # pyright: ignore[reportCallIssue]
    own = Record(model, blocks + norms)
    run = train(model.train(), tmp_path / "run", tokens)
    assert not run.warnings
    assert list(run.block("residual_stream.rms").modules) == blocks
    assert sorted(run.block("norm_layer.rms").modules) == sorted(norms)
    for name in blocks:
        x = own.made[name].double()
        assert run.series("residual_stream.rms", name)[1] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-6)
        assert run.series("residual_stream.max_abs", name)[1] == pytest.approx(x.abs().max().item(), rel=1e-6)
    for name in norms:
        size = own.given[name].double().square().mean(-1).sqrt()
        assert run.series("norm_layer.rms", name)[1] == pytest.approx(size.mean().item(), rel=1e-6)
        assert run.series("norm_layer.peak", name)[1] == pytest.approx((size.max() / np.median(size)).item(), rel=1e-6)
        gain = weights[name].double().numpy() + (1 if kind == "gemma" else 0)
        assert run.series("norm_layer.gain_median", name)[1] == pytest.approx(np.median(np.abs(gain)), rel=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma"])
def test_trained_as_on_an_accelerator(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: invariance. The same modules and numbers as a CPU's, all layers read together after the forward."""
    runs = []
    for there in (False, True):
        if there:
            monkeypatch.setattr(norm_site, "_alone", lambda x: False)
            monkeypatch.setattr(stream_site, "_alone", lambda x: False)
        model = language(kind)[0].train()
        torch.manual_seed(1)
        runs.append(train(model, tmp_path / str(there), tokens, steps=4))
    here, there = runs
    assert not there.warnings
    refs = [r for r in here.refs() if r.startswith(("norm_layer", "residual_stream"))]
    assert len(refs) > 10
    for ref in refs:
        assert there.block(ref).modules == here.block(ref).modules
        for name in here.block(ref).modules:
            (steps, want), (same, got) = (run.series(ref, name) for run in runs)
            assert steps.tolist() == same.tolist() == [0, 3]
            np.testing.assert_allclose(got, want, rtol=5e-5, atol=1e-6, err_msg=f"{ref} {name}")


class Net(nn.Module):
    """Blocks made by ``block``, called in turn."""

    def __init__(self, block: Callable[[], nn.Module], count: int = 3, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for b in self.blocks:
            x = b(x) if self.reentrant is None else checkpoint(b, x, use_reentrant=self.reentrant)
        return self.head(x)


class Residual(nn.Module):
    """``x + f(norm(x))``, counting its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.down(F.relu(self.up(self.norm(x))))


def classes(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(torch.randn(8, 12)), torch.randint(0, 5, (8,)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_read(reentrant: bool, tmp_path: Path) -> None:
    """Oracle: closed form. Every block runs twice a step; one of both is read, at steps 0, 3, 10, 25, 50, 100."""
    model = Net(Residual, reentrant=reentrant)
    run = train(model, tmp_path / "run", classes, steps=101)
    steps, rows = run.series("residual_stream.rows", "blocks.1")
    assert steps.tolist() == [0, 3, 10, 25, 50, 100] and rows.tolist() == [8] * 6
    assert run.series("norm_layer.tokens", "blocks.1.norm")[1].tolist() == [8] * 6
    blocks = [b for b in model.blocks if isinstance(b, Residual)]
    assert [b.calls for b in blocks] == [202, 202, 202]


class Two(nn.Module):
    """What two experts make of the same rows, added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 5)
        self.experts = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.experts[0](x) + self.experts[1](x))


def test_experts_are_no_stream(tmp_path: Path) -> None:
    """Oracle: planted fault. Alike and in one list, but not handed each other's outputs; plain layers neither."""
    assert not any(r.startswith("residual_stream") for r in train(Two(), tmp_path / "a", classes, 3).refs())
    deep = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))
    run = train(deep, tmp_path / "b", classes, 3)
    assert not any(r.startswith(("residual_stream", "norm_layer")) for r in run.refs())


def test_hooks_are_gone_whatever_happens(tmp_path: Path) -> None:
    """Oracle: invariance. After a forward that fails, one without backward, and a frozen encoder in eval()."""
    model = Net(Residual)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model.add_module("encoder", nn.TransformerEncoder(layer, 2).eval())
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with monitor.attach(model, tmp_path / "run"):
        with pytest.raises(RuntimeError):
            model(torch.randn(8, 11))
        assert ours(model) == 0
        model(torch.randn(8, 12))
        assert ours(model) == 0
        seen: list[int] = []
        model.blocks[1].register_forward_pre_hook(lambda m, a: seen.append(ours(model.get_submodule("encoder"))))
        classes(model).backward()
        opt.step()
        assert seen == [0] and ours(model) == 0
    run = monitor.open(tmp_path / "run")
    assert run.series("residual_stream.rms", "blocks.2")[0].tolist() == [0]
    assert not run.warnings


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_of_torch(tmp_path: Path) -> None:
    """Oracle: invariance. A padded encoder whose validation steers it is the same bit for bit, and is recorded."""
    control = trainings.padded_encoder(lambda _: None)
    handles: list[monitor.Handle] = []
    assert trainings.padded_encoder(lambda m: handles.append(monitor.attach(m, tmp_path / "run"))) == control
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    assert run.block("residual_stream.rms").modules == ("encoder.layers.0", "encoder.layers.1")
    assert "encoder.layers.0.norm1" in run.block("norm_layer.rms").modules


def test_more_modules_than_are_looked_at(tmp_path: Path) -> None:
    """Oracle: definition. The first of them are recorded, and the run says of how many others it knows nothing."""
    model = nn.Sequential(*(nn.LayerNorm(8) for _ in range(MOST + 3)))
    run = train(model, tmp_path / "run", lambda m: m(torch.randn(4, 8)).square().sum())
    assert len(run.modules("norm_layer.gain_median")) == MOST
    said = [a["why"] for a in run.info["absent"] if a["what"] == "norm_layer"]
    assert len(said) == 1
    assert "3 others" in said[0]


@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiled_model_gets_no_hook(tmp_path: Path) -> None:
    """Oracle: planted fault. With one compiled block nothing is hooked, and the run says why."""
    model = Net(Residual)
    model.blocks[0].compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised inside the compiler
        run = train(model, tmp_path / "run", classes, 2)
    assert not any(r.startswith("residual_stream") for r in run.refs())
    assert {a["what"] for a in run.info["absent"]} >= {"residual_stream", "norm_layer"}
