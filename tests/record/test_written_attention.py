"""Attention written by hand, found in the autograd graph; and the entropy of all rows of the fused kind."""

from __future__ import annotations

import math
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
from monitor.record.passes import attention
from monitor.record.passes.attention import STATS, all_rows, score_rows
from monitor.record.site import START
from tests.record.test_attention import MASKS, Two, dense, reference, train
from tests.record.test_nothing_changes import watched
from tests.record.trainings import Digest, Watch, seed

# ---- the passes

MASKED = {"-inf": -math.inf, "-1e4": -1e4, "-1e9": -1e9, "lowest": torch.finfo(torch.float32).min}


@pytest.mark.parametrize("value", MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_against_float64(value: str, dtype: torch.dtype) -> None:
    """Oracle: naive transcription. One row sees nothing, one a single key; the largest logit is that of all rows."""
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 4, n, 8, generator=g).mul(3) for n in (9, 11))
    mask = torch.rand(9, 11, generator=g) > 0.4
    mask[3], mask[4] = value == "-1e4", torch.arange(11) == 2
    s = (dense(q, k).float().masked_fill(~mask, 0) + torch.where(mask, 0.0, MASKED[value])).to(dtype)
    want = reference(s.double().masked_fill(~mask, -math.inf))
    rows = np.asarray(
        score_rows(s, range(18), norms=(q, k.transpose(2, 3), torch.tensor(-(8**-0.5), dtype=torch.float64)))
    )
    got: dict[str, np.ndarray] = dict(zip(STATS, rows.T, strict=True))
    for name, expected in want.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)
    norms = [x.double().norm(dim=-1).amax((0, 2)).numpy() for x in (q, k)]
    np.testing.assert_allclose(got["qk_bound"], norms[0] * norms[1] * 8**-0.5, rtol=1e-6)
    assert np.all(got["unread"] == -math.inf) and np.all(np.isnan(got["lse_max"]))
    few = dict(zip(STATS, np.asarray(score_rows(s, [0, 4])).T, strict=True))
    np.testing.assert_array_equal(few["found"], got["found"])
    assert np.all(few["n"] == 2) and np.all(few["n_many"] == 1) and np.all(np.isnan(few["qk_bound"]))


def test_scores_that_see_nothing_or_are_not_finite() -> None:
    """Oracle: planted fault. A head without a key has no largest logit; NaN and inf are kept, each in its head."""
    s = torch.zeros(1, 4, 2, 3)
    s[0, 0], s[0, 1, 1, 2], s[0, 2, 0, 0] = -1e9, math.nan, math.inf
    got = dict(zip(STATS, np.asarray(score_rows(s, range(2))).T, strict=True))
    np.testing.assert_array_equal(got["found"], [-math.inf, math.nan, math.inf, 0])
    np.testing.assert_array_equal(got["n"], [0, 2, 2, 2])
    assert np.isnan(got["sum_entropy"][1]) and got["sum_entropy"][3] == pytest.approx(2 * math.log(3))


@pytest.mark.parametrize("how", ["plain", "causal", "scaled", "bool", "padding", "no row"])
@pytest.mark.parametrize("shared", [1, 2])
def test_all_rows_against_float64(how: str, shared: int) -> None:
    """Oracle: naive transcription. Float32 kernel, rows with and without keys: 1e-5."""
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 4, 9, 8, generator=g).mul(2), torch.randn(2, 4 // shared, 11, 8, generator=g)
    options: dict[str, Any] = {"causal": how == "causal", "scale": 0.7 if how == "scaled" else None}
    options["mask"] = MASKS[how](g) if how in MASKS else None
    s = dense(q, k, **options)
    want = reference(s)
    before = torch.get_rng_state()
    got = np.asarray(all_rows(q, k, s.logsumexp(-1).float(), **options))
    assert torch.equal(before, torch.get_rng_state())
    for i, name in enumerate(STATS[attention.OF_ROWS]):
        np.testing.assert_allclose(got[:, i], want[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_all_rows_of_sharp_and_of_uniform_heads() -> None:
    """Oracle: closed form. Equal logits give ln 64; a logit of 1e4 above the rest gives 0 to within 1e-7 of it."""
    q, k = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 64, 4)
    k[0, 1, 3, 0], q[0, 1, :, 0] = 1e4, 2.0  # scale 1/2: logits of 1e4 for one key, 0 for the others
    lse = torch.tensor([math.log(64), 1e4]).view(1, 2, 1).expand(1, 2, 5)
    got = np.asarray(all_rows(q, k, lse))
    np.testing.assert_allclose(got[0], [5, 5, 5 * math.log(64), 5, 5 / 64], rtol=1e-6)
    np.testing.assert_allclose(got[1], [5, 5, 0, 0, 0], atol=5e-3)


def test_all_rows_are_read_now_and_then(tmp_path: Path) -> None:
    """Oracle: dense float64 reference. Every hundredth step the entropy is that of all rows, else that of a sample."""
    from tests.record.test_attention import Attend

    torch.manual_seed(0)
    block = Attend(is_causal=True)
    run = train(Two([block]), tmp_path / "run", steps=121, tokens=40)
    steps, rows = run.series("attn_entropy.rows", "blocks.0[1]")
    read = dict(zip(steps.tolist(), rows, strict=True))
    assert read[0] == read[100] == 80 and max(read[s] for s in read if s % 100) < 40
    entropy = dict(zip(*run.series("attn_entropy.entropy", "blocks.0[1]"), strict=True))
    mass = dict(zip(*run.series("attn_sink_mass.mass", "blocks.0[1]"), strict=True))
    for step in (0, 100):
        want = reference(dense(*block.kept[step], causal=True)[:, 1:2])
        assert entropy[step] == pytest.approx(want["sum_entropy"][0] / 80, rel=1e-5)
        assert mass[step] == pytest.approx(want["sum_sink"][0] / 80, rel=1e-5)


# ---- in modules


class Written(nn.Module):
    """Causal attention by hand in one of several styles; its logits are kept for the reference."""

    def __init__(self, style: str = "matmul", d: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.style, self.heads, self.size = style, heads, d // heads
        self.qkv, self.drop = nn.Linear(d, 3 * d), nn.Dropout(0.2)
        self.bias = nn.Parameter(torch.randn(heads, 6, 6))
        self.kept: list[Tensor] = []
        self.norms: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, d)`` to the same."""
        t, scale = x.shape[1], self.size**-0.5
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4)
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        self.norms.append((q.detach().norm(dim=-1), k.detach().norm(dim=-1)))
        if self.style == "matmul":
            s = (q @ k.transpose(-2, -1) / math.sqrt(self.size)).masked_fill(future, -math.inf)
            p = self.drop(F.softmax(s, dim=-1)) @ v
        elif self.style == "einsum":
            s = torch.einsum("bhid,bhjd->bhij", q * scale, k) + torch.where(future, -1e9, 0.0)
            p = torch.einsum("bhij,bhjd->bhid", s.softmax(-1), v)
        elif self.style == "module":
            s = torch.matmul(q, k.mT).mul(scale).masked_fill(future, torch.finfo(q.dtype).min)
            p = torch.matmul(nn.Softmax(dim=3)(s).to(v.dtype), v)
        elif self.style == "capped":
            s = 5 * torch.tanh(torch.matmul(q, k.mT) * scale / 5) + torch.where(future, -math.inf, 0.0)
            p = torch.matmul(torch.softmax(s, -1, dtype=torch.float32), v)
        elif self.style == "bias":
            s = torch.where(future, -math.inf, torch.matmul(q, k.mT) * scale + self.bias[:, :t, :t])
            p = s.softmax(dim=-1).matmul(v)
        else:  # heads in the batch, as in baddbmm
            q3, k3, v3 = (y.flatten(0, 1) for y in (q, k, v))
            mask = torch.where(future, -math.inf, 0.0).expand(len(q3), t, t)
            s = torch.baddbmm(mask, q3, k3.mT, alpha=scale)
            p = torch.bmm(torch.softmax(s, dim=-1), v3).unflatten(0, (-1, self.heads))
        self.kept.append((s if s.dim() == 4 else s.unsqueeze(1)).detach().masked_fill(future, -math.inf))
        return p.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("style", ["matmul", "einsum", "module", "capped", "bias", "baddbmm"])
def test_written_by_hand(style: str, tmp_path: Path) -> None:
    """Oracle: dense float64 reference of the logits each block really had, at every step that is read."""
    torch.manual_seed(0)
    model = Two([Written(style), Written(style)])
    run = train(model, tmp_path / "run")
    heads = 1 if style == "baddbmm" else 4  # batch and heads in one axis: one head
    assert run.modules("attn_entropy.entropy") == tuple(f"blocks.{i}[{h}]" for i in range(2) for h in range(heads))
    assert run.modules("attn_logit_max.lse_max") == ()
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Written)
        for h in range(heads):
            where = f"blocks.{i}[{h}]"
            steps, found = run.series("attn_logit_max.found", where)
            assert steps.tolist() == [t for t in range(24) if t < START or t % 10 == 0]
            assert run.series("attn_logit_max.certified", where)[1].all()
            logits = [block.kept[t].double() for t in steps.tolist()]
            np.testing.assert_allclose(found, [s[:, h].max() for s in logits], rtol=1e-5)
            norms = [(q, k) if style == "baddbmm" else (q[:, h], k[:, h]) for q, k in block.norms]
            bound = [float(norms[t][0].max() * norms[t][1].max() / 2) for t in steps.tolist()]
            np.testing.assert_allclose(run.series("qk_norm_bound.bound", where)[1], bound, rtol=1e-5)
            if style == "baddbmm":
                assert set(run.series("attn_entropy.rows", where)[1]) == {16}  # of 48
                continue
            want = [reference(s[:, h : h + 1]) for s in logits]
            for ref, name in (("attn_entropy.entropy", "sum_entropy"), ("attn_sink_mass.mass", "sum_sink")):
                got = run.series(ref, where)[1]
                np.testing.assert_allclose(got, [float(w[name][0] / w["n"][0]) for w in want], rtol=1e-4, atol=1e-6)
            got = run.series("attn_entropy.normalised", where)[1]
            np.testing.assert_allclose(got, [float(w["sum_normalised"][0] / w["n_many"][0]) for w in want], rtol=1e-4)


def test_only_a_sample_of_many_rows_is_read(tmp_path: Path) -> None:
    """Oracle: definition. Of 80 rows about 16 for the entropy, all for the largest logit; each tenth step."""
    torch.manual_seed(0)
    block = Written()
    run = train(Two([block]), tmp_path / "run", steps=31, tokens=40)
    steps, rows = run.series("attn_entropy.rows", "blocks.0[2]")
    assert steps.tolist() == [*range(START), 10, 20, 30] and 8 <= rows.min() <= rows.max() <= 40
    found = run.series("attn_logit_max.found", "blocks.0[2]")[1]
    np.testing.assert_allclose(found, [block.kept[t][:, 2].max() for t in steps.tolist()], rtol=1e-5)


class Residual(nn.Module):
    """Wraps what `Two` adds to its stream, whatever its shape."""

    def __init__(self, inner: Callable[[Tensor], Tensor], *parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.inner = inner
        for i, part in enumerate(parts):
            setattr(self, f"part{i}", part)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, 16)`` to something that can be added to it."""
        return self.inner(x)


def not_attention() -> dict[str, nn.Module]:
    """Softmaxes over the last axis of three-dimensional scores that are no attention."""
    gate, experts = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16, 16) / 4)
    words, prototypes = nn.Parameter(torch.randn(7, 16)), nn.Parameter(torch.randn(5, 16))
    keys = nn.Linear(16, 16)

    def router(x: Tensor) -> Tensor:
        p = F.softmax(gate(x), dim=-1)
        return torch.einsum("bte,ehd,btd->bth", p, experts, x)

    def classifier(x: Tensor) -> Tensor:
        p = torch.einsum("btd,vd->btv", keys(x), words).softmax(-1)
        return p @ words

    def cosine(x: Tensor) -> Tensor:
        near = F.normalize(keys(x), dim=-1) @ F.normalize(prototypes, dim=-1).expand(len(x), -1, -1).mT
        return (10 * near).softmax(-1) @ prototypes

    def pointer(x: Tensor) -> Tensor:
        p = torch.softmax(keys(x) @ x.mT / 4, dim=-1)
        return p.amax(-1, keepdim=True).expand(x.shape)

    def elementwise(x: Tensor) -> Tensor:
        return torch.softmax(keys(x), dim=-1) * x

    return {
        "router": Residual(router, gate, experts), "classifier": Residual(classifier, words, keys),
        "cosine": Residual(cosine, prototypes, keys), "pointer": Residual(pointer, keys),
        "elementwise": Residual(elementwise, keys),
    }  # fmt: skip


@pytest.mark.parametrize("kind", not_attention())
def test_other_softmaxes_are_not_attention(kind: str, tmp_path: Path) -> None:
    """Oracle: planted fault, absent. Scores of a parameter, and softmaxes whose result is not multiplied."""
    torch.manual_seed(0)
    run = train(Two([not_attention()[kind]]), tmp_path / "run", steps=3)
    assert run.modules("attn_entropy.entropy") == ()
    assert run.modules("attn_logit_max.found") == ()


def test_learned_queries_are_attention(tmp_path: Path) -> None:
    """Oracle: definition. Pooling by projected queries of its own, as in a perceiver, reads keys of the data."""
    torch.manual_seed(0)
    latent, q, k = nn.Parameter(torch.randn(3, 16)), nn.Linear(16, 16), nn.Linear(16, 16)

    def pool(x: Tensor) -> Tensor:
        s = q(latent).expand(len(x), 3, 16) @ k(x).mT
        return (s.softmax(-1) @ x).mean(1, keepdim=True)

    run = train(Two([Residual(pool, latent, q, k)]), tmp_path / "run", steps=3)
    assert run.modules("attn_entropy.entropy") == ("blocks.0[0]",)


def test_products_are_watched_no_longer_than_needed(tmp_path: Path) -> None:
    """Oracle: invariance. Outside of a measured softmax and its product no product pays for a watcher."""
    torch.manual_seed(0)
    block = Written()
    seen: list[bool] = []
    handles: list[monitor.Handle] = []

    def look(*_: Any) -> None:
        modes = torch.overrides._get_current_function_mode_stack()  # none in a forward at which no site looks
        seen.append(any(torch.matmul in m.watched for m in modes))  # pyright: ignore[reportAttributeAccessIssue]

    block.drop.register_forward_pre_hook(look)  # between softmax and product
    model = Two([block])
    model.head.register_forward_pre_hook(look)
    handles.append(monitor.attach(model, tmp_path / "run"))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(14):
        opt.zero_grad()
        F.cross_entropy(model(torch.randn(2, 6, 16)), torch.randint(0, 3, (2,))).backward()
        opt.step()
    handles[0].close()
    assert seen == [True, False] * 11 + [False] * 6


def test_a_decoder_that_attends_in_a_loop(tmp_path: Path) -> None:
    """Oracle: planted fault. Of very many calls of a module the first 16 are recorded, and the run says so."""
    torch.manual_seed(0)
    q, k = nn.Linear(16, 16), nn.Linear(16, 16)

    def decode(x: Tensor) -> Tensor:
        state = x[:, :1]
        for _ in range(20):
            state = torch.bmm(torch.softmax(torch.bmm(q(state), k(x).mT), -1), x)
        return state

    run = train(Two([Residual(decode, q, k)]), tmp_path / "run", steps=2)
    assert len(run.modules("attn_entropy.entropy")) == 16
    assert "only 16" in {a["what"]: a["why"] for a in run.info["absent"]}["attn_logit_max"]


def test_under_checkpointing(tmp_path: Path) -> None:
    """Oracle: dense float64 reference. The logits are there, queries and keys cannot be read; nothing runs twice."""
    torch.manual_seed(0)
    block = Written()
    model = Two([block], reentrant=False)
    run = train(model, tmp_path / "run", steps=5)
    assert model.forwards == 10  # once forward, once in backward
    found = run.series("attn_logit_max.found", "blocks.0[0]")[1]
    np.testing.assert_allclose(found, [s[:, 0].max() for s in block.kept], rtol=1e-5)
    assert run.modules("qk_norm_bound.bound") == ()


class Everything(nn.Module):
    """Attention by hand in all styles, under autocast and checkpointing too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 5)
        self.styles = nn.ModuleList(
            Written(s) for s in ("matmul", "einsum", "module", "capped", "bias", "baddbmm", "matmul", "matmul")
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(16, 12)`` to ``(16, 5)``."""
        x = self.first(x).unflatten(0, (4, 4))
        *plain, again, low = self.styles
        for style in plain:
            x = x + style(x)
        x = x + checkpoint(again, x, use_reentrant=False)  # pyright: ignore[reportOperatorIssue]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = x + low(x)
        return self.head(x.float().flatten(0, 1))


def everything(watch: Watch) -> str:
    """Every style in one training with dropout."""
    seed()
    model, digest = Everything(), Digest()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch(model)
    for _ in range(15):
        opt.zero_grad()
        loss = F.cross_entropy(model(torch.randn(16, 12)), torch.randint(0, 5, (16,)))
        loss.backward()
        opt.step()
        digest.add(loss)
    return digest.finish(model, opt)


def test_bitwise_equal(tmp_path: Path) -> None:
    """Oracle: invariance. Hash of parameters, optimizer state, losses and all random generators."""
    control = everything(lambda _: None)
    digest, run = watched(everything, tmp_path / "run")
    assert digest == control
    assert {m.partition("[")[0] for m in run.modules("attn_entropy.entropy")} == {f"styles.{i}" for i in range(8)}


# ---- real clients


def language_model(kind: str, **options: Any) -> nn.Module:
    """A tiny model of transformers: two layers, four heads of eight, no dropout, 50 words."""
    transformers = pytest.importorskip("transformers")
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    size: dict[str, dict[str, Any]] = {
        "GPT2": gpt | {"embd_pdrop": 0.0},
        "Llama": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 64,
        },
        "OpenAIGPT": gpt,
        "CodeGen": gpt | {"rotary_dim": 4, "n_ctx": 16},
        "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, **size[kind], **options)
    torch.manual_seed(0)
    name = {"GPT2": "GPT2LMHeadModel", "OpenAIGPT": "OpenAIGPTLMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    return getattr(transformers, name)(config).train()


def teach(model: nn.Module, watch: Watch, steps: int = 12) -> str:
    """A plain loop over random tokens; the digest of everything."""
    seed()
    digest = Digest()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch(model)
    for _ in range(steps):
        tokens = torch.randint(0, 50, (2, 12))
        opt.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        opt.step()
        digest.add(loss)
    return digest.finish(model, opt)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("GPT2", "transformer.h.{}.attn"), ("Llama", "model.layers.{}.self_attn")],
)
def test_eager_and_fused_attention_of_transformers(kind: str, names: str, tmp_path: Path) -> None:
    """Oracle: independent library. Unmodified models: the same heads and numbers by hand as fused, training equal."""
    runs = {}
    for how in ("eager", "sdpa"):
        control = teach(language_model(kind, attn_implementation=how), lambda _: None)
        digest, runs[how] = watched(
            lambda watch, how=how: teach(language_model(kind, attn_implementation=how), watch), tmp_path / how
        )
        assert digest == control
    heads = [f"{names.format(layer)}[{h}]" for layer in range(2) for h in range(4)]
    refs = (
        "attn_logit_max.found", "attn_logit_max.certified", "attn_entropy.entropy", "attn_entropy.normalised",
        "attn_entropy.rows", "attn_sink_mass.mass", "qk_norm_bound.bound", "qk_norm_bound.alignment",
    )  # fmt: skip
    for ref in refs:
        assert sorted(runs["eager"].modules(ref)) == heads
        for where in heads:
            (steps, by_hand), (same, fused) = (runs[how].series(ref, where) for how in ("eager", "sdpa"))
            assert steps.tolist() == same.tolist() == [*range(START), 10]
            # AdamW's first steps are signs of gradients, which turn at 0
            np.testing.assert_allclose(by_hand, fused, rtol=2e-3, err_msg=f"{ref} {where}")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("OpenAIGPT", "transformer.h.{}.attn"),
        ("CodeGen", "transformer.h.{}.attn"),
        ("Bloom", "transformer.h.{}.self_attention"),
    ],
)
def test_attention_others_have_written(kind: str, names: str, tmp_path: Path) -> None:
    """Oracle: real client. Three styles nobody here wrote; every head of every layer, training equal."""
    control = teach(language_model(kind), lambda _: None, 3)
    digest, run = watched(lambda watch: teach(language_model(kind), watch, 3), tmp_path / "run")
    assert digest == control
    heads = [f"{names.format(layer)}[{h}]" for layer in range(2) for h in range(4)]
    assert sorted(run.modules("attn_logit_max.found")) == heads
    for where in heads:
        normalised = run.series("attn_entropy.normalised", where)[1]
        assert np.all(normalised > 0.9) and np.all(normalised <= 1 + 1e-6)  # nothing is learned yet
