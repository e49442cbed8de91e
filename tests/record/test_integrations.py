"""Real clients, unmodified: two-process data parallel, Hugging Face Trainer, Accelerate, Lightning where installed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import monitor
from tests.warm import ROOT, Warm, run_warm

DDP = """
import os, sys, hashlib, torch, torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=sys.argv[3], rank=int(os.environ["RANK"]), world_size=2)
rank = dist.get_rank()
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))  # sharded, one process has nothing of it
    def forward(self, x):
        return self.weight * x
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5), Scale())
if sys.argv[1] == "sharded":
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    called = model
else:
    called = DistributedDataParallel(model)
handle = None
if sys.argv[2] != "-" and (rank == 0 or sys.argv[4] != "first"):
    import monitor
    handle = monitor.attach(called, sys.argv[2])
opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
g = torch.Generator().manual_seed(rank)
digest = hashlib.sha256()
for step in range(20):
    if sys.argv[4] == "killed" and step == 17:
        dist.barrier()
        os.kill(os.getpid(), 9)
    x, y = torch.randn(8, 12, generator=g), torch.randint(0, 5, (8,), generator=g)
    opt.zero_grad()
    loss = F.cross_entropy(called(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    opt.step()
    digest.update(loss.detach().numpy().tobytes())
for p in model.parameters():
    p = getattr(p, "_local_tensor", p)
    digest.update(p.detach().numpy().tobytes())
print(f"rank {rank} {digest.hexdigest()}", flush=True)
if handle is not None:
    handle.close()
dist.barrier()
os._exit(0)  # gloo now and then aborts while it is taken down, with or without a recording
"""


TWO = {"WORLD_SIZE": "2"}
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}


def two_processes(tmp_path: Path, kind: str, run: str, attached: str = "all") -> list[str]:
    """Train; what each says of losses and parameters. ``attached``: "all", the "first" only, or all but "killed"."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    meeting = tmp_path / f"{kind}-{attached}-{Path(run).name}"  # a file, since any port may be taken
    processes = [
        Warm([script, kind, run, f"file://{meeting}", attached], ROOT, os.environ | {"RANK": str(r)} | TWO)
        for r in range(2)
    ]
    lines = []
    for p in processes:
        out, err = p.communicate(timeout=120)
        assert p.returncode == (-9 if attached == "killed" else 0), err
        lines += [line for line in out.splitlines() if line.startswith("rank")]
    return sorted(lines)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], list[str], monitor.Run]]:
    """For each kind of data-parallel training what two processes say without and with the monitor, and the run."""
    found = {}
    for kind in ("ddp", "sharded"):
        folder = tmp_path_factory.mktemp(kind)
        plain, watched = (two_processes(folder, kind, run) for run in ("-", str(folder / "run")))
        found[kind] = plain, watched, monitor.open(folder / "run")
    return found


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_two_gloo_processes(together: dict[str, tuple[list[str], list[str], monitor.Run]], kind: str) -> None:
    """Oracle: invariance. Losses and parameters of both ranks, hashed, with and without the monitor."""
    control, watched, run = together[kind]
    assert len(control) == 2
    assert watched == control
    assert run.steps == 20
    assert run.modules("grad_norm.norm") == ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight")
    assert len(run.series("loss.value")[0]) == 20
    assert [p.name for p in run.path.iterdir() if p.is_dir()] == ["rank0"]
    assert [a["what"] for a in run.info["absent"] if "sharded" in a["why"]] == ["eps_ratio"] * (kind == "sharded")


#: Columns of whole tensors that are made of what each process knows of its part.
WHOLE = (
    "grad_norm.norm", "grad_norm.max_abs", "grad_norm.nonfinite", "grad_norm_total.norm", "spam_spike.count",
    "param_norm.norm", "update_ratio.ratio", "update_ratio.update_norm", "distance_from_start.distance",
    "distance_from_start.stderr", "nlm_cos.cos", "nlm_cos.total", "clip.coefficient",
)  # fmt: skip


def test_sharded_parameters_are_recorded_whole(
    together: dict[str, tuple[list[str], list[str], monitor.Run]],
) -> None:
    """Oracle: invariance. The same training with whole parameters in every process gives the same numbers."""
    whole, sharded = together["ddp"][2], together["sharded"][2]
    for ref in WHOLE:
        assert sharded.modules(ref) == whole.modules(ref)
        for module in whole.modules(ref):
            steps, values = sharded.series(ref, module)
            expected = whole.series(ref, module)
            assert steps.tolist() == expected[0].tolist(), ref
            np.testing.assert_allclose(values, expected[1], rtol=2e-6, atol=1e-7, err_msg=f"{ref} {module}")


def test_sharded_and_killed(tmp_path: Path, together: dict[str, tuple[list[str], list[str], monitor.Run]]) -> None:
    """Oracle: invariance. Of processes that were killed the tails are joined when the run is read."""
    two_processes(tmp_path, "sharded", str(tmp_path / "run"), "killed")
    run, whole = monitor.open(tmp_path / "run"), together["ddp"][2]
    assert run.status == "died"
    for ref, module in (("grad_norm_total.norm", ""), ("update_ratio.ratio", "2.weight")):
        steps, values = run.series(ref, module)
        expected = whole.series(ref, module)
        assert steps.tolist() == [s for s in expected[0] if s < 17]
        np.testing.assert_allclose(values, expected[1][: len(values)], rtol=2e-6)


def test_sharded_and_only_the_first_attached(tmp_path: Path) -> None:
    """Oracle: definition. Nobody waits, the numbers are those of one process, and the run says so."""
    two_processes(tmp_path, "sharded", str(tmp_path / "run"), "first")
    run = monitor.open(tmp_path / "run")
    assert len(run.series("grad_norm.norm", "0.weight")[0]) == 20
    said = next(a["why"] for a in run.info["absent"] if a["what"] == "grad_norm")
    assert "norms are those of this process alone, for process 1 recorded nothing" in said


TRAINER = """
import hashlib, sys, torch
torch.set_num_threads(1)
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32))
tokens = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": t, "labels": t} for t in tokens]
args = TrainingArguments(sys.argv[1], max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                         report_to=[], logging_steps=4, use_cpu=True, save_strategy="no", disable_tqdm=True, seed=0)
trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:8])
trainer.train()
digest = hashlib.sha256(repr(trainer.evaluate()["eval_loss"]).encode())
for p in model.parameters():
    digest.update(p.detach().numpy().tobytes())
digest.update(torch.get_rng_state().numpy().tobytes())
print("digest", digest.hexdigest())
"""


def test_an_unmodified_trainer_run(tmp_path: Path) -> None:
    """Oracle: invariance, through ``monitor run``: parameters, evaluation loss and generator of a Hugging Face run."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    script = tmp_path / "train.py"
    script.write_text(TRAINER)

    def digest(*command: str) -> str:
        done = run_warm(*command, script, tmp_path / "out", cwd=tmp_path, env=OFFLINE, check=True)
        return next(line for line in done.stdout.splitlines() if line.startswith("digest"))

    control = digest()
    folder = tmp_path / "run"
    assert digest("-m", "monitor_cli", "run", "--run-dir", str(folder)) == control
    run = monitor.open(folder)
    assert run.steps == 12
    assert run.modules("grad_norm.norm")[0] == "transformer.wte.weight"
    steps, losses = run.series("loss.value")
    assert len(steps) == 12
    assert 3.5 < losses[0] < 5  # about ln 64, not twice or half of it
    assert run.series("logit_norm.mean", "cross_entropy")[0].tolist() == list(range(11))  # then every fifth
    assert json.dumps(run.facts["optimizers"])


EAGER = """
import hashlib, sys, torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, max_position_embeddings=32, attention_dropout=0.1, attn_implementation="eager",
))
tokens = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": t, "labels": t} for t in tokens]
args = TrainingArguments(sys.argv[1], max_steps=12, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                         save_strategy="no", disable_tqdm=True, seed=0, gradient_checkpointing=sys.argv[2] == "again")
Trainer(model, args, train_dataset=data).train()
digest = hashlib.sha256()
for p in model.parameters():
    digest.update(p.detach().numpy().tobytes())
digest.update(torch.get_rng_state().numpy().tobytes())
print("digest", digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("forward", ["once", "again"])
def test_attention_by_hand_under_a_trainer(forward: str, tmp_path: Path) -> None:
    """Oracle: invariance. Llama's eager attention with dropout, also checkpointed: parameters and generator, heads."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    script = tmp_path / "train.py"
    script.write_text(EAGER)

    def digest(*command: str) -> str:
        done = run_warm(*command, script, tmp_path / "out", forward, cwd=tmp_path, env=OFFLINE, check=True)
        return next(line for line in done.stdout.splitlines() if line.startswith("digest"))

    folder = tmp_path / "run"
    control = digest()
    assert digest("-m", "monitor_cli", "run", "--run-dir", str(folder)) == control
    run = monitor.open(folder)
    assert not run.warnings
    assert run.modules("attn_entropy.entropy") == tuple(
        f"model.layers.{layer}.self_attn[{h}]" for layer in range(2) for h in range(4)
    )
    assert len(run.series("attn_logit_max.found", "model.layers.1.self_attn[3]")[0]) == 11


def test_accelerate(tmp_path: Path) -> None:
    """Oracle: definition. Accelerate's wrapper is an optimizer too; only the inner one steps, once."""
    accelerate = pytest.importorskip("accelerate")
    import torch
    from torch import nn

    torch.manual_seed(0)
    engine = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, opt = engine.prepare(model, opt)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(10):
            with engine.accumulate(model):
                loss = nn.functional.cross_entropy(model(torch.randn(8, 12)), torch.randint(0, 5, (8,)))
                engine.backward(loss)
                opt.step()
                opt.zero_grad()
    run = monitor.open(tmp_path / "run")
    assert run.steps == 5
    assert run.series("loss.value")[1] == pytest.approx(1.6, abs=0.5)


@pytest.mark.filterwarnings("ignore")  # its own, about the versions of what it stands on
def test_lightning(tmp_path: Path) -> None:
    """Oracle: invariance. Lightning runs forward and backward inside the optimizer's step."""
    lightning = pytest.importorskip("lightning")
    import torch
    from torch import nn

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train(watch) -> list[float]:
        lightning.seed_everything(0, verbose=False)
        data = torch.utils.data.TensorDataset(torch.randn(40, 12), torch.randint(0, 5, (40,)))
        module = Module()
        watch(module)
        trainer = lightning.Trainer(
            max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
        return [p.sum().item() for p in module.parameters()]

    control = train(lambda _: None)
    handles: list[monitor.Handle] = []
    assert train(lambda m: handles.append(monitor.attach(m, tmp_path / "run"))) == control
    handles[0].close()
    run = monitor.open(tmp_path / "run")
    assert run.steps == 10
    assert len(run.series("loss.value")[0]) >= 9
