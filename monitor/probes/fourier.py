"""What of a network for addition modulo p stands on its key frequencies, and what does not.

Its logits on the whole grid of pairs (a, b) are split by frequency: the component of frequency w is their projection on
cos(2πw(a+b)/p) and sin(2πw(a+b)/p). Key frequencies are those whose component holds more than 2 % of the energy of the
logits (without what is common to a row, and without the mean over pairs). Then

    restricted loss = cross-entropy of the key components alone, with the mean over pairs put back, on held-out pairs
    excluded loss   = cross-entropy of the logits without the key components, on training pairs

A falling restricted loss under a flat test loss, and an excluded loss that rises from the training loss, show the
generalising circuit while nothing else does yet.

Source: Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability (arXiv 2301.05217),
sec. 5.1; choice of the key frequencies by energy ours, because it needs no particular architecture.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from monitor.errors import UsageError
from monitor.probes._model import outputs
from monitor.record.probe import Moment, Probe

STATS = ("restricted", "excluded", "excluded_one", "train", "test", "keys", "key_share")
#: Least share of the energy of a key frequency.
KEY = 0.02


class FourierLosses(Probe):
    """Measures ``restricted_loss`` of a network that adds (or subtracts, …) two numbers modulo p.

    Args:
        inputs: the model's inputs for all p² pairs, row a·p + b for the pair (a, b).
        labels: ``(p²,)`` int64, right answers.
        train: ``(p²,)`` bool, pairs that are trained on; the others are held out.
        modulus: p.
        every: measure at each so many steps. Default: as often as 1 % of the run's time allows.

    Raises:
        UsageError: if the shapes do not fit.

    The energies of all frequencies are stored as the table ``fourier`` (frequency, share).

    Example:
        monitor.attach(model, probes=[FourierLosses(pairs, (a + b) % 113, in_training, 113, every=100)])
    """

    name = "restricted_loss"

    def __init__(self, inputs: Tensor, labels: Tensor, train: Tensor, modulus: int, every: int | None = None) -> None:
        for what, given in (("inputs", inputs), ("labels", labels), ("train", train)):
            if len(given) != modulus**2:
                raise UsageError(f"{what} has {len(given)} rows, expected one for each of the {modulus}² pairs")
        if train.dtype != torch.bool or bool(train.all()) or not bool(train.any()):
            raise UsageError(f"train is {train.dtype}, expected a mask that takes some pairs and leaves some")
        self.inputs, self.labels, self.train = inputs.detach().clone(), labels.cpu().clone(), train.cpu().clone()
        self.modulus = modulus
        self.every = every

    def measure(self, moment: Moment) -> None:
        """One forward of the grid, and its split by frequency."""
        with moment.evaluation():
            logits = outputs(moment.model, self.inputs)
        found = fourier_losses(logits, self.labels, self.train, self.modulus)
        moment.emit("fourier", STATS, "", found.stats)
        frequency = np.arange(1, len(found.shares) + 1, dtype=np.int32)
        moment.table("fourier", {"frequency": frequency, "share": found.shares.float().cpu().numpy()})


class FourierSplit(NamedTuple):
    """`STATS` in order, and the share of the energy of frequencies 1 to p // 2."""

    stats: tuple[float, ...]
    shares: Tensor


def fourier_losses(logits: Tensor, labels: Tensor, train: Tensor, p: int) -> FourierSplit:
    """Losses of the parts on and off the key frequencies.

    Args:
        logits: ``(p², class)``, row a·p + b.
        labels: ``(p²,)`` int64.
        train: ``(p²,)`` bool.
        p: the modulus, odd.

    Returns:
        Losses in nats, float64 throughout: a float32 log-softmax ends near 1e-7. ``excluded_one`` takes away one key
        frequency at a time and is the largest of these losses (the authors' code has the list).

    Cost: p³ for the projections; memory of a few times the logits.
    """
    z = logits.double()
    z = z - z.mean(dim=1, keepdim=True)  # what the softmax does not see
    residues = (torch.arange(p)[:, None] + torch.arange(p)).remainder(p).flatten()
    # a component depends on a + b alone, so means over pairs with equal sums say all
    sums = torch.zeros(p, z.shape[1], dtype=torch.float64).index_add_(0, residues, z) / p
    component = _components(sums, p)
    energy = p * component.square().sum(dim=(1, 2))
    shares = energy / (z - z.mean(dim=0)).square().sum()
    keys = shares > KEY
    kept = component[keys].sum(dim=0)[residues]
    rest = z - kept
    restricted = kept + rest.mean(dim=0)

    def loss(of: Tensor, rows: Tensor) -> float:
        return F.cross_entropy(of[rows], labels[rows]).item()

    one = max((loss(z - c[residues], train) for c in component[keys]), default=loss(z, train))
    stats = (
        loss(restricted, ~train), loss(rest, train), one, loss(z, train), loss(z, ~train), float(keys.sum()),
        shares[keys].sum().item(),
    )  # fmt: skip
    return FourierSplit(stats, shares)


def _components(sums: Tensor, p: int) -> Tensor:
    """``(frequency, residue, class)``: what each frequency from 1 to p // 2 contributes."""
    frequency = torch.arange(1, p // 2 + 1, dtype=torch.float64)
    angle = 2 * math.pi / p * frequency[:, None] * torch.arange(p, dtype=torch.float64)
    parts = ((wave, 2 / p * wave @ sums) for wave in (angle.cos(), angle.sin()))
    return sum((wave[:, :, None] * at[:, None, :] for wave, at in parts), start=torch.zeros(()))
