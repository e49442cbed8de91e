"""Attention: the pass against closed forms and dense float64 references, the site in real modules."""

from __future__ import annotations

import math
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
from monitor.record.passes.attention import STATS, attention_rows
from monitor.record.site import START


def rows_of(q: Tensor) -> range:
    return range(q.shape[0] * q.shape[2])


def stats(q: Tensor, k: Tensor, at: Any = None, **how: Any) -> dict[str, np.ndarray]:
    values = attention_rows(q, k, rows_of(q) if at is None else at, **how)
    return dict(zip(STATS, np.asarray(values).T, strict=True))


def dense(q: Tensor, k: Tensor, scale: float | None = None, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """All logits, float64, -inf where masked: the definition, written down without any sharing of work."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.double()
    return s


def reference(s: Tensor) -> dict[str, np.ndarray]:
    """What the rows of dense logits give, one after another."""
    out = {name: np.zeros(s.shape[1]) for name in ("n", "n_many", "sum_entropy", "sum_normalised", "sum_sink")}
    for h in range(s.shape[1]):
        for row in s[:, h].flatten(0, 1):
            seen = row[row > -math.inf]
            if not len(seen):
                continue
            p = row.softmax(0)
            entropy = -sum(x * math.log(x) for x in p.tolist() if x > 0)
            out["n"][h] += 1
            out["sum_entropy"][h] += entropy
            out["sum_sink"][h] += p[0].item()
            if len(seen) > 1:
                out["n_many"][h] += 1
                out["sum_normalised"][h] += entropy / math.log(len(seen))
    return out | {"found": s.amax((0, 2, 3)).numpy()}


MASKS = {
    "bool": lambda g: torch.rand(9, 11, generator=g) > 0.4,
    "bias": lambda g: torch.randn(2, 4, 9, 11, generator=g) * 3,
    "padding": lambda g: torch.arange(11) < torch.tensor([11, 5])[:, None, None, None],
    "no row": lambda g: torch.arange(9)[:, None].expand(9, 11) > 2,
    "lowest": lambda g: torch.where(torch.rand(9, 11, generator=g) > 0.4, 0.0, torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("how", ["plain", "causal", "scaled", *MASKS])
@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pass_against_float64(how: str, shared: int, dtype: torch.dtype) -> None:
    """Oracle: naive transcription. float32 products of 8 terms, sums of 18 rows: 1e-5 relative."""
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 9, 8, generator=g).mul(3).to(dtype)
    k = torch.randn(2, 4 // shared, 11, 8, generator=g).to(dtype)
    options: dict[str, Any] = {"causal": how == "causal", "scale": 0.7 if how == "scaled" else None}
    options["mask"] = MASKS[how](g) if how in MASKS else None
    s = dense(q, k, **options)
    if how == "lowest":
        s = s.masked_fill(s < -1e30, -math.inf)
    want, got = reference(s), stats(q, k, **options)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert np.all(got["unread"] == -math.inf)
    assert np.all(np.isnan(got["lse_max"]))
    norms = q.double().norm(dim=-1).amax((0, 2)), k.double().norm(dim=-1).amax((0, 2)).repeat_interleave(shared)
    np.testing.assert_allclose(got["q_norm"], norms[0], rtol=1e-6)
    np.testing.assert_allclose(got["k_norm"], norms[1], rtol=1e-6)
    np.testing.assert_allclose(got["qk_bound"], norms[0] * norms[1] * (0.7 if how == "scaled" else 8**-0.5), rtol=1e-6)


def test_equal_queries_and_keys() -> None:
    """Oracle: closed form. q = k = c·1 with d = 64: every logit 8c², the norm bound too; c = 2 gives 32."""
    for c in (1.0, 2.0, 50.0):
        q = torch.full((2, 3, 5, 64), c)
        s = stats(q, q, range(0, 10, 3), lse=torch.full((2, 3, 5), 8 * c * c + math.log(5)))
        for name in ("found", "qk_bound", "lse_lower"):
            np.testing.assert_allclose(s[name], 8 * c * c, rtol=1e-6)
        np.testing.assert_allclose(s["lse_max"], 8 * c * c + math.log(5), rtol=1e-6)
        np.testing.assert_allclose(s["sum_entropy"] / s["n"], math.log(5), rtol=1e-6)


def test_entropy_of_ln_three() -> None:
    """Oracle: closed form. Logits (ln 3, 0): entropy 0.562335, 0.811278 of ln 2, sink mass 3/4."""
    s = stats(torch.ones(1, 1, 1, 1), torch.tensor([math.log(3), 0.0]).view(1, 1, 2, 1))
    assert s["sum_entropy"][0] == pytest.approx(0.562335, abs=1e-6)
    assert s["sum_normalised"][0] == pytest.approx(0.811278, abs=1e-6)
    assert s["sum_sink"][0] == pytest.approx(0.75)
    uniform = stats(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 16, 4))
    assert uniform["sum_entropy"][0] == pytest.approx(2.772589, rel=1e-6)
    assert uniform["sum_normalised"][0] == pytest.approx(1)


def test_sink_of_uniform_causal_attention() -> None:
    """Oracle: closed form. (1 + 1/2 + 1/3 + 1/4) / 4 = 0.520833; the first row has no choice, so 3 are normalised."""
    s = stats(torch.zeros(1, 2, 4, 8), torch.ones(1, 2, 4, 8), causal=True)
    np.testing.assert_allclose(s["sum_sink"] / s["n"], 0.5208333, rtol=1e-6)
    np.testing.assert_array_equal(s["n_many"], 3)
    np.testing.assert_allclose(s["sum_normalised"], 3, rtol=1e-6)


@pytest.mark.parametrize("sharp", [1.0, 8.0, 30.0])
@pytest.mark.parametrize("causal", [False, True])
def test_bounds_and_certificate(sharp: float, causal: bool) -> None:
    """Oracle: dense float64 reference. The bounds hold, and what is certified is the maximum; sharp heads all are."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 8, 64, 16, generator=g) * sharp, torch.randn(3, 8, 64, 16, generator=g)
    logits = dense(q, k, causal=causal)
    lse, most = logits.logsumexp(-1).float(), logits.amax((0, 2, 3)).numpy()
    s = stats(q, k, range(5, 192, 13), causal=causal, lse=lse)
    slack = 1e-5 * most
    np.testing.assert_allclose(s["lse_max"], lse.amax((0, 2)), rtol=0)
    np.testing.assert_array_equal(attention.lse_max(lse), lse.amax((0, 2)))
    assert np.all(s["lse_max"] >= most - slack)
    assert np.all(s["lse_lower"] <= most + slack)
    assert np.all(s["found"] <= most + slack)
    certified = s["found"] >= s["unread"]
    np.testing.assert_allclose(s["found"][certified], most[certified], rtol=1e-5)
    if sharp == 30:
        assert certified.all()


def test_scaling_and_order_invariances() -> None:
    """Oracle: invariance. Weights × a make logits × a²; batches and keys in another order change nothing."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 6, 8, generator=g), torch.randn(2, 3, 7, 8, generator=g)
    base, grown = stats(q, k), stats(4 * q, 4 * k)
    for name in ("found", "qk_bound"):
        np.testing.assert_allclose(grown[name], 16 * base[name], rtol=1e-6)
    order = torch.tensor([0, 4, 2, 6, 1, 3, 5])  # the first key stays
    moved = stats(q.flip(0), k.flip(0)[:, :, order])
    for name in STATS[2:]:
        np.testing.assert_allclose(moved[name], base[name], rtol=1e-5)


def test_merging_batches() -> None:
    """Oracle: invariance. Two micro-batches merged are one batch; only the norm bound becomes tighter."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 2, 5, 8, generator=g), torch.randn(4, 2, 5, 8, generator=g)
    parts = [attention_rows(q[i : i + 2], k[i : i + 2], range(10)) for i in (0, 2)]
    merged, whole = np.asarray(attention.merge(*parts)), np.asarray(attention_rows(q, k, range(20)))
    others = [i for i, name in enumerate(STATS) if name != "qk_bound"]
    np.testing.assert_allclose(merged[:, others], whole[:, others], rtol=1e-6)
    assert np.all(merged[:, STATS.index("qk_bound")] <= whole[:, STATS.index("qk_bound")])
    tensors = attention.merge(*(torch.as_tensor(p) for p in parts))
    np.testing.assert_allclose(tensors, attention.merge(*parts))


def test_not_finite_is_kept() -> None:
    """Oracle: planted fault. A NaN key makes its head's numbers NaN, the others stay."""
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    k[0, 1, 2, 3] = math.nan
    s = stats(q, k)
    for name in ("found", "k_norm", "sum_entropy", "sum_sink"):
        assert np.isnan(s[name][1]) and np.isfinite(s[name][0]), name


def test_in_float64() -> None:
    """Oracle: dense float64 reference. A model in double precision is read in it."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 8, generator=g, dtype=torch.float64) for _ in range(2))
    got, want = stats(q, k), reference(dense(q, k))
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(got["k_norm"], k.norm(dim=-1).amax((0, 2)), rtol=1e-12)


# ---- in modules


class Attend(nn.Module):
    """Fused attention with projections of its own; what it attends with is kept for the reference."""

    def __init__(self, d: int = 16, heads: int = 4, shared: int = 1, **how: Any) -> None:
        super().__init__()
        self.heads, self.shared, self.how = heads, heads // shared, how
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d // shared), nn.Linear(d, d // shared)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, d)`` to the same."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (self.shared, -1)).transpose(1, 2) for f in (self.k, self.v))
        self.kept.append((q.detach(), k.detach()))
        return F.scaled_dot_product_attention(q, k, v, **self.how).transpose(1, 2).flatten(2)


class Two(nn.Module):
    """Two residual blocks of attention and a head; perhaps checkpointed."""

    def __init__(self, blocks: list[nn.Module], reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks, self.head, self.reentrant, self.forwards = nn.ModuleList(blocks), nn.Linear(16, 3), reentrant, 0
        self.first = nn.Identity() if reentrant is None else nn.Linear(16, 16)
        blocks[0].register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.forwards += 1

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, 16)`` to ``(batch, 3)``."""
        x = self.first(x)
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))  # pyright: ignore[reportOperatorIssue]
        return self.head(x.mean(1))


class Multi(nn.Module):
    """`nn.MultiheadAttention` of 4 heads with padding."""

    def __init__(self, dropout: float = 0.0, weights: bool = False) -> None:
        super().__init__()
        self.inner, self.weights = nn.MultiheadAttention(16, 4, dropout=dropout, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        """Attend to all but the last two tokens."""
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -2:] = True
        return self.inner(x, x, x, key_padding_mask=padding, need_weights=self.weights)[0]


def train(model: nn.Module, folder: Path, steps: int = 24, micro: int = 1, tokens: int = 6) -> monitor.Run:
    torch.manual_seed(1)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with monitor.attach(model, folder):
        for _ in range(steps):
            opt.zero_grad()
            for _ in range(micro):
                loss = F.cross_entropy(model(torch.randn(2, tokens, 16)), torch.randint(0, 3, (2,)))
                loss.backward()
            opt.step()
    run = monitor.open(folder)
    assert not run.warnings
    return run


@pytest.mark.parametrize(
    ("shared", "how"),
    [(1, {}), (1, {"is_causal": True}), (1, {"scale": 1.3}), (2, {"enable_gqa": True, "is_causal": True}),
     (1, {"attn_mask": torch.arange(6) < 4}), (1, {"dropout_p": 0.3, "is_causal": True})],
    ids=["plain", "causal", "scale", "gqa", "mask", "dropout"],
)  # fmt: skip
def test_fused_attention(shared: int, how: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: dense float64 reference of what each block attended with, at every step."""
    torch.manual_seed(0)
    if "attn_mask" in how:
        how = {"attn_mask": how["attn_mask"].expand(6, 6)}
    model = Two([Attend(16, 4, shared, **how) for _ in range(2)])
    run = train(model, tmp_path / "run")
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Attend)
        logits = [
            dense(q, k, how.get("scale"), how.get("is_causal", False), how.get("attn_mask")) for q, k in block.kept
        ]
        for h in range(4):
            where = f"blocks.{i}[{h}]"
            steps, found = run.series("attn_logit_max.found", where)
            read = steps.tolist()
            assert read == [t for t in range(24) if t < START or t % 10 == 0]
            # 12 rows: all are read
            assert run.series("attn_logit_max.certified", where)[1].all()
            np.testing.assert_allclose(found, [logits[t][:, h].max() for t in read], rtol=1e-5)
            want = [reference(logits[t][:, h : h + 1]) for t in read]
            got = run.series("attn_entropy.entropy", where)[1]
            np.testing.assert_allclose(got, [float(w["sum_entropy"][0] / w["n"][0]) for w in want], rtol=1e-4)
            got = run.series("attn_sink_mass.mass", where)[1]
            np.testing.assert_allclose(got, [float(w["sum_sink"][0] / w["n"][0]) for w in want], rtol=1e-4)
            if "dropout_p" in how:  # no log-sum-exp is saved
                assert where not in run.modules("attn_logit_max.lse_max")
                continue
            steps, bound = run.series("attn_logit_max.lse_max", where)
            read = steps.tolist()
            assert read == [t for t in range(24) if t < START or t % 5 == 0]
            np.testing.assert_allclose(bound, [logits[t][:, h].logsumexp(-1).max() for t in read], rtol=1e-5)


@pytest.mark.parametrize("kind", ["fused", "dropout", "weights"])
def test_inside_multihead_attention(kind: str, tmp_path: Path) -> None:
    """Oracle: dense float64 reference of the first step, from the module's weights; padding is honoured."""
    torch.manual_seed(0)
    model = Two([Multi(0.2 if kind == "dropout" else 0.0, kind == "weights")])
    inner = model.blocks[0].inner
    assert isinstance(inner, nn.MultiheadAttention)
    weight, bias = inner.in_proj_weight.detach().clone(), inner.in_proj_bias.detach().clone()
    run = train(model, tmp_path / "run")
    torch.manual_seed(1)
    x = torch.randn(2, 6, 16)
    q, k, _ = F.linear(x, weight, bias).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    want = dense(q, k, mask=(torch.arange(6) < 4).expand(2, 1, 6, 6))
    expected = reference(want)
    for h in range(4):
        where = f"blocks.0.inner[{h}]"
        assert run.series("attn_logit_max.found", where)[1][0] == pytest.approx(want[:, h].max().item(), rel=1e-4)
        entropy = float(expected["sum_entropy"][h] / expected["n"][h])
        assert run.series("attn_entropy.entropy", where)[1][0] == pytest.approx(entropy, rel=1e-4)
        if kind == "fused":
            bound = want[:, h].logsumexp(-1).max().item()
            assert run.series("attn_logit_max.lse_max", where)[1][0] == pytest.approx(bound, rel=1e-4)


def test_checkpointed_blocks_are_not_run_again(tmp_path: Path) -> None:
    """Oracle: invariance. As many block forwards as without the monitor; rows are read all the same, no bound."""
    torch.manual_seed(0)
    model = Two([Attend(is_causal=True) for _ in range(2)], reentrant=False)
    run = train(model, tmp_path / "run", steps=5)
    assert model.forwards == 10  # once forward, once in backward
    assert len(run.series("attn_logit_max.found", "blocks.0[0]")[0]) == 5
    assert "blocks.0[0]" not in run.modules("attn_logit_max.lse_max")


@pytest.mark.parametrize("blocks", [[Attend()], [Multi()]], ids=["reentrant", "multi-head"])
def test_what_cannot_be_read_is_said(blocks: list[nn.Module], tmp_path: Path) -> None:
    """Oracle: planted fault. Attention that was seen and not recorded is missing with a reason."""
    model = Two(blocks, reentrant=isinstance(blocks[0], Attend))
    run = train(model, tmp_path / "run", steps=3)
    reasons = {a["what"]: a["why"] for a in run.info["absent"]}
    assert "checkpointing" in reasons["attn_logit_max"]
    assert model.forwards == 6


def test_accumulation_and_a_module_called_twice(tmp_path: Path) -> None:
    """Oracle: dense float64 reference. Two micro-batches are one step; the second call has a name of its own."""
    torch.manual_seed(0)
    shared = Attend()
    model = Two([shared, shared])
    run = train(model, tmp_path / "run", steps=3, micro=2)
    assert set(run.modules("attn_logit_max.found")) == {f"blocks.0{c}[{h}]" for c in ("", ":2") for h in range(4)}
    for call, where in enumerate(("blocks.0[1]", "blocks.0:2[1]")):
        most = [dense(q, k)[:, 1].max().item() for q, k in shared.kept[call::2]]
        want = [max(most[i : i + 2]) for i in (0, 2, 4)]
        np.testing.assert_allclose(run.series("attn_logit_max.found", where)[1], want, rtol=1e-5)
        np.testing.assert_array_equal(run.series("attn_entropy.rows", where)[1], 24)


def test_cadence(tmp_path: Path) -> None:
    """Oracle: definition. After the first steps rows are read every tenth step, the bound every fifth."""
    run = train(Two([Attend(is_causal=True)]), tmp_path / "run", steps=45, tokens=40)
    assert run.series("attn_logit_max.lse_max", "blocks.0[0]")[0].tolist() == [*range(START), *range(START, 45, 5)]
    assert run.series("attn_entropy.entropy", "blocks.0[0]")[0].tolist() == [*range(START), *range(START, 45, 10)]
    assert 8 <= run.series("attn_entropy.rows", "blocks.0[0]")[1].min() <= 40


@pytest.mark.parametrize(
    ("kind", "names"),
    [("GPT2", "transformer.h.{}.attn"), ("Llama", "model.layers.{}.self_attn")],
)
def test_transformers(kind: str, names: str, tmp_path: Path) -> None:
    """Oracle: real client. A tiny model of each kind, unmodified: every head of every layer under its module's name."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, attn_pdrop=0.0, resid_pdrop=0.0
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, max_position_embeddings=16,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model.train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(4):
            tokens = torch.randint(0, 50, (2, 12))
            opt.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            opt.step()
    run = monitor.open(tmp_path / "run")
    assert not run.warnings
    heads = [f"{names.format(layer)}[{h}]" for layer in range(2) for h in range(4)]
    assert sorted(run.modules("attn_logit_max.lse_max")) == heads
    for where in heads:
        bound, found = (run.series(f"attn_logit_max.{c}", where)[1] for c in ("lse_max", "found"))
        assert len(bound) == 4 and np.all(bound >= found)
        # 24 rows, all of which are read
        assert run.series("attn_logit_max.certified", where)[1].all()
        assert np.all(run.series("attn_entropy.normalised", where)[1] > 0.9)  # nothing is learned yet


def test_growth_is_found_in_a_training(tmp_path: Path) -> None:
    """Oracle: planted fault. Projections of queries and keys × 60 give logits × 3,600, and the rule says where."""
    torch.manual_seed(0)
    model = Two([Attend(), Attend()])
    with torch.no_grad():
        for p in (*model.blocks[1].q.parameters(), *model.blocks[1].k.parameters()):  # pyright: ignore
            p *= 60
    run = train(model, tmp_path / "run")
    found = [f for f in run.findings() if f.rule == "attention_logit_growth"]
    assert found and all(f.module.startswith("blocks.1[") for f in found)


class InSixteen(Attend):
    """Queries and keys of 32 bits, as from a norm of their own, for a kernel that autocast gives them in 16."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, 16)`` to the same."""
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = 8 * q
        self.kept.append((q.detach(), k.detach()))
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).float()


def test_entropy_under_autocast(tmp_path: Path) -> None:
    """Oracle: dense float64 reference. It comes from rows: another call of the kernel would compute in 16 bits too."""
    block = InSixteen()
    run = train(Two([block]), tmp_path / "run", steps=1)
    p = dense(*block.kept[0]).softmax(-1)
    for head, want in enumerate(-torch.xlogy(p, p).sum(-1).mean((0, 2))):
        assert run.series("attn_entropy.entropy", f"blocks.0[{head}]")[1][0] == pytest.approx(want.item(), rel=1e-5)
