"""What scripts of others do that ours do not: wrappers made for one call, updates by hand, Fabric around the model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import GridSearchCV
from torch import Tensor, nn
from torch.nn import functional as F

import monitor
from monitor.record.attach import close_all
from monitor.record.launcher import _Finder
from tests.warm import run_warm

#: What torchdiffeq does around the module that it is given, for every solution anew.
WRAPPER = """
import torch
from torch import nn

class _Perturbed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, t, x):
        return self.inner(t + 0.1, x)

def solve(inner, x):
    inner = _Perturbed(inner)
    for t in (0.0, 0.5):
        x = x + inner(t, x)
    return x
"""
ODE = """
import torch
from torch import nn
from solver import solve

class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, t, x):
        return self.net(x).tanh() + t

torch.manual_seed(0)
field = Field()
optimizer = torch.optim.Adam(field.parameters(), 1e-2)
for _ in range(12):
    optimizer.zero_grad()
    loss = solve(field, torch.randn(5, 3)).square().mean()
    loss.backward()
    optimizer.step()
    print(loss.item())
"""
BY_HAND = """
import torch
from torch import nn

model = nn.Linear(3, 3)
for _ in range(5):
    model.zero_grad()
    model(torch.ones(2, 3)).square().mean().backward()
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-0.1)
"""
FABRIC = """
import lightning
import torch
from torch import nn

fabric = lightning.Fabric(accelerator="cpu")
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.1))
for _ in range(5):
    optimizer.zero_grad()
    fabric.backward(nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)))
    optimizer.step()
"""
#: Layers that are trained one after the other, beside a head whose optimizer is forgotten and a moving average.
IN_TURN = """
import copy
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 1)
        self.average = copy.deepcopy(self.layers)

    def forward(self, i, x):
        return self.head(self.layers[i](x))

model = Model()
optimizers = [torch.optim.SGD(x.parameters(), 0.1) for x in (*model.layers, model.head)]
for i in range(3):
    for _ in range(120):
        optimizers[i].zero_grad()
        model(i, torch.ones(2, 4)).square().mean().backward()
        optimizers[i].step()
"""
#: The first call of the model is inside the first step, whose hooks are not ours alone.
CLOSURE = """
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

torch.manual_seed(0)
x = torch.randn(16, 3)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
register_optimizer_step_pre_hook(lambda *_: None)

def closure():
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    return loss

for _ in range(4):
    print(optimizer.step(closure).item())
"""
#: Three seeds in one script; the second fine-tunes its model with a second optimizer.
SEEDS = """
import torch
from torch import nn

def train(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    for stage in range(1 + (seed == 1)):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        for _ in range(60):
            x = torch.randn(32, 8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
            optimizer.step()
            scheduler.step()

for seed in range(3):
    train(seed)
"""
#: A step towards each task, and one for all of them, under transforms of torch.func.
META = """
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)

def loss(params, x, y):
    return (functional_call(model, params, (x,)) - y).square().mean()

def adapted(x, y):
    params = dict(model.named_parameters())
    slope = grad(loss)(params, x, y)
    return loss({k: p - 0.1 * slope[k] for k, p in params.items()}, x, y)

for _ in range(6):
    optimizer.zero_grad()
    x = torch.randn(4, 5, 1)
    total = vmap(adapted)(x, x.sin()).mean()
    total.backward()
    optimizer.step()
    print(total.item())
"""
#: Compiled as a whole or a part of it, and evaluated before it is trained; warnings are errors.
COMPILED = """
import copy
import warnings
import torch
from torch import nn

warnings.simplefilter("error")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
{compile}
copy.deepcopy(model)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for i in range(4):
    model.eval()
    with torch.no_grad():
        print(model(torch.ones(3, 4)).sum().item())
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.ones(3, 4) * i), torch.tensor([0, 1, 0])).backward()
    optimizer.step()
print(torch._dynamo.utils.counters["stats"])
"""


def run(folder: Path, script: str) -> tuple[subprocess.CompletedProcess[str], monitor.Run]:
    """``monitor run`` of a script in a folder of its own; what is in ``site-packages`` in there is installed."""
    (folder / "train.py").write_text(script)
    path = os.pathsep.join((str(folder / "site-packages"), os.environ.get("PYTHONPATH", "")))
    command = ("-m", "monitor_cli", "run", "--run-dir", "out", "train.py")
    done = run_warm(*command, cwd=folder, check=True, env=os.environ | {"PYTHONPATH": path})
    return done, monitor.open(folder / "out")


def test_a_wrapper_made_for_every_call_is_not_the_model(tmp_path: Path) -> None:
    """Oracle: golden. The model is what is wrapped, under its own names, and no loss is missing."""
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "solver.py").write_text(WRAPPER)
    done, recorded = run(tmp_path, ODE)
    losses = recorded.series("loss.value")[1]
    assert losses.tolist() == pytest.approx([float(x) for x in done.stdout.split()])
    assert set(recorded.frame("grad_norm").module) == {"net.weight", "net.bias"}
    assert recorded.facts["class"] == "Field"


@pytest.mark.slow
def test_fabric(tmp_path: Path) -> None:
    """Oracle: golden. A model set up by Fabric is recorded under the names it has without."""
    pytest.importorskip("lightning")
    recorded = run(tmp_path, FABRIC)[1]
    assert set(recorded.frame("grad_norm").module) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert recorded.facts["class"] == "Sequential"


def test_a_first_step_with_a_closure(tmp_path: Path) -> None:
    """Oracle: golden. The loss of every step is the one at its beginning, as LBFGS returns it, the first step's too."""
    done, recorded = run(tmp_path, CLOSURE)
    assert recorded.series("loss.value")[1].tolist() == pytest.approx([float(x) for x in done.stdout.split()])


def test_trainings_after_one_another_are_runs_of_their_own(tmp_path: Path) -> None:
    """Oracle: golden. A run for each model, named after the first, and not one finding in any."""
    run(tmp_path, SEEDS)
    runs = [monitor.open(tmp_path / name) for name in ("out", "out-2", "out-3")]
    assert [len(r.series("grad_norm.norm", "0.weight")[0]) for r in runs] == [60, 120, 60]
    assert [f.rule for r in runs for f in r.findings()] == []
    assert not (tmp_path / "out-4").exists()


@pytest.fixture
def finder(tmp_path: Path) -> Iterator[_Finder]:
    """What ``monitor run`` looks for a model with."""
    found = _Finder(tmp_path / "out", [], 1)
    yield found
    found.stop()


class Estimator(ClassifierMixin, BaseEstimator):
    """Makes its model and optimizer when it is fitted, and steps with a closure, as skorch's estimators do."""

    def __init__(self, lr: float = 0.1) -> None:
        self.lr = lr

    def fit(self, x: np.ndarray, y: np.ndarray) -> Estimator:
        """Train for eight steps."""
        self.classes_ = np.unique(y)
        self.module_ = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.optimizer_ = torch.optim.SGD(self.module_.parameters(), self.lr)

        def loss() -> torch.Tensor:
            self.optimizer_.zero_grad()
            loss = nn.functional.cross_entropy(self.module_(torch.from_numpy(x)), torch.from_numpy(y))
            loss.backward()
            return loss

        for _ in range(8):
            self.optimizer_.step(loss)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The first choice."""
        with torch.no_grad():
            return self.module_.eval()(torch.from_numpy(x)).argmax(1).numpy()


def test_the_fits_of_a_search_are_runs_of_their_own(finder: _Finder, tmp_path: Path) -> None:
    """Oracle: golden. Two learning rates on two folds, and the better one once more, each with all of its losses."""
    rows = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    GridSearchCV(Estimator(), {"lr": [0.1, 0.01]}, cv=2).fit(rows, (rows[:, 0] > 0).astype(np.int64))
    close_all()
    runs = [monitor.open(tmp_path / name) for name in ("out", "out-2", "out-3", "out-4", "out-5")]
    assert [r.series("loss.value")[0].tolist() for r in runs] == [list(range(8))] * 5
    assert [r.series("learning_rate.lr", "group[0]")[1][0] for r in runs[:4]] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_one_process_of_several_records(
    finder: _Finder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: definition. As torchrun starts them, the others are silent and write nothing."""
    monkeypatch.setenv("RANK", "1")
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert finder.found
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "out").exists()


class Unasked(nn.Linear):
    """A model that cannot be asked for its parameters."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        raise KeyError("not now")


def test_an_error_while_looking_is_said_once(finder: _Finder, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: planted fault. Training goes on."""
    model = Unasked(3, 1)
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
    assert capsys.readouterr().err.count("cannot record: KeyError") == 1
    assert not finder.found


@pytest.mark.slow
def test_updates_by_hand_are_said_to_be_none(tmp_path: Path) -> None:
    """Oracle: planted fault. Without an optimizer there is no step: the run says that, and nothing that is not so."""
    done, recorded = run(tmp_path, BY_HAND)
    assert "changed by hand" in done.stderr
    assert str(tmp_path) not in done.stderr
    assert [x["why"] for x in recorded.info["absent"]] == [done.stderr.split("monitor: ")[-1].split(";")[0]]


def test_an_optimizer_is_waited_for(tmp_path: Path) -> None:
    """Oracle: planted fault. An optimizer that never steps is found in a while; layers in turn and a copy never are."""
    done, recorded = run(tmp_path, IN_TURN)
    said = [line for line in done.stderr.splitlines() if "no optimizer" in line]
    assert said
    assert not [line for line in said if "layers" in line or "average" in line]
    assert {f.module for f in recorded.findings() if f.rule == "unoptimized_parameter"} == {"head.weight", "head.bias"}


@pytest.mark.slow
def test_a_model_that_is_only_called_under_transforms(tmp_path: Path) -> None:
    """Oracle: invariance. It is found when its optimizer steps: gradients are recorded, and the losses are the same."""
    done, recorded = run(tmp_path, META)
    alone = run_warm("train.py", cwd=tmp_path, check=True)
    assert done.stdout == alone.stdout
    assert "cannot record" not in done.stderr
    assert recorded.series("grad_norm.norm", "2.bias")[0].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("how", "losses"),
    [
        pytest.param('model = torch.compile(model, backend="aot_eager")', 4, id="whole"),
        # the first call of the whole is under way when its part is called
        pytest.param('model[0] = torch.compile(model[0], backend="aot_eager")', 3, id="part", marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_before_any_training_is_compiled_once(how: str, losses: int, tmp_path: Path) -> None:
    """Oracle: invariance. As many graphs as under Python alone, the same numbers, and no warning of torch's."""
    done, recorded = run(tmp_path, COMPILED.format(compile=how))
    alone = run_warm("train.py", cwd=tmp_path, check=True)
    assert done.stdout == alone.stdout
    assert recorded.facts["class"] == "Sequential"
    assert len(recorded.series("loss.value")[1]) >= losses


class Adapter(nn.Module):
    """What a library puts around a frozen projection, under the names it gives."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.base_layer = inner.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inner.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, inner.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Attention(nn.Module):
    """Two heads, whose queries, keys and values one projection makes."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (2, 4)).transpose(1, 2) for y in self.c_attn(x).chunk(3, 2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("adapted", [False, True])
def test_attention_with_an_adapter_keeps_its_name(adapted: bool, tmp_path: Path) -> None:
    """Oracle: invariance. Heads are those of the attention, whether its projection is trained itself or adapted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), Attention(), nn.Linear(8, 9))
    if adapted:
        model[1].c_attn = Adapter(model[1].c_attn)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(4):
            tokens = torch.randint(0, 9, (4, 7))
            optimizer.zero_grad()
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
    assert set(monitor.open(tmp_path / "run").frame("attn_entropy").module) == {"1[0]", "1[1]"}


SPIKED = "spam_spike.ratio", "grad_norm.max_abs", "grad_norm.norm"


def test_a_gradient_penalty_has_no_spikes(tmp_path: Path) -> None:
    """Oracle: planted fault, absent. A critic's second moments forget in ten steps what some elements had."""
    torch.manual_seed(1)
    generator, critic = (
        nn.Sequential(nn.Linear(i, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, o))
        for i, o in ((4, 2), (2, 1))
    )
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-4, betas=(0.0, 0.9)) for m in (generator, critic)]
    with monitor.attach(nn.ModuleList([generator, critic]), tmp_path / "run"):
        for i in range(100):
            made, real = generator(torch.randn(32, 4)), torch.randn(32, 2) * 0.5 + 1
            if i % 4 == 3:
                optimizers[0].zero_grad()
                (-critic(made).mean()).backward()
                optimizers[0].step()
                continue
            share = torch.rand(32, 1)
            between = (share * real + (1 - share) * made.detach()).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            optimizers[1].zero_grad()
            away = critic(made.detach()).mean() - critic(real).mean()
            (away + 10 * (slope.norm(dim=1) - 1).square().mean()).backward()
            optimizers[1].step()
    run = monitor.open(tmp_path / "run")
    ratio, largest, norm = (dict(zip(*run.series(ref, "1.4.weight"), strict=True))[67] for ref in SPIKED)
    assert ratio > 5000  # there is something to be wrong about
    assert largest**2 > norm**2 / 2
    assert [f.rule for f in run.findings() if f.severity != "info"] == []


def test_a_margin_is_no_ignorance(tmp_path: Path) -> None:
    """Oracle: planted fault, absent. ArcFace takes a margin from the label's angle: at first no row is right."""
    torch.manual_seed(0)
    model = nn.Linear(10, 16)
    weight = nn.Parameter(torch.randn(4, 16))
    optimizer = torch.optim.SGD([*model.parameters(), weight], lr=0.05)
    with monitor.attach(model, tmp_path / "run"):
        for _ in range(5):
            x = torch.randn(48, 10)
            label = x[:, :4].argmax(1)
            cosine = F.linear(F.normalize(model(x)), F.normalize(weight)).clamp(-0.999, 0.999)
            angle = cosine.acos() + 0.9 * F.one_hot(label, 4)
            optimizer.zero_grad()
            F.cross_entropy(64 * angle.clamp(max=3.1).cos(), label).backward()
            optimizer.step()
    run = monitor.open(tmp_path / "run")
    assert run.series("train_accuracy.top1_mass", "cross_entropy")[1][0] > 0.9
    assert [f.rule for f in run.findings() if f.severity != "info"] == []


#: Seeds before it imports what draws a random number then, has its errors shown in a way of its own, and fails.
SEEDED = """
import random
import sys

random.seed(0)
import rich.style

def show(kind, error, trace):
    print(kind.__name__, error, trace.tb_frame.f_code.co_name, trace.tb_next.tb_frame.f_code.co_name)

def fail():
    raise ValueError("as planned")

print(random.random())
print(sys.excepthook is sys.__excepthook__)
sys.excepthook = show
fail()
"""


def test_a_script_finds_what_python_gives_it(tmp_path: Path) -> None:
    """Oracle: golden. Random numbers after an import and the display of errors are as under Python."""
    (tmp_path / "train.py").write_text(SEEDED)
    alone, recorded = (
        subprocess.run([sys.executable, *how, "train.py"], cwd=tmp_path, capture_output=True, text=True)
        for how in ((), ("-m", "monitor_cli", "run"))
    )
    assert recorded.stdout == alone.stdout
    assert alone.stdout.splitlines()[1:] == ["True", "ValueError as planned <module> fail"]
    assert recorded.returncode == alone.returncode == 1
    assert "Traceback" not in recorded.stderr
