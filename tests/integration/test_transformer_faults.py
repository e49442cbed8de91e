"""Faults of a small transformer: a residual stream that explodes, a model that becomes too sure of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor

VOCABULARY, LENGTH, WIDTH, HEADS = 64, 48, 64, 2


class Block(nn.Module):
    """A pre-norm block with queries and keys normalised per head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.norm_q, self.norm_k = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """Two blocks, learned positions, an untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for e in (self.tokens, self.places):
            nn.init.normal_(e.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Text:
    """Order-1 Markov text whose second half repeats the first."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.next = torch.softmax(2.5 * torch.randn(VOCABULARY, VOCABULARY, generator=self.random), 1)

    def batch(self, rows: int) -> Tensor:
        """``(row, LENGTH + 1)`` int64."""
        ids = [torch.randint(0, VOCABULARY, (rows,), generator=self.random)]
        for _ in range(LENGTH // 2 - 1):
            ids.append(torch.multinomial(self.next[ids[-1]], 1, generator=self.random)[:, 0])
        half = torch.stack(ids, 1)
        return torch.cat((half, half, half[:, :1]), 1)


def logits_and_targets(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    return model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()


def train(rate: float, steps: int, folder: Path) -> monitor.Run:
    torch.manual_seed(0)
    model, text = Language(), Text()
    opt = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0)
    with monitor.attach(model, folder):
        for step in range(steps):
            opt.param_groups[0]["lr"] = rate * min(1, (step + 1) / 15)
            opt.zero_grad()
            F.cross_entropy(*logits_and_targets(model, text.batch(8))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
    return monitor.open(folder)


def test_the_stream_explodes_at_thirty_times_the_best_learning_rate(tmp_path: Path) -> None:
    """Oracle: planted fault. Both blocks are found within 60 steps at 0.3; at 0.01 nothing is."""
    found = {f.module: f for f in train(0.3, 60, tmp_path / "fault").findings() if f.rule == "residual_explosion"}
    assert set(found) == {"blocks.0", "blocks.1"}
    assert all(f.first_step <= 25 for f in found.values())
    healthy = train(0.01, 60, tmp_path / "healthy")
    assert "residual_explosion" not in {f.rule for f in healthy.findings()}
    assert healthy.series("residual_stream.rms", "blocks.1")[1].max() < 50


@pytest.mark.slow
@pytest.mark.parametrize("logs_entropy", [True, False])
def test_hyperfitting(logs_entropy: bool, tmp_path: Path) -> None:
    """Oracle: golden. 500 steps on fresh text, then 200 on the same 16 sequences.

    The held-out cross-entropy goes 1.01 → 1.14 (20) → 1.38 (50) → 1.78 (100) and the entropy 1.03 → 0.98 → 0.85 → 0.60.
    The entropy of the rows trained on falls first.
    """
    torch.manual_seed(0)
    model, text = Language(), Text()
    held_out, few = text.batch(64), text.batch(16)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    curve: dict[int, tuple[float, float]] = {}
    with monitor.attach(model, tmp_path / "run") as handle:
        for step in range(700):
            if step % 10 == 0:
                with torch.no_grad():
                    z, y = logits_and_targets(model, held_out)
                    loss, entropy = F.cross_entropy(z, y).item(), torch.distributions.Categorical(logits=z).entropy()
                    curve[step] = (loss, entropy.mean().item())
                handle.log(val_loss=loss)
                if logs_entropy:
                    handle.log(val_entropy=curve[step][1])
            if step == 500:
                opt.param_groups[0]["lr"] = 1e-3
            opt.zero_grad()
            F.cross_entropy(*logits_and_targets(model, few if step >= 500 else text.batch(16))).backward()
            opt.step()
    best, last = curve[500], curve[690]
    assert best == pytest.approx((1.012, 1.030), abs=0.05)
    assert last[0] > 1.5 * best[0] and last[1] < 0.5 * best[1]
    run = monitor.open(tmp_path / "run")
    (found,) = [f for f in run.findings() if f.rule == "hyperfitting"]
    assert (found.module, found.severity) == ("val_loss", "info")
    assert found.evidence["on_evaluation"] == logs_entropy
    assert 510 <= found.first_step <= (680 if logs_entropy else 600)
