"""Edge of stability with momentum 0.9: the same training settles at 3.8 / 0.1 = 38 instead of 20.

    python sample_runs/edge_of_stability_momentum.py [RUN_DIR]

Momentum holds almost twice the curvature: (2 + 2 · 0.9) / 0.1 = 38. The sharpness comes to 36 within 800 steps and
stays just below 38. That it gets so far is no law: on the first 256 digits, and from other weights, the same training
ended at sharpnesses of 19 to 26 (measured), because the data were fitted before.
"""

from __future__ import annotations

import sys
from functools import partial

from edge_of_stability import main
from torch.optim import SGD

if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, optimizer_of=partial(SGD, lr=0.1, momentum=0.9))
