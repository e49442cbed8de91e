"""The mixture of moe_digits on labels that were shuffled: nothing can be generalised, everything is memorised.

    python sample_runs/moe_digits_random_labels.py [RUN_DIR]

The test accuracy stays that of guessing, and the pathways become smoother through depth all the same: the control
against which those of moe_digits have to be read.
"""

from __future__ import annotations

import sys

from moe_digits import main

if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, random_labels=True)
