"""The cure of attention_growth.py: the same transformer and learning rate, with queries and keys normalised per head.

    python sample_runs/attention_growth_qknorm.py [RUN_DIR]

One line of the model is different, `monitor.remedies.QKNorm`. Attention logits end near 25 instead of 13,000 and the
loss at 2.25 instead of 2.55; a learning rate of 0.1 is still far too high for the rest of the model.
"""

from __future__ import annotations

import sys

from attention_growth import main

if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, qk_norm=True)
