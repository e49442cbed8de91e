"""Tables that probes and notes write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import monitor

TRAINING = """
import sys, torch, monitor
from monitor.probes import Memorisation
from torch.nn import functional as F

model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.rand(8, 4), torch.arange(8) % 3
with monitor.attach(model, sys.argv[1], probes=[Memorisation(every=1)]) as run:
    for step in range(5):
        run.note(f"batch {step}")
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
assert "pyarrow" in sys.modules and "pandas" not in sys.modules
"""


def test_they_import_no_pandas_into_a_training(tmp_path: Path) -> None:
    """Oracle: definition. pyarrow imports it, in a third of a second, to make an array of one of numpy's."""
    subprocess.run([sys.executable, "-c", TRAINING, str(tmp_path / "run")], check=True, cwd=tmp_path)
    names = {name for name, _, _ in monitor.open(tmp_path / "run").tables()}
    assert names == {"memorisation", "notes"}
