"""Trainings in every style that can trip an observer. Each returns everything that must not change."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: Called with the model once, before the first step or at the step a training chooses; does nothing in the control.
Watch = Callable[[nn.Module], object]


class Digest:
    """A hash of bits: equal only if every parameter, state, loss and generator is."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, value: Any) -> None:
        """Add a tensor, a number, or a structure of them."""
        if isinstance(value, Tensor):
            value = value.detach().contiguous().view(-1)
            self._hash.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"empty")
        elif isinstance(value, dict):
            for k in sorted(value, key=str):
                self._hash.update(str(k).encode())
                self.add(value[k])
        elif isinstance(value, list | tuple):
            for v in value:
                self.add(v)
        else:
            self._hash.update(repr(value).encode())

    def finish(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> str:
        """The digest, with parameters, buffers, optimizer states and all random generators."""
        self.add(dict(model.state_dict()))
        for o in optimizers:
            self.add(o.state_dict()["state"])
        self.add(torch.get_rng_state())
        self.add(dict(np.random.get_state(legacy=False))["state"]["key"].tolist())
        self.add(random.getstate())
        return self._hash.hexdigest()


def seed() -> None:
    """The same beginning for every training."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def batches(n: int, rows: int = 16, features: int = 12, classes: int = 5) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches from the global generator, so that a stolen draw shows."""
    for _ in range(n):
        yield torch.randn(rows, features), torch.randint(0, classes, (rows,))


def mlp(inplace: bool = False) -> nn.Sequential:
    """A small classifier with dropout, which draws from the global generator."""
    return nn.Sequential(
        nn.Linear(12, 32), nn.ReLU(inplace=inplace), nn.Dropout(0.1), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5)
    )


def _loop(model: nn.Module, watch: Watch, clip: float = 0.0, steps: int = 30) -> str:
    digest = Digest()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch(model)
    for x, y in batches(steps):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        digest.add(loss)
    return digest.finish(model, opt)


def plain(watch: Watch) -> str:
    """AdamW and nothing else."""
    seed()
    return _loop(mlp(), watch)


def clipping(watch: Watch) -> str:
    """Gradient norms clipped every step."""
    seed()
    return _loop(mlp(), watch, clip=0.3)


def in_place(watch: Watch) -> str:
    """In-place activations."""
    seed()
    return _loop(mlp(inplace=True), watch)


def accumulation(watch: Watch) -> str:
    """Four micro-batches a step."""
    seed()
    model, digest = mlp(), Digest()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch(model)
    for i, (x, y) in enumerate(batches(40)):
        loss = F.cross_entropy(model(x), y) / 4
        loss.backward()
        digest.add(loss)
        if i % 4 == 3:
            opt.step()
            opt.zero_grad()
    return digest.finish(model, opt)


def scaler(watch: Watch) -> str:
    """float16 autocast with a GradScaler that overflows at first."""
    seed()
    model, digest = mlp(), Digest()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=5)
    watch(model)
    for x, y in batches(30):
        opt.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x), y)
        grad_scaler.scale(loss).backward()
        grad_scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        grad_scaler.step(opt)
        grad_scaler.update()
        digest.add(loss)
        digest.add(grad_scaler.get_scale())
    return digest.finish(model, opt)


def autocast(watch: Watch) -> str:
    """bfloat16 autocast."""
    seed()
    model, digest = mlp(), Digest()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch(model)
    for x, y in batches(30):
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        digest.add(loss)
    return digest.finish(model, opt)


def autocast_around_the_loop(watch: Watch) -> str:
    """bfloat16 autocast that is never left: the model goes on with copies of its first parameters."""
    with torch.autocast("cpu", torch.bfloat16):
        return plain(watch)


def narrow(watch: Watch) -> str:
    """bfloat16 parameters that the optimizer itself updates."""
    seed()
    model, digest = mlp().bfloat16(), Digest()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
    watch(model)
    for x, y in batches(120):
        opt.zero_grad()
        loss = F.cross_entropy(model(x.bfloat16()).float(), y)
        loss.backward()
        opt.step()
        digest.add(loss)
    return digest.finish(model, opt)


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1)) for _ in range(3))
        self.head = nn.Linear(32, 5)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for b in self.blocks:
            x = checkpoint(b, x, use_reentrant=self.reentrant)  # pyright: ignore[reportAssignmentType]
        return self.head(x)


def checkpointing(watch: Watch) -> str:
    """Activation checkpointing, non-reentrant."""
    seed()
    return _loop(_Checkpointed(reentrant=False), watch)


def checkpointing_reentrant(watch: Watch) -> str:
    """Activation checkpointing, reentrant."""
    seed()
    return _loop(_Checkpointed(reentrant=True), watch)


def lbfgs(watch: Watch) -> str:
    """A closure that is evaluated many times a step."""
    seed()
    model, digest = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)), Digest()
    opt = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    watch(model)
    for x, y in batches(6):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        digest.add(opt.step(closure))
    return digest.finish(model, opt)


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))
        self.critic = nn.Sequential(nn.Linear(12, 16), nn.LeakyReLU(0.2, inplace=True), nn.Linear(16, 1))


def two_optimizers(watch: Watch) -> str:
    """A small GAN: two optimizers in turn, and a root module that is never called."""
    seed()
    model, digest = _Pair(), Digest()
    g = torch.optim.Adam(model.generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    d = torch.optim.Adam(model.critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
    watch(model)
    for x, _ in batches(30):
        z = torch.randn(16, 4)
        d.zero_grad()
        real = F.softplus(-model.critic(x)).mean()
        fake = F.softplus(model.critic(model.generator(z).detach())).mean()
        (real + fake).backward()
        d.step()
        g.zero_grad()
        loss = F.softplus(-model.critic(model.generator(z))).mean()
        loss.backward()
        g.step()
        digest.add((real, fake, loss))
    return digest.finish(model, g, d)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


def padded_encoder(watch: Watch) -> str:
    """A padded nn.TransformerEncoder whose validation loss steers the learning rate."""
    seed()
    model, digest = _Encoder(), Digest()
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.7)
    mask = torch.zeros(8, 10, dtype=torch.bool)
    mask[:, 7:] = True
    xv, yv = torch.randn(8, 10, 16), torch.randint(0, 3, (8,))
    watch(model)
    for _ in range(12):
        model.train()
        for _ in range(2):
            opt.zero_grad()
            loss = F.cross_entropy(model(torch.randn(8, 10, 16), mask), torch.randint(0, 3, (8,)))
            loss.backward()
            opt.step()
            digest.add(loss)
        model.eval()
        with torch.no_grad():
            out = model(xv, mask)
            through_child = model.encoder(xv, src_key_padding_mask=mask)
            val = F.cross_entropy(out, yv)
        digest.add((out, through_child, val))
        plateau.step(val)
        digest.add(opt.param_groups[0]["lr"])
    return digest.finish(model, opt)


def workers(watch: Watch) -> str:
    """Batches from forked DataLoader workers."""
    from torch.utils.data import DataLoader, TensorDataset

    seed()
    data = TensorDataset(torch.randn(64, 12), torch.randint(0, 5, (64,)))
    model, digest = mlp(), Digest()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watch(model)
    for _ in range(2):
        for x, y in DataLoader(data, batch_size=16, shuffle=True, num_workers=2):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            digest.add(loss)
    return digest.finish(model, opt)


def eval_mode(watch: Watch) -> str:
    """Fine-tuning with the model in eval(), and an evaluation that forgot no_grad."""
    seed()
    model, digest = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)).eval(), Digest()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    watch(model)
    for x, y in batches(20):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        digest.add((loss, model(x)))
    return digest.finish(model, opt)


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(12, 16), nn.Linear(16, 8, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1)) for _ in range(8))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, place = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
        return self.head(out)


def experts(watch: Watch) -> str:
    """A mixture of experts that routes two of eight by top-k."""
    seed()
    return _loop(_Experts(), watch)


class _Attentive(nn.Module):
    """Fused attention, the same checkpointed, and `nn.MultiheadAttention`, with dropout in all three."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.again = nn.Linear(12, 16), nn.Linear(16, 48), nn.Linear(16, 48)
        self.multi = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 5)

    def _attend(self, x: Tensor, projection: nn.Linear, dropout: float) -> Tensor:
        q, k, v = projection(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(0, (4, 4))
        x = x + self._attend(x, self.qkv, 0.0)
        inner = checkpoint(self._attend, x, self.again, 0.1, use_reentrant=False)
        x = x + inner  # pyright: ignore[reportOperatorIssue]
        x = x + self.multi(x, x, x, need_weights=False)[0]
        return self.head(x.flatten(0, 1))


def attention(watch: Watch) -> str:
    """Attention of every kind."""
    seed()
    return _loop(_Attentive(), watch)


ALL: tuple[Callable[[Watch], str], ...] = (
    plain, clipping, in_place, accumulation, scaler, autocast, autocast_around_the_loop, narrow, checkpointing,
    checkpointing_reentrant, lbfgs, two_optimizers, padded_encoder, workers, eval_mode, experts, attention,
)  # fmt: skip
