"""Routers: found by what they do, read right, joined over micro-batches, and left alone."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.passes.router import (
    HEAD,
    LOAD_STATS,
    STATS,
    balance,
    balance_on_device,
    joined,
    joined_on_device,
    on_device,
    router_sums,
)
from monitor.record.site import START
from tests.record import moe, trainings


def numbers(sums: np.ndarray) -> tuple[dict[str, float], list[list[float]]]:
    values, loads = balance(sums)
    return dict(zip(STATS, values.tolist(), strict=True)), loads.tolist()


def test_two_experts_with_everything() -> None:
    """Oracle: closed form. f = (½, ½, 0, …): Σ f² = ½, H(f) = ln 2; zero scores: entropy ln 8, lse² = (ln 8)².

    A capacity of ⌈1.25 · 64 / 8⌉ = 10 leaves 2 · 22 = 44 over.
    """
    chosen = torch.arange(64).remainder(2).view(64, 1)
    found, loads = numbers(router_sums(chosen, 8, torch.zeros(64, 8)))
    assert found == pytest.approx(
        {
            "tokens": 64, "rows": 64, "experts": 8, "assigned": 64, "sum_entropy": 64 * math.log(8),
            "mean_entropy": math.log(8), "sumsq_lse": 64 * 4.324077, "max_z": 0, "sumsq_load": 0.5, "max_load": 0.5,
            "load_entropy": math.log(2), "sum_margin": 0, "over": 44, "dropped": 0, "limited": 0, "early_z": math.nan,
        }, nan_ok=True,
    )  # fmt: skip
    assert loads == [[32, 64], [32, 64], *([[0, 64]] * 6)]
    assert len(LOAD_STATS) == 2


@pytest.mark.parametrize("scale", [0.1, 1.0, 300.0])
def test_against_float64(scale: float) -> None:
    """Oracle: dense float64 reference, by torch's own softmax, log-sum-exp and one-hot counts; one score is masked."""
    g = torch.Generator().manual_seed(0)
    z = scale * torch.randn(200, 12, generator=g, dtype=torch.float64)
    z[3, 4] = -math.inf
    chosen = z.topk(3).indices
    found, loads = numbers(router_sums(chosen, 12, z.float()))
    p = z.softmax(1)
    f = F.one_hot(chosen, 12).sum((0, 1)).double() / 600
    entropy = torch.special.entr
    assert found == pytest.approx(
        {
            "tokens": 200, "rows": 200, "experts": 12, "assigned": 600, "sum_entropy": entropy(p).sum().item(),
            "mean_entropy": entropy(p.mean(0)).sum().item(), "sumsq_lse": z.logsumexp(1).square().sum().item(),
            "max_z": z.max().item(), "sumsq_load": f.square().sum().item(), "max_load": f.max().item(),
            "load_entropy": entropy(f).sum().item(),
            "sum_margin": (z.topk(2).values @ torch.tensor([1.0, -1.0], dtype=torch.float64)).sum().item(),
            "over": (600 * f - math.ceil(1.25 * 600 / 12)).clamp_min(0).sum().item(), "dropped": 0, "limited": 0,
            "early_z": math.nan,
        }, rel=1e-5, nan_ok=True,
    )  # fmt: skip
    assert [n for n, _ in loads] == (600 * f).round().tolist()


def test_micro_batches_join_to_the_whole() -> None:
    """Oracle: invariance. Two parts joined are one batch, also where the parts are balanced and the whole is not."""
    z = torch.randn(90, 6, generator=torch.Generator().manual_seed(1))
    chosen = z.topk(2).indices
    whole, loads = numbers(router_sums(chosen, 6, z))
    parts = joined(router_sums(chosen[:20], 6, z[:20]), router_sums(chosen[20:], 6, z[20:]))
    found, found_loads = numbers(parts)
    assert whole.pop("over") <= found.pop("over") == 2  # of which there is one capacity in each part
    assert found == pytest.approx(whole, rel=1e-6, nan_ok=True) and found_loads == loads
    assert len(parts) == HEAD + 12


@pytest.mark.parametrize("known", [True, False])
def test_on_an_accelerator_the_same(known: bool) -> None:
    """Oracle: invariance. All routers at once, without a host sync, give what numpy gives for each; joined as well.

    One has a masked score, one a NaN, one sends everything to one expert and one has equal scores.
    """
    g = torch.Generator().manual_seed(2)
    z = 5 * torch.randn(5, 2, 70, 9, generator=g)
    z[1, 0, 3, 4] = -math.inf
    z[2, 1, 6, 8] = math.nan
    z[3, :, :, 7] += 1000
    z[4] = 0
    chosen = z.topk(2).indices
    read = z[:, :, ::3] if known else None

    def both(i: int, j: int) -> np.ndarray:
        return router_sums(chosen[i, j], 9, None if read is None else read[i, j])

    made = [on_device(list(chosen[:, j]), 9, None if read is None else list(read[:, j])) for j in (0, 1)]
    assert made[0].dtype == torch.float32
    for j in (0, 1):
        np.testing.assert_allclose(made[j].numpy(), [both(i, j) for i in range(5)], rtol=1e-5, atol=1e-4)
    whole = joined_on_device([[made[0][i], made[1][i]] for i in range(5)])
    wanted = [joined(both(i, 0), both(i, 1)) for i in range(5)]
    np.testing.assert_allclose(whole.numpy(), wanted, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(joined_on_device([[v] for v in made[0]]).numpy(), made[0].numpy())
    early = torch.arange(5.0)
    for found, n in ((balance_on_device(whole, early), early), (balance_on_device(whole), [math.nan] * 5)):
        for i in range(5):
            for a, b in zip(found, balance(wanted[i], float(n[i])), strict=True):
                np.testing.assert_allclose(a[i].numpy(), b, rtol=1e-4, atol=1e-5)


def test_not_finite_is_kept() -> None:
    """Oracle: planted fault. A NaN score makes entropy, z and maximum NaN and leaves the loads; no rows give 0 / 0."""
    z = torch.zeros(4, 3)
    z[1, 1] = math.nan
    found, _ = numbers(router_sums(torch.zeros(4, 1, dtype=torch.long), 3, z))
    assert all(math.isnan(found[s]) for s in ("sum_entropy", "mean_entropy", "sumsq_lse", "max_z"))
    assert found["max_load"] == 1
    none, _ = numbers(router_sums(torch.zeros(4, 1, dtype=torch.long), 3, None))
    assert none["rows"] == 0 and none["max_load"] == 1


# ---- found in a model


class Routed(nn.Module):
    """A layer of four experts whose router is made by ``route(linear, x) -> (weights, chosen)``."""

    def __init__(self, route: Callable[[nn.Linear, Tensor], tuple[Tensor, Tensor]], name: str = "router") -> None:
        super().__init__()
        self.route, self.name = route, name
        self.add_module(name, nn.Linear(12, 4))
        self.experts = nn.ModuleList(nn.Linear(12, 5) for _ in range(4))
        self.seen: list[Tensor] = []
        self.scores: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        router = getattr(self, self.name)
        weights, chosen = self.route(router, x)
        self.seen.append(chosen.detach())
        self.scores.append(F.linear(x, router.weight, router.bias).detach())
        each = torch.stack([e(x) for e in self.experts], 1)
        picked = each.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 5))
        return (picked * weights.unsqueeze(-1)).sum(1)


def after_softmax(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = router(x).softmax(-1).topk(2)
    return weights, chosen


def before_softmax(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, chosen = torch.topk(router(x), k=2, dim=-1)
    return scores.softmax(-1), chosen


def biased_sigmoid(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(router(x))
    chosen = torch.topk(gate + torch.tensor([0.0, 0.1, 0.0, 0.0]), 2, sorted=False).indices
    return gate.gather(1, chosen), chosen


def tempered(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = (router(x) / 2).softmax(-1).topk(2)
    return weights, chosen


def largest(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    p = router(x).softmax(-1)
    weights, chosen = p.max(dim=-1, keepdim=True)
    return weights, chosen


def one_argmax(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    p = router(x).softmax(-1)
    chosen = torch.argmax(p, dim=-1)
    return p.amax(-1, keepdim=True), chosen.unsqueeze(-1)


def two_argmax(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    z = router(x)
    p = z.softmax(-1)
    first = p.argmax(-1, keepdim=True)
    chosen = torch.cat([first, z.scatter(1, first, -math.inf).argmax(-1, keepdim=True)], 1)
    return p.gather(1, chosen), chosen


def run(model: nn.Module, folder: Path, steps: int = 3, micro: int = 1) -> monitor.Run:
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with monitor.attach(model, folder):
        for i, (x, y) in enumerate(trainings.batches(steps * micro)):
            (F.cross_entropy(model(x), y) / micro).backward()
            if (i + 1) % micro == 0:
                opt.step()
                opt.zero_grad()
    found = monitor.open(folder)
    assert not found.warnings
    return found


@pytest.mark.parametrize("route", [after_softmax, before_softmax, biased_sigmoid, largest, one_argmax, two_argmax])
@pytest.mark.parametrize("micro", [1, 3])
def test_hand_written_routers(route: Callable[..., tuple[Tensor, Tensor]], micro: int, tmp_path: Path) -> None:
    """Oracle: dense float64 reference from the model's own scores and choices; micro-batches are one batch."""
    trainings.seed()
    model = Routed(route)
    recorded = run(model, tmp_path / "run", micro=micro)
    for step in range(3):
        part = slice(step * micro, (step + 1) * micro)
        chosen, z = torch.cat(model.seen[part]), torch.cat(model.scores[part]).double()
        f = torch.bincount(chosen.flatten(), minlength=4).double() / chosen.numel()
        p = z.softmax(1)
        expected = {
            "cv": f.std(correction=0).item() * 4,
            "max_violation": 4 * f.max().item() - 1,
            "effective": torch.special.entr(f).sum().exp().item(),
            "entropy": torch.special.entr(p).sum(1).mean().item(),
            "mean_normalised": torch.special.entr(p.mean(0)).sum().item() / math.log(4),
            "z": z.logsumexp(1).square().mean().item(),
            "max_logit": z.max().item(),
            "tokens": 16 * micro,
            "top_k": chosen.shape[1],
            "margin": (z.topk(2).values[:, 0] - z.topk(2).values[:, 1]).mean().item(),
            "mutual_information": (torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()).item(),
            "over_capacity": over_capacity(model.seen[part]),
        }
        found = {name: recorded.series(f"router_balance.{name}", "router")[1][step] for name in expected}
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        loads = [recorded.series("router_load.load", f"router[{e}]")[1][step] for e in range(4)]
        assert loads == pytest.approx(f.tolist())
    assert "router_balance.dropped" not in recorded.refs()


def over_capacity(calls: list[Tensor], experts: int = 4) -> float:
    """Naive transcription of Switch Transformers, section 2.2: tokens queue, and a full expert sends them away."""
    sent_away = 0
    for chosen in calls:
        capacity = math.ceil(1.25 * chosen.numel() / experts)
        room = [capacity] * experts
        for e in chosen.flatten().tolist():
            sent_away += room[e] == 0
            room[e] = max(0, room[e] - 1)
    return sent_away / sum(chosen.numel() for chosen in calls)


def limited(route: str) -> Callable[[nn.Linear, Tensor], tuple[Tensor, Tensor]]:
    """A router with room for three tokens an expert, its mask made in one of the usual ways."""

    def choose(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = one_argmax(router, x) if route == "argmax" else after_softmax(router, x)
        if route == "argmax":
            wanted = F.one_hot(chosen[:, 0], 4)
            kept = (wanted * (torch.cumsum(wanted, dim=-2) <= 3)).gather(1, chosen)
        elif route == "joint":
            wanted = torch.zeros_like(router(x)).scatter(1, chosen, 1.0)
            kept = (wanted * torch.lt(wanted.cumsum(0) - 1, 3)).gather(1, chosen)
        else:  # the second choices queue behind the first
            first, second = F.one_hot(chosen[:, 0], 4), F.one_hot(chosen[:, 1], 4)
            before = torch.cumsum(first, 0) - 1
            after = torch.cumsum(second, 0) - 1
            after += first.sum(0, keepdim=True)
            kept = torch.cat([(m * (at < 3)).sum(1, keepdim=True) for m, at in ((first, before), (second, after))], 1)
        lost.append(1 - kept.double().mean().item())
        return weights * kept, chosen

    lost: list[float] = []
    choose.lost = lost  # pyright: ignore[reportFunctionMemberAccess]
    return choose


@pytest.mark.parametrize("route", ["argmax", "joint", "one after the other"])
@pytest.mark.parametrize("micro", [1, 2])
def test_what_the_model_drops(route: str, micro: int, tmp_path: Path) -> None:
    """Oracle: naive transcription. The fraction is what the model itself kept out, and not what 1.25 would."""
    trainings.seed()
    choose: Any = limited(route)
    model = Routed(choose)
    recorded = run(model, tmp_path / "run", micro=micro)
    lost = torch.tensor(choose.lost).view(3, micro).mean(1)
    assert recorded.series("router_balance.dropped", "router")[1] == pytest.approx(lost.tolist())
    assert lost.min() > 0.1
    would = [over_capacity(model.seen[micro * i : micro * (i + 1)]) for i in range(3)]
    assert recorded.series("router_balance.over_capacity", "router")[1] == pytest.approx(would)


def test_a_mask_that_leaves_some_out_is_not_taken_for_the_limit(tmp_path: Path) -> None:
    """Oracle: planted fault. A queue in another order of tokens does not say which of them were dropped."""

    def sorted_first(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = one_argmax(router, x)
        order = weights[:, 0].argsort(descending=True)
        wanted = F.one_hot(chosen[:, 0], 4)[order]
        room = (torch.cumsum(wanted, 0) <= 3)[order.argsort()]
        return weights * room.gather(1, chosen), chosen

    trainings.seed()
    recorded = run(Routed(sorted_first), tmp_path / "run")
    assert "router_balance.over_capacity" in recorded.refs()
    assert "router_balance.dropped" not in recorded.refs()


def test_the_z_loss_of_a_twentieth_ago(tmp_path: Path) -> None:
    """Oracle: definition. From step 200 on, the value at most a twentieth of the steps from the beginning."""
    trainings.seed()
    recorded = run(Routed(after_softmax), tmp_path / "run", steps=411)
    z = dict(zip(*recorded.series("router_balance.z", "router"), strict=True))
    steps, early = recorded.series("router_balance.early_z", "router")
    assert steps.tolist() == list(range(200, 411, 5))
    assert [early[steps == s][0] for s in (200, 299, 300, 400, 410) if s in steps] == [z[10], z[15], z[20], z[20]]


def test_scores_that_cannot_be_read_are_absent(tmp_path: Path) -> None:
    """Oracle: planted fault. A temperature after the multiplication hides the scores, not their probabilities."""
    trainings.seed()
    model = Routed(tempered)
    recorded = run(model, tmp_path / "run", steps=1)
    p = (model.scores[0].double() / 2).softmax(1)
    entropy = torch.special.entr(p).sum(1).mean().item()
    assert recorded.series("router_balance.entropy", "router")[1] == pytest.approx([entropy], rel=1e-5)
    assert not {"router_balance.z", "router_balance.max_logit"} & set(recorded.refs())


class Accuracy(nn.Module):
    """A classifier that chooses among its own classes, and sparse codes: top-k, but no router."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.head = nn.Linear(12, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.code(x)
        values, at = codes.topk(8)
        scores = values @ values.T
        scores.topk(2)
        codes.softmax(-1).argmax(-1)
        self.head(codes).softmax(-1).max(-1)
        return self.head(torch.zeros_like(codes).scatter(1, at, values.relu()))


def test_other_uses_of_top_k_are_no_routers(tmp_path: Path) -> None:
    """Oracle: planted fault, absent. Sparse codes, similarities and a top-3 accuracy give no router."""
    trainings.seed()
    model = Accuracy()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with monitor.attach(model, tmp_path / "run"):
        for x, y in trainings.batches(3):
            out = model(x)
            out.softmax(-1).topk(3)
            F.cross_entropy(out, y).backward()
            opt.step()
    recorded = monitor.open(tmp_path / "run")
    assert not recorded.warnings
    assert not any(metric.startswith("router") for metric in recorded.metrics())


def test_only_every_fifth_step(tmp_path: Path) -> None:
    """Oracle: definition. Every step at first, every fifth from then on."""
    trainings.seed()
    recorded = run(Routed(after_softmax, "gate"), tmp_path / "run", steps=41)
    assert recorded.series("router_balance.cv", "gate")[0].tolist() == [s for s in range(41) if s < START or s % 5 == 0]


@pytest.mark.parametrize("balancing", [0.01, -0.1])
def test_a_collapsed_router_is_found(balancing: float, tmp_path: Path) -> None:
    """Oracle: planted fault. A balancing term of the wrong sign collapses the router; of the right one it does not."""
    trainings.seed()
    model = Routed(after_softmax)
    router = model.get_submodule("router")
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with monitor.attach(model, tmp_path / "run"):
        for x, y in trainings.batches(220, rows=64):
            loss = F.cross_entropy(model(x), y)
            p = router(x).softmax(-1)
            f = F.one_hot(model.seen[-1], 4).float().mean((0, 1))
            (loss + balancing * 4 * (f * p.mean(0)).sum()).backward()
            opt.step()
            opt.zero_grad()
            model.seen.clear()
            model.scores.clear()
    found = {(f.rule, f.module) for f in monitor.open(tmp_path / "run").findings() if f.site == "router"}
    assert found == ({("router_concentration", "router"), ("load_imbalance", "router")} if balancing < 0 else set())


@pytest.mark.parametrize("client", moe.CLIENTS)
def test_unmodified_transformers(client: str, tmp_path: Path) -> None:
    """Oracle: dense float64 reference from what the model's own router modules return; nothing else is a router."""
    pytest.importorskip("transformers")
    model = moe.client(client)
    returned: dict[str, list[tuple[Tensor, ...]]] = {}
    for path, m in model.named_modules():
        if path.endswith(".gate"):
            m.register_forward_hook(lambda m, args, out, path=path: returned.setdefault(path, []).append(out))
    recorded = moe.train(model, tmp_path / "run")
    assert len(returned) == 2
    assert set(recorded.frame("router_balance")["module"]) == set(returned)
    for path, calls in returned.items():
        for step, (z, _, chosen) in enumerate(calls):
            f = torch.bincount(chosen.flatten(), minlength=8).double() / chosen.numel()
            loads = [recorded.series("router_load.load", f"{path}[{e}]")[1][step] for e in range(8)]
            assert loads == pytest.approx(f.tolist())
            z_loss = z.detach().double().logsumexp(-1).square().mean().item()
            assert recorded.series("router_balance.z", path)[1][step] == pytest.approx(z_loss, rel=1e-4)


@pytest.mark.parametrize("client", ["switch_transformers", "nllb_moe"])
def test_transformers_with_a_capacity(client: str, tmp_path: Path) -> None:
    """Oracle: dense float64 reference from the dispatch masks that the model's own routers return."""
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{client}")
    torch.manual_seed(0)
    shared = {"vocab_size": 64, "d_model": 32, "num_experts": 4, "expert_capacity": 5, "decoder_start_token_id": 0}
    if client == "switch_transformers":
        config = module.SwitchTransformersConfig(
            d_ff=32, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1, **shared,
        )  # fmt: skip
        model = module.SwitchTransformersForConditionalGeneration(config).train()
    else:
        config = module.NllbMoeConfig(
            encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_sparse_step=1, decoder_sparse_step=1, second_expert_policy="all",
            batch_prioritized_routing=False, **shared,
        )  # fmt: skip
        model = module.NllbMoeForConditionalGeneration(config).train()
    kept: dict[str, list[tuple[Tensor, int]]] = {}
    for path, m in model.named_modules():
        if path.endswith(".router"):
            nn.init.normal_(m.classifier.weight, std=0.5)
            m.register_forward_hook(lambda m, args, out, path=path: kept.setdefault(path, []).append(dispatched(out)))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(2):
            tokens = torch.randint(4, 64, (2, 16))
            model(input_ids=tokens, labels=tokens).loss.backward()
            opt.step()
            opt.zero_grad()
    recorded = monitor.open(tmp_path / "run")
    assert not recorded.warnings
    assert len(kept) >= 2
    for path, calls in kept.items():
        for step, (mask, k) in enumerate(calls):
            lost = 1 - mask.double().sum().item() / (32 * k)
            assert recorded.series("router_balance.dropped", f"{path}.classifier")[1][step] == pytest.approx(lost)
            assert recorded.series("router_balance.top_k", f"{path}.classifier")[1][step] == k


def dispatched(out: Any) -> tuple[Tensor, int]:
    """The 0/1 mask a router of transformers gives, and its choices a token."""
    mask, gates = out[0].detach(), out[1].detach()
    return (gates > 0, 2) if gates.shape[-1] == 4 else (mask, 1)
