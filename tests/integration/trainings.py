"""Small healthy trainings of different architectures: a monitor must not disturb them nor cry wolf.

Each function seeds itself, builds everything, calls ``observe(model)`` once before the loop, as a user would call
``monitor.attach``, and trains for a few hundred steps in about a second. Run one with ``observe=lambda model: None``
for the same training unobserved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

Observe = Callable[[nn.Module], object]


@dataclass
class Trained:
    """What a training leaves behind; equal bit for bit whether it was observed or not."""

    model: nn.Module
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)


def digits(batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of scikit-learn's digits, ``(sample, 1, 8, 8)`` in [0, 1] and classes, over and over."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels))
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def markov_text(samples: int, length: int, vocabulary: int = 32) -> Tensor:
    """``(sample, position)`` int64 tokens, each drawn from a fixed distribution given the one before."""
    transitions = torch.softmax(2.5 * torch.randn(vocabulary, vocabulary), dim=1)
    tokens = [torch.randint(0, vocabulary, (samples,))]
    for _ in range(length - 1):
        tokens.append(torch.multinomial(transitions[tokens[-1]], 1)[:, 0])
    return torch.stack(tokens, dim=1)


def update(trained: Trained, loss: Tensor, clip: float | None = None) -> None:
    """One optimizer update."""
    trained.optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(trained.model.parameters(), clip)
    trained.optimizer.step()
    trained.losses.append(loss.item())


def mlp_regression(observe: Observe) -> Trained:
    """A smooth function of eight numbers, Adam, mean squared error."""
    torch.manual_seed(0)
    x = torch.randn(1024, 8)
    y = torch.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    trained = Trained(model, torch.optim.Adam(model.parameters(), lr=3e-3))
    observe(model)
    for _ in range(300):
        batch = torch.randint(0, len(x), (128,))
        update(trained, mse_loss(model(x[batch]), y[batch]))
    return trained


def digits_cnn(observe: Observe) -> Trained:
    """A convolutional classifier with dropout, SGD with momentum and a cosine schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(512, 10),
    )
    trained = Trained(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(trained.optimizer, 250)
    observe(model)
    for _, (x, y) in zip(range(250), digits(), strict=False):
        update(trained, cross_entropy(model(x), y))
        schedule.step()
    return trained


class Tagger(nn.Module):
    """Next-token prediction by a recurrent network."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 32)
        self.cell = cell(32, 64, batch_first=True)
        self.head = nn.Linear(64, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.cell(self.embed(tokens))
        return self.head(states)


def lstm_text(observe: Observe) -> Trained:
    """An LSTM on Markov text, Adam, gradients clipped to norm 1."""
    torch.manual_seed(0)
    text = markov_text(256, 25)
    model = Tagger(nn.LSTM)
    trained = Trained(model, torch.optim.Adam(model.parameters(), lr=3e-3))
    observe(model)
    for _ in range(200):
        batch = text[torch.randint(0, len(text), (16,))]
        update(trained, cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:]), clip=1.0)
    return trained


def gru_text(observe: Observe) -> Trained:
    """A GRU on Markov text, RMSprop, every fourth position padded out of the loss."""
    torch.manual_seed(0)
    text = markov_text(256, 25)
    model = Tagger(nn.GRU)
    trained = Trained(model, torch.optim.RMSprop(model.parameters(), lr=3e-3))
    observe(model)
    for _ in range(200):
        batch = text[torch.randint(0, len(text), (16,))]
        target = batch[:, 1:].clone()
        target[:, ::4] = -100
        update(trained, cross_entropy(model(batch[:, :-1]).flatten(0, 1), target.flatten()))
    return trained


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TinyLM(nn.Module):
    """A language model with learned positions and tied embeddings."""

    def __init__(self, vocabulary: int = 32, length: int = 32, width: int = 48) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def transformer_lm(observe: Observe) -> Trained:
    """A two-block transformer on Markov text, AdamW with warm-up, weight decay and clipping."""
    torch.manual_seed(0)
    text = markov_text(256, 25)
    model = TinyLM()
    trained = Trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1))
    warm_up = torch.optim.lr_scheduler.LambdaLR(trained.optimizer, lambda step: min(1.0, (step + 1) / 20))
    observe(model)
    for _ in range(200):
        batch = text[torch.randint(0, len(text), (16,))]
        update(trained, cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()), clip=1.0)
        warm_up.step()
    return trained


def autoencoder(observe: Observe) -> Trained:
    """A bottleneck of eight numbers, AdamW; no classes anywhere."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
    model = nn.Sequential(encoder, decoder)
    trained = Trained(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    observe(model)
    for _, (x, _) in zip(range(300), digits(), strict=False):
        update(trained, mse_loss(model(x), x.flatten(1)))
    return trained


class Residual(nn.Module):
    """Two normalised convolutions around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def resnet(observe: Observe) -> Trained:
    """A residual network with batch normalisation, SGD with momentum and weight decay, two micro-batches a step."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        Residual(12),
        Residual(12),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
    )
    trained = Trained(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4))
    observe(model)
    batches = digits(32)
    for _ in range(200):
        trained.optimizer.zero_grad()
        losses = []
        for _ in range(2):
            x, y = next(batches)
            losses.append(cross_entropy(model(x), y) / 2)
            losses[-1].backward()
        trained.optimizer.step()
        trained.losses.append(sum(loss.item() for loss in losses))
    return trained


class MixtureOfExperts(nn.Module):
    """Four expert networks of which each sample uses the best two, with the usual load-balancing term."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.router = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(4))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        share = torch.softmax(self.router(x), dim=-1)
        weight, chosen = share.topk(2, dim=-1)
        mixed = x
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            mixed = mixed.index_add(0, rows, weight[rows, place, None] * expert(x[rows]))
        used = nn.functional.one_hot(chosen, 4).sum(1).float().mean(0) / 2
        return self.head(mixed), 4 * (used * share.mean(0)).sum()


def mixture_of_experts(observe: Observe) -> Trained:
    """Routed experts on digits, AdamW, a loss of two terms."""
    torch.manual_seed(0)
    model = MixtureOfExperts()
    trained = Trained(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
    observe(model)
    for _, (x, y) in zip(range(300), digits(), strict=False):
        logits, balance = model(x)
        update(trained, cross_entropy(logits, y) + 0.01 * balance)
    return trained


TRAININGS: dict[str, Callable[[Observe], Trained]] = {
    f.__name__: f
    for f in (
        mlp_regression,
        digits_cnn,
        lstm_text,
        gru_text,
        transformer_lm,
        autoencoder,
        resnet,
        mixture_of_experts,
    )
}
