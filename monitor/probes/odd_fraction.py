"""How linear the function is that the network computes: what of it is odd, and what a linear map explains.

A linear map of centred inputs is odd: f(-x) = -f(x). On the inputs x_i and their mirror images -x_i together,
f = f_odd + f_even with f_odd(x) = (f(x) - f(-x)) / 2, and the two parts are exactly uncorrelated, so

    omega = E[f_odd^2] / (E[f_odd^2] + Var[f_even])

lies in [0, 1]: 1 for a linear map (with or without a constant), 0 for an even function such as that of XOR clusters.

Source: definition, after the phases of Xu et al. (2023), Benign Overfitting and Grokking in ReLU Networks for XOR
Cluster Data: the network is at first a linear classifier that has memorised, and becomes an even function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monitor.errors import UsageError
from monitor.probes._model import outputs
from monitor.record.probe import Moment, Probe

STATS = ("n", "odd", "even")
FIT_STATS = ("n", "residual", "total")
#: Samples for each coefficient of the linear fit, without which it is not made.
_SAMPLES = 2


class OddFraction(Probe):
    """Measures ``odd_fraction`` on fixed inputs: one forward of them and one of their mirror images.

    Args:
        inputs: ``(sample, …)`` floating point, centred; a few hundred are enough.
        every: measure at each so many steps. Default: as often as 1 % of the run's time allows.

    Raises:
        UsageError: if the inputs are not floating point, or not finite, or fewer than two.

    Example:
        monitor.attach(model, probes=[OddFraction(x[:256], every=500)])
    """

    name = "odd_fraction"

    def __init__(self, inputs: Tensor, every: int | None = None) -> None:
        if not inputs.is_floating_point() or len(inputs) < 2 or not bool(inputs.isfinite().all()):
            raise UsageError(
                f"inputs are {inputs.dtype} of shape {list(inputs.shape)}, expected two or more finite floating ones"
            )
        self.inputs = inputs.detach().clone()
        self.every = every

    def measure(self, moment: Moment) -> None:
        """Both forwards, and where there are enough samples the linear fit."""
        with moment.evaluation():
            f, mirrored = outputs(moment.model, self.inputs), outputs(moment.model, -self.inputs)
        moment.emit("odd_fraction", STATS, "", odd_fraction(f, mirrored))
        if len(f) >= _SAMPLES * (self.inputs[0].numel() + 1):
            moment.emit("linear_fit", FIT_STATS, "", linear_fit(self.inputs, f))


def _centred(f: Tensor) -> Tensor:
    """Without what is common to all values of a sample, which a softmax does not see."""
    f = f.double()
    return f - f.mean(dim=1, keepdim=True) if f.shape[1] > 1 else f


def odd_fraction(f: Tensor, mirrored: Tensor) -> Sequence[float]:
    """`STATS`: samples, mean square of the odd part, variance of the even part.

    Args:
        f: ``(sample, value)`` answers.
        mirrored: ``(sample, value)`` answers to the mirror images.

    Returns:
        Sums over values; float64.
    """
    a, b = _centred(f), _centred(mirrored)
    odd, even = (a - b) / 2, (a + b) / 2
    return len(f), odd.square().mean(dim=0).sum().item(), even.var(dim=0, unbiased=False).sum().item()


def linear_fit(x: Tensor, f: Tensor) -> Sequence[float]:
    """`FIT_STATS`: samples, unbiased residual variance of the least-squares map ``[x, 1] -> f``, and variance of ``f``.

    Args:
        x: ``(sample, …)`` inputs.
        f: ``(sample, value)`` answers; more samples than inputs.

    Returns:
        Sums over values; float64.
    """
    f = _centred(f)
    design = torch.cat([x.reshape(len(x), -1).cpu().double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    rest = f - design @ torch.linalg.lstsq(design, f, driver="gelsd").solution
    free = len(x) - int(torch.linalg.matrix_rank(design))
    return len(x), rest.square().sum().item() / free, f.var(dim=0).sum().item()
