"""What the cases share: how one is declared, small data that lie on every machine, and the ordinary training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

SO = "https://stackoverflow.com/questions/"
GITHUB = "https://github.com/"
CHECKER = "TheDeepChecker (doi 10.1145/3529318), "
Loss = Callable[[Tensor, Tensor], Tensor]


class Watch(Protocol):
    """Called with the model before the first step, as a user would call ``monitor.attach``."""

    def __call__(self, model: nn.Module) -> object: ...


Train = Callable[[bool, Watch], None]


@dataclass(frozen=True)
class Case:
    """One fault as it was reported.

    Attributes:
        name: of the function that trains.
        source: address of the report, or the benchmark and its number.
        says: the symptom, in the reporter's words as far as they are known to us.
        causes: names in `judge.CAUSES`, any of which the accepted answer, or the benchmark's patch, gives.
        answer: that answer, and where the reproduction is smaller than the original.
        born: for values that are not finite: what the module or the site of their birth must match to be right.
        train: trains; with True as reported, with False as repaired.
    """

    name: str
    source: str
    says: str
    causes: tuple[str, ...]
    answer: str
    born: str
    train: Train


CASES: dict[str, Case] = {}


def case(source: str, says: str, *causes: str, answer: str, born: str = "") -> Callable[[Train], Train]:
    """Put the function below into the table."""

    def add(train: Train) -> Train:
        name = getattr(train, "__name__", "")
        assert name not in CASES, name
        CASES[name] = Case(name, source, says, causes, answer, born, train)
        return train

    return add


# Data


def _tensors(data: Any) -> tuple[Tensor, Tensor]:
    x, y = data
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """``(1797, 64)`` in [0, 1] and 10 classes."""
    x, y = _tensors(datasets.load_digits(return_X_y=True))
    return x / 16, y


def images(channels: int = 1) -> tuple[Tensor, Tensor]:
    """``(1797, channel, 8, 8)`` in [0, 1] and 10 classes."""
    x, y = digits()
    return x.view(-1, 1, 8, 8).expand(-1, channels, 8, 8).contiguous(), y


@cache
def iris() -> tuple[Tensor, Tensor]:
    """``(150, 4)`` in centimetres and 3 classes, sorted by class."""
    return _tensors(datasets.load_iris(return_X_y=True))


@cache
def wine() -> tuple[Tensor, Tensor]:
    """``(178, 13)`` in units from 0.1 to 1,680, and 3 classes, sorted by class."""
    return _tensors(datasets.load_wine(return_X_y=True))


@cache
def cancer() -> tuple[Tensor, Tensor]:
    """``(569, 30)`` in units from 0.001 to 4,254, and 2 classes."""
    return _tensors(datasets.load_breast_cancer(return_X_y=True))


@cache
def diabetes() -> tuple[Tensor, Tensor]:
    """``(442, 10)`` of mean 0 and ``(442, 1)`` targets from 25 to 346."""
    x, y = _tensors(datasets.load_diabetes(return_X_y=True))
    return x * 20, y[:, None].float()


def scaled(x: Tensor) -> Tensor:
    """Every column with mean 0 and variance 1."""
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-6)


def markov(rows: int, length: int, vocabulary: int = 32) -> Tensor:
    """``(row, length)`` int64, each drawn from a fixed distribution given the one before."""
    following = torch.softmax(2.5 * torch.randn(vocabulary, vocabulary), 1)
    ids = [torch.randint(0, vocabulary, (rows,))]
    for _ in range(length - 1):
        ids.append(torch.multinomial(following[ids[-1]], 1)[:, 0])
    return torch.stack(ids, 1)


def xor() -> tuple[Tensor, Tensor]:
    """The four rows."""
    return torch.tensor([[1.0, 1], [1, 0], [0, 0], [0, 1]]), torch.tensor([[0.0], [1], [0], [1]])


def one_hot(y: Tensor, classes: int = 10) -> Tensor:
    """Float rows with a single 1."""
    return F.one_hot(y, classes).float()


# Models


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU, last: nn.Module | None = None) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers += [act()] * (i > 0) + [nn.Linear(a, b)]
    return nn.Sequential(*layers, *([last] if last else []))


def drawn(model: nn.Module, std: float, also_bias: bool = False) -> nn.Module:
    """Weights from N(0, std²), biases too or 0."""
    for p in model.parameters():
        if p.dim() > 1 or also_bias:
            nn.init.normal_(p, std=std)
        else:
            nn.init.zeros_(p)
    return model


class Causal(nn.Module):
    """A small transformer on tokens.

    Args:
        masked: queries see no later keys.
        norm_first: pre-norm blocks.
    """

    def __init__(
        self, vocabulary: int = 32, width: int = 64, layers: int = 2, masked: bool = True, norm_first: bool = True
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=norm_first)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.masked = masked

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n) if self.masked else None
        return self.head(self.blocks(self.tokens(ids) + self.places.weight[:n], mask=mask, is_causal=self.masked))


# Loops


def batches(*data: Tensor, size: int, steps: int, shuffle: bool = True) -> Iterator[tuple[Tensor, ...]]:
    """Epoch after epoch, so many batches in all."""
    loader = DataLoader(TensorDataset(*data), size, shuffle=shuffle)
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            done += 1
            yield tuple(batch)


def evaluate(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> float:
    """The held-out loss, as it should be measured."""
    model.eval()
    with torch.no_grad():
        value = loss(model(x), y).item()
    model.train()
    return value


def fit(
    watch: Watch,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    loss: Loss,
    optimizer: Optimizer,
    steps: int = 500,
    batch: int = 32,
    held_out: int = 0,
) -> None:
    """The loop of Keras' ``fit``: shuffled batches, zero_grad, backward, step; after each epoch the held-out rows."""
    x, y = data
    if held_out:
        order = torch.randperm(len(x))
        x, y = x[order], y[order]
    n = len(x) - held_out
    watch(model)
    for i, (a, b) in enumerate(batches(x[:n], y[:n], size=batch, steps=steps), 1):
        optimizer.zero_grad()
        loss(model(a), b).backward()
        optimizer.step()
        if held_out and i % -(-n // batch) == 0:
            evaluate(model, x[n:], y[n:], loss)


def adam(model: nn.Module, lr: float = 1e-3) -> Optimizer:
    """Adam on all parameters."""
    return torch.optim.Adam(model.parameters(), lr)


def sgd(model: nn.Module, lr: float, momentum: float = 0.0) -> Optimizer:
    """SGD on all parameters, Nesterov if there is momentum, as in the posts."""
    return torch.optim.SGD(model.parameters(), lr, momentum, nesterov=momentum > 0)
