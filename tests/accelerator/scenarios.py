"""Trainings on the emulated device, each plain and recorded. Run as a script: ``LIBRARY FOLDER NAME``; prints JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import scatter_gather

import monitor
from monitor.probes import (
    EmbeddingGini,
    FourierLosses,
    JacobianSpectrum,
    LocalComplexity,
    Memorisation,
    OddFraction,
    Sources,
    TrajectoryKL,
)
from monitor.record.recorder import Recorder
from monitor.record.site import Site
from tests.accelerator import emulated

#: Called with the model and its optimizer before the first step; gives the handle, or None in the control.
Attach = Callable[..., "monitor.Handle | None"]
DEVICE, SECOND = f"{emulated.NAME}:0", f"{emulated.NAME}:1"
STEPS = 130
#: Operations counted by a training.
LAUNCHED: list[Counter[str]] = []


def _classes(rows: int = 64, features: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, features).to(DEVICE), torch.randint(0, 5, (rows,)).to(DEVICE)


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 5))


def _update(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(model(x), y)
    opt.zero_grad()
    loss.backward()
    loss.detach().zero_()  # scripts divide it there, or add it up over processes
    opt.step()


def plain(attach: Attach) -> nn.Module:
    """A perceptron, some evaluations, values logged by the user; longer than a block of rows."""
    model = _mlp().to(DEVICE)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = attach(model, opt)
    x, y = _classes()
    for step in range(STEPS):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if handle is not None:
            handle.log(val_loss=loss.detach())
        if step % 50 == 49:
            model.eval()
            with torch.no_grad():
                F.cross_entropy(model(x + 1), y)
            model.train()
    return model


class _Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class _GPT(nn.Module):
    def __init__(self, vocabulary: int = 64, d: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(16, d)
        self.blocks = nn.ModuleList(_Block(d) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(attach: Attach, layers: int = 4) -> nn.Module:
    """A transformer, whose operations from the 20th step to the 60th are counted, and those of the recorder."""
    model = _GPT(layers=layers).to(DEVICE)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.randint(0, 64, (8, 17)).to(DEVICE)
    attach(model, opt)
    operations = emulated.Operations()
    recorders = emulated.Operations()
    for step in range(60):
        with operations if step >= 20 else nullcontext(), _inside(recorders if step >= 20 else nullcontext()):
            loss = F.cross_entropy(model(data[:, :-1]).flatten(0, 1), data[:, 1:].flatten())
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
    LAUNCHED[:] = operations.found, recorders.found
    return model


@contextmanager
def _inside(context: AbstractContextManager[Any]) -> Iterator[None]:
    """What the recorder does is in ``context``; the modes of others do not meet it."""
    tell, close = Recorder._tell, Recorder._close_row

    def told(self: Recorder, site: Site, what: Callable[..., None], *args: Any) -> None:
        with context:
            tell(self, site, what, *args)

    def closed(self: Recorder) -> None:
        with context:
            close(self)

    Recorder._tell, Recorder._close_row = told, closed
    yield
    Recorder._tell, Recorder._close_row = tell, close


def deep_gpt(attach: Attach) -> nn.Module:
    """The same with twelve layers."""
    return gpt(attach, 12)


def experts(attach: Attach) -> nn.Module:
    """A mixture of experts of a public library."""
    import transformers

    config = transformers.OlmoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_experts=4, num_experts_per_tok=2, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.OlmoeForCausalLM(config)
    nn.Module.to(model, DEVICE).train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.randint(0, 96, (8, 16)).to(DEVICE)
    attach(model, opt)
    for _ in range(21):
        loss = model(input_ids=data, labels=data).loss
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model


def autocast(attach: Attach) -> nn.Module:
    """Forward in 16 bits."""
    model = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.Linear(32, 5)).to(DEVICE)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, opt)
    x, y = _classes()
    for _ in range(30):
        with torch.autocast(emulated.NAME, dtype=torch.bfloat16):
            _update(model, opt, x, y)
    return model


def convolutions(attach: Attach) -> nn.Module:
    """Regression through a batch norm, in two micro-batches."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)).to(DEVICE)
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(model, opt)
    x, y = torch.randn(2, 16, 3, 6, 6).to(DEVICE), torch.randn(2, 16, 2).to(DEVICE)
    for _ in range(45):
        opt.zero_grad()
        for a, b in zip(x, y, strict=True):
            (F.mse_loss(model(a), b) / 2).backward()
        opt.step()
    return model


def scaler(attach: Attach) -> nn.Module:
    """A scaled loss, gradients unscaled before they are clipped, and one update left out."""
    model = _mlp().to(DEVICE)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, opt)
    x, y = _classes()
    scaler = torch.amp.GradScaler(emulated.NAME, init_scale=256.0)
    for step in range(30):
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y) * (float("inf") if step == 12 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
    return model


def _data_parallel(attach: Attach, wrapper: bool) -> nn.Module:
    # what torch has for CUDA alone
    replicate = torch.nn.parallel.replicate
    replicate.__globals__["_broadcast_coalesced_reshape"] = lambda tensors, devices, detach=False: [
        [t.to(f"{emulated.NAME}:{d}") for t in tensors] for d in devices
    ]
    setattr(scatter_gather, "Scatter", type("Scatter", (), {"apply": staticmethod(_scatter)}))  # noqa: B010
    setattr(scatter_gather, "Gather", type("Gather", (), {"apply": staticmethod(_gather)}))  # noqa: B010
    inside = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 5)).to(DEVICE)
    model = nn.DataParallel(inside, device_ids=[0, 1])
    opt = torch.optim.Adam(inside.parameters(), lr=1e-3)
    attach(model if wrapper else inside, opt)
    x, y = _classes()
    for _ in range(40):
        _update(model, opt, x, y)
    return inside


def _scatter(devices: list[int], sizes: object, dim: int, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.to(f"{emulated.NAME}:{d}") for d, part in zip(devices, x.chunk(len(devices), dim), strict=True))


def _gather(device: int, dim: int, *parts: Tensor) -> Tensor:
    return torch.cat([part.to(f"{emulated.NAME}:{device}") for part in parts], dim)


def replicas(attach: Attach) -> nn.Module:
    """`nn.DataParallel`: copies of the model made anew in every step, each called in a thread of its own."""
    return _data_parallel(attach, wrapper=True)


def replicas_of_the_model(attach: Attach) -> nn.Module:
    """The same, recorded by the model inside."""
    return _data_parallel(attach, wrapper=False)


class _Split(nn.Module):
    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(12, 32).to(first), nn.LayerNorm(32).to(first)
        self.b, self.second = nn.Linear(32, 5).to(second), second

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x)).to(self.second)))


def _split(attach: Attach, first: str, second: str) -> nn.Module:
    model = _Split(first, second)
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(model, opt, curvature=monitor.Curvature(every=20))
    x, y = _classes()
    for _ in range(45):
        _update(model, opt, x.to(first), y.to(second))
    return model


def two_devices(attach: Attach) -> nn.Module:
    """A model whose second half is on another device."""
    return _split(attach, DEVICE, SECOND)


def half_on_the_host(attach: Attach) -> nn.Module:
    """A model that begins on the host."""
    return _split(attach, "cpu", DEVICE)


class _Scale(nn.Module):
    """A normalisation written by hand."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class _Choose(nn.Module):
    """Experts in a list, each wherever it is; the scores of some routers can be had before the softmax, of some not."""

    def __init__(self, d: int, factor: float | None) -> None:
        super().__init__()
        self.router, self.factor = nn.Linear(d, 4), factor
        self.experts = nn.ModuleList(nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x) if self.factor is None else self.router(x) * self.factor
        weights, chosen = scores.softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weights * (chosen == i)).sum(-1, keepdim=True)
            out = out + expert(x.to(next(expert.parameters()).device)).to(x.device) * share
        return out


class _Mixed(nn.Module):
    def __init__(self, d: int, factor: float | None) -> None:
        super().__init__()
        self.n1, self.n2, self.mixture = _Scale(d), _Scale(d), _Choose(d, factor)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mixture(self.n2(x))


def _mixed(attach: Attach, place: Callable[[_GPT, int], None], steps: int) -> nn.Module:
    """A mixture of experts, of which ``place`` says before every step what is where."""
    model = _GPT(layers=3)
    model.blocks = nn.ModuleList(_Mixed(32, factor) for factor in (2.0, None, None))
    place(model, 0)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = attach(model, opt)
    data = torch.randint(0, 64, (16, 17), device="cpu")
    for step in range(steps):
        place(model, step)
        for state, p in ((opt.state[p], p) for p in model.parameters() if p in opt.state):
            state |= {key: state[key].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
        device = model.token.weight.device
        _update(nn.Sequential(model, nn.Flatten(0, 1)), opt, data[:, :-1].to(device), data[:, 1:].to(device).flatten())
        if handle is not None:
            handle.log(val_number=3.14159)
    return model


def moved(attach: Attach) -> nn.Module:
    """A model that goes to the device, to another, and back; its parameters stay themselves, as on every device."""

    def place(model: _GPT, step: int) -> None:
        where = {15: DEVICE, 45: SECOND, 95: DEVICE, 225: "cpu"}.get(step)
        if where is not None:
            model.to(where)

    torch.__future__.set_swap_module_params_on_conversion(True)
    return _mixed(attach, place, 235)


def spread(attach: Attach) -> nn.Module:
    """A model of which every block and every expert has a device to itself."""

    def place(model: _GPT, step: int) -> None:
        if step > 0:
            return
        model.to(DEVICE)
        for i, block in enumerate(m for m in model.modules() if isinstance(m, _Mixed)):
            block.to((SECOND, DEVICE)[i % 2])
            block.register_forward_pre_hook(lambda m, given: (given[0].to(next(m.parameters()).device),))
            for expert, device in zip(block.mixture.experts, (DEVICE, SECOND) * 2, strict=True):
                expert.to(device)
        model.norm.register_forward_pre_hook(lambda m, given: (given[0].to(DEVICE),))

    return _mixed(attach, place, 25)


def defaults(attach: Attach) -> nn.Module:
    """A script that has tensors made in 16 bits, and on the device."""
    torch.set_default_device(DEVICE)
    model = _mixed(attach, lambda model, step: None if step else _as_default(model), 25)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    return model


def _as_default(model: _GPT) -> None:
    model.to(DEVICE)
    torch.set_default_dtype(torch.bfloat16)


def broken_input(attach: Attach) -> nn.Module:
    """A NaN in the input of step 20."""
    model = _mlp().to(DEVICE)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, opt)
    x, y = _classes()
    for step in range(30):
        if step == 20:
            x[3, 4] = float("nan")
        _update(model, opt, x, y)
    return model


def curvature(attach: Attach) -> nn.Module:
    """Hessian products between the steps."""
    model = _mlp().to(DEVICE)
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(model, opt, curvature=monitor.Curvature(every=20))
    x, y = _classes()
    for _ in range(45):
        _update(model, opt, x, y)
    return model


def curvature_in_time(attach: Attach) -> nn.Module:
    """Hessian products when there is time for them."""
    model = _mlp().to(DEVICE)
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    attach(model, opt, curvature=monitor.Curvature(budget=1.0))
    x, y = _classes()
    for _ in range(120):
        _update(model, opt, x, y)
    return model


class _Sums(nn.Module):
    """Adds modulo five, from how often each number is there."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.up, self.down = nn.Embedding(5, 8), nn.Linear(8, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x @ self.token.weight)))


def probes(attach: Attach) -> nn.Module:
    """Every probe but the curvature."""
    model = _Sums().to(DEVICE)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    a, b = (t.flatten() for t in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    x, y = (F.one_hot(a, 5) + F.one_hot(b, 5)).float(), (a + b) % 5
    known = torch.randperm(25) < 18
    batch, rest = ((x[some].to(DEVICE), y[some].to(DEVICE)) for some in (known, ~known))
    sources = {"batch": (F.cross_entropy, batch), "rest": (F.cross_entropy, rest)}
    everything = [
        EmbeddingGini(5, every=10), FourierLosses(x, y, known, 5, every=10), JacobianSpectrum(every=10),
        LocalComplexity(x, 0.1, 4, every=10), Memorisation(every=10), Sources(sources, every=10),
        OddFraction(torch.randn(64, 5), every=10), TrajectoryKL(every=10),
    ]  # fmt: skip
    attach(model, opt, probes=everything)
    for _ in range(45):
        _update(model, opt, *batch)
    return model


def graph(attach: Attach) -> nn.Module:
    """Steps of which one is made into a graph, whose operations are counted."""
    model = _mlp().to(DEVICE)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, opt)
    x, y = _classes()

    for step in range(24):
        if step == 12:
            torch.ops.emulated.capture(True)
            with emulated.Operations() as operations:
                _update(model, opt, x, y)
            torch.ops.emulated.capture(False)
            LAUNCHED.append(operations.found)
        else:
            _update(model, opt, x, y)
    return model


TRAININGS = (
    plain, gpt, deep_gpt, graph, scaler, replicas, replicas_of_the_model, experts, autocast, convolutions,
    two_devices, half_on_the_host, moved, spread, defaults, broken_input, curvature,
    curvature_in_time, probes,
)  # fmt: skip


def _digest(training: Callable[[Attach], nn.Module], attach: Attach) -> str:
    torch.manual_seed(0)
    found = hashlib.sha256()
    for t in (*training(attach).state_dict().values(), torch.get_rng_state()):
        found.update(t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main(library: str, folder: str, name: str, *options: str) -> dict[str, Any]:
    """Train ``name`` twice, and tell what a recording of it in ``folder`` is like."""
    global DEVICE, SECOND
    emulated.start(Path(library))
    if "no float64" in options:
        torch.ops.emulated.use_float64(False)
    if "on the host" in options:
        DEVICE = SECOND = "cpu"
        torch.backends.cuda.enable_flash_sdp(False)  # which the device has not
    training = next(t for t in TRAININGS if t.__name__ == name)
    handles: list[monitor.Handle] = []

    def attach(*args: Any, **kwargs: Any) -> monitor.Handle:
        handles.append(monitor.attach(*args, run_dir=folder, **kwargs))
        return handles[-1]

    control = _digest(training, lambda *args, **kwargs: None)
    with emulated.Waits("/monitor/") as waits:
        recorded = _digest(training, attach)
    for handle in handles:
        handle.close()
    run = monitor.open(folder)
    return {
        "equal": control == recorded,
        "waits": waits.found,
        "measuring": waits.measuring,
        "launched": LAUNCHED,
        "warnings": run.info["warnings"],
        "absent": run.info["absent"],
        "metrics": sorted(run.metrics()),
        "rows": [int(s) for s in run.frame("loss")["step"]],
        "findings": [(f.rule, f.module, f.first_step) for f in run.findings()],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
