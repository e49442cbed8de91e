"""Two processes that do not record the same models: what one records alone must not take the place of what both do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

import monitor
from monitor.record.part import next_recording
from tests.warm import ROOT, Warm

#: The first process records a critic of its own before the sharded model that both have parts of, and another after it.
SCRIPT = """
import os, sys, torch, torch.distributed as dist
from torch import nn
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(os.environ["RANK"]), world_size=2)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import monitor
mesh = init_device_mesh("cpu", (2,))
first = dist.get_rank() == 0
torch.manual_seed(0)

def sharded(width):
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model

folders = sys.argv[1]
models = {"small": sharded(8), "large": sharded(12)}
critic = nn.Linear(3, 1)
handles = [monitor.attach(critic, folders + "/critic")] if first else []
order = ["small", "large"] if first else ["large", "small"]  # told apart by what they are, not by when they came
handles += [monitor.attach(models[name], folders + "/" + name) for name in order]
optimizers = {name: torch.optim.SGD(m.parameters(), lr=0.1) for name, m in models.items()}
for step in range(5):
    for name, model in models.items():
        optimizers[name].zero_grad()
        model(torch.ones(4, 6) * (step + 1)).square().mean().backward()
        grad = model[0].weight.grad.full_tensor()
        if first:
            print(name, step, grad.norm().item(), flush=True)
        optimizers[name].step()
for handle in handles:
    handle.close()
dist.barrier()
os._exit(0)
"""


def test_each_is_joined_with_its_own(tmp_path: Path) -> None:
    """Oracle: closed form. Norms of sharded gradients are those of the whole ones, as the loop has them."""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"WORLD_SIZE": "2"}
    meeting = f"file://{tmp_path / 'meeting'}"
    processes = [Warm([script, tmp_path, meeting], ROOT, environment | {"RANK": str(r)}) for r in range(2)]
    said = []
    for p in processes:
        out, err = p.communicate(timeout=120)
        assert p.returncode == 0, err
        said += [line.split() for line in out.splitlines() if line.startswith(("small", "large"))]
    for name in ("small", "large"):
        expected = [float(norm) for who, _, norm in said if who == name]
        run = monitor.open(tmp_path / name)
        assert run.series("grad_norm.norm", "0.weight")[1] == pytest.approx(expected, rel=1e-5)
        assert len(expected) == 5


def test_names_of_recordings() -> None:
    """Oracle: definition. Other shapes or names are another model; the same again is another recording of it."""
    models = [nn.Linear(2, 3), nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 3)), nn.Linear(2, 3)]
    names = [next_recording([m]) for m in models]
    kinds, numbers = zip(*(name.split("/")[1:] for name in names), strict=True)
    assert len(set(names)) == 4
    assert len(set(kinds)) == 3
    assert kinds[0] == kinds[3]
    assert int(numbers[3]) == int(numbers[0]) + 1
