"""A transformer at too high a learning rate: attention logits grow past 10,000, and the loss just stays bad.

    python sample_runs/attention_growth.py [RUN_DIR] [--lr 0.1] [--qk-norm]

Two blocks of two heads learn Markov text whose second half repeats the first, for 300 steps. At a learning rate of 0.1
queries and keys become so long that the rows of attention are one-hot; nothing becomes NaN, so the loss alone does not
say what is wrong. The cure, one line, is in attention_growth_qknorm.py; from 0.0003 to 0.3 the learning rate may be
chosen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.remedies import QKNorm

VOCABULARY, WIDTH, HEADS, LENGTH, BATCH, STEPS = 64, 64, 2, 48, 16, 300


class Block(nn.Module):
    """A pre-norm block of causal attention and a perceptron."""

    def __init__(self, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qk_norm = QKNorm(WIDTH // HEADS) if qk_norm else None
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, token, width)`` to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Language(nn.Module):
    """A language model of two blocks with learned places."""

    def __init__(self, qk_norm: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(qk_norm), Block(qk_norm))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, token)`` to ``(batch, token, vocabulary)``."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def text(seed: int = 0) -> Callable[[], Tensor]:
    """Batches ``(BATCH, LENGTH + 1)`` of text that repeats itself after half its length."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.softmax(2.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator), dim=1)

    def batch() -> Tensor:
        tokens = [torch.randint(VOCABULARY, (BATCH,), generator=generator)]
        while len(tokens) < LENGTH // 2:
            tokens.append(torch.multinomial(follows[tokens[-1]], 1, generator=generator)[:, 0])
        return torch.stack([*tokens, *tokens, tokens[0]], dim=1)

    return batch


def planned(step: int, lr: float) -> float:
    """The learning rate: linear warm-up over the first twentieth, then half a cosine down to 1e-5."""
    warm = STEPS // 20
    if step < warm:
        return lr * (step + 1) / warm
    return 1e-5 + (lr - 1e-5) * (1 + math.cos(math.pi * (step - warm) / (STEPS - warm))) / 2


def train(
    observe: Callable[[nn.Module], object], lr: float = 0.1, qk_norm: bool = False, steps: int = STEPS, seed: int = 0
) -> list[float]:
    """Train and return the losses. ``steps`` may be fewer than `STEPS`, for which the learning rate is planned."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    batch, model = text(seed), Language(qk_norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0)
    observe(model)
    losses = []
    for step in range(steps):
        tokens = batch()
        for group in optimizer.param_groups:
            group["lr"] = planned(step, lr)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(run_dir: str | None = None, lr: float = 0.1, qk_norm: bool = False) -> None:
    train(lambda model: monitor.attach(model, run_dir), lr, qk_norm)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", nargs="?")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--qk-norm", action="store_true")
    given = parser.parse_args()
    main(given.run_dir, given.lr, given.qk_norm)
