"""Double descent: a run for each width, and the worst is the one that is just wide enough to fit its examples.

    python sample_runs/double_descent.py [FOLDER]
    monitor compare sample_runs/double_descent --show jacobian_spectrum.condition

100 examples of a noisy linear teacher; the readout of 50 to 300 random ReLU features is fitted to the end. The loss on
other data and the condition number of the gradients both peak at 100 features: there one direction in which the
features hardly vary has to be fitted all the same, and takes large weights that mean nothing for other data. Narrower,
it cannot be fitted; wider, there are better ones to do it with. After the first step there is no peak yet.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import monitor
from monitor.probes import JacobianSpectrum

WIDTHS = (50, 75, 90, 100, 110, 150, 300)
EXAMPLES, INPUTS = 100, 20


def main(folder: str | None = None, steps: int = 32, seed: int = 0) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    x, teacher = torch.randn(1100, INPUTS, generator=generator).double(), torch.randn(INPUTS, 1, generator=generator)
    y = x @ teacher.double() / INPUTS**0.5 + 0.5 * torch.randn(1100, 1, generator=generator).double()
    train, held_out = (x[:EXAMPLES], y[:EXAMPLES]), (x[EXAMPLES:], y[EXAMPLES:])

    for width in WIDTHS:
        torch.manual_seed(seed)
        features, readout = nn.Linear(INPUTS, width, bias=False), nn.Linear(width, 1, bias=False)
        nn.init.normal_(features.requires_grad_(False).weight, std=INPUTS**-0.5)
        nn.init.zeros_(readout.weight)
        model = nn.Sequential(features, nn.ReLU(), readout).double()
        # of the smallest weights that fit: the only method of torch that gets there at a condition number of 2 million
        optimizer = torch.optim.LBFGS(
            readout.parameters(),
            history_size=width,
            tolerance_grad=0,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = mse_loss(model(train[0]), train[1])  # noqa: B023
            loss.backward()
            return loss

        # of the answers, not of the losses: their gradients are the features, whatever has been learned
        probe = JacobianSpectrum(loss=(lambda answers, _: answers.mean(), train), every=steps)
        where = None if folder is None else Path(folder) / f"width_{width:03d}"
        with monitor.attach(model, where, probes=[probe]) as run:
            for _ in range(steps):
                with torch.no_grad():
                    run.log(test_loss=mse_loss(model(held_out[0]), held_out[1]))
                optimizer.step(closure)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
