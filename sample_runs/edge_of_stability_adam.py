"""Edge of stability under Adam: what settles, at 38/η, is the sharpness of the loss as Adam scales it.

    python sample_runs/edge_of_stability_adam.py [RUN_DIR]

Adam divides each coordinate by the size of its gradients, so the plain sharpness says nothing about its stability: it
falls from 30 to 27 here, while that of the preconditioned Hessian climbs to 38 / 0.001 = 38,000, the most that is
stable at β₁ = 0.9, in some 1,500 steps and stays within a tenth of it (metrics `preconditioned_sharpness` and
`edge_of_stability`).
"""

from __future__ import annotations

import sys
from functools import partial

from edge_of_stability import main
from torch.optim import Adam

if __name__ == "__main__":
    adam = partial(Adam, lr=1e-3, eps=1e-7)
    main(sys.argv[1] if len(sys.argv) > 1 else None, steps=3000, optimizer_of=adam, every=60)
