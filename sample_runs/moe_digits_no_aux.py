"""The digits of moe_digits with neither a balancing term nor a z-loss on the routers.

    python sample_runs/moe_digits_no_aux.py [RUN_DIR]

The test accuracy is the same, but the pathways hardly become smoother: what moves them in moe_digits is the terms on
the routers, and not generalisation.
"""

from __future__ import annotations

import sys

from moe_digits import main

if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, aux=False)
