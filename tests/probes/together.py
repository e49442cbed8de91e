"""Trainings of two processes that average their gradients, each with and without a recording that measures curvature.

    RANK=0 python -m tests.probes.together meeting-point folder kind… &
    RANK=1 python -m tests.probes.together meeting-point folder kind…

Each process says for every kind whether all that must not change is the same bit for bit.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing._internal.two_tensor import TwoTensor

import monitor
from monitor.probes import Curvature, JacobianSpectrum, Memorisation, Sources, TrajectoryKL
from monitor.record import processes
from monitor.record.private import coalescing
from monitor.record.probe import Probe
from tests.record.trainings import Digest, Watch

STEPS, EVERY = 7, 3


def batches(steps: int = STEPS, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    """This process's own."""
    g = torch.Generator().manual_seed(100 + dist.get_rank())
    return [(torch.randn(rows, 12, generator=g), torch.randint(0, 5, (rows,), generator=g)) for _ in range(steps)]


class Net(nn.Module):
    """Dropout, buffers that are broadcast, and a layer that need not be used."""

    def __init__(self, odd: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)
        self.drop = nn.Dropout(0.1)
        self.odd = nn.Linear(16, 5) if odd else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.first(x)))))


def loop(
    model: nn.Module,
    watch: Watch,
    micro: int = 1,
    clip: float = 0.0,
    autocast: bool = False,
    scaled: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    inner: bool = False,
    closure: bool = False,
    **options: Any,
) -> str:
    """Train; ``micro`` batches a step, of which the last is averaged with the other process.

    With a ``closure`` the last one's forward and backward run inside the optimizer's step.
    """
    digest = Digest()
    if inner:
        watch(model)
    called = DistributedDataParallel(model, **options)
    if not inner:
        watch(called)
    opt = torch.optim.SGD(called.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    for i, (x, y) in enumerate(batches(STEPS * micro)):
        last = i % micro == micro - 1

        def again(x: Tensor = x, y: Tensor = y, last: bool = last) -> Tensor:
            with called.no_sync() if not last else torch.enable_grad():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    found = loss(called(x), y) / micro
                scaler.scale(found).backward()
            if closure and last and clip:
                nn.utils.clip_grad_norm_(called.parameters(), clip)
            return found

        if closure and last:
            digest.add(opt.step(again))  # pyright: ignore[reportArgumentType, reportCallIssue]
            opt.zero_grad()
            continue
        digest.add(again())
        if last:
            scaler.unscale_(opt)
            if clip:
                nn.utils.clip_grad_norm_(called.parameters(), clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    return digest.finish(called, opt)


def net(**options: Any) -> Callable[[Watch], str]:
    """A training of `Net`."""
    return lambda watch: loop(Net(odd=bool(options.get("find_unused_parameters"))), watch, **options)


def halved(watch: Watch) -> str:
    """Gradients that travel in 16 bits, and a loss scale."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    def hooked(called: nn.Module) -> None:
        assert isinstance(called, DistributedDataParallel)
        called.register_comm_hook(None, fp16_compress_hook)
        watch(called)

    return loop(Net(), hooked, scaled=True, clip=0.5)


class Gathering(nn.Module):
    """Asks the other process in its forward, as contrastive models do, and normalisation over processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        mean = z.detach().mean(0)
        dist.all_reduce(mean)
        return z - mean / 2


def gathered(z: Tensor, y: Tensor) -> Tensor:
    """A loss that reads what the other process has."""
    others = [torch.zeros_like(z) for _ in range(2)]
    dist.all_gather(others, z.detach())
    others[dist.get_rank()] = z
    return F.cross_entropy(z, y) + (z @ torch.cat(others).T).square().mean()


def pair(watch: Watch) -> str:
    """Two wrapped models and two optimizers."""
    digest = Digest()
    both = nn.ModuleDict({"g": nn.Linear(12, 12), "d": nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))})
    watch(both)
    g, d = (DistributedDataParallel(both[k]) for k in "gd")
    opts = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (d, g)]
    for x, _ in batches():
        opts[0].zero_grad()
        loss = (F.softplus(-d(x)) + F.softplus(d(g(x).detach()))).mean()
        loss.backward()
        opts[0].step()
        opts[1].zero_grad()
        again = F.softplus(-d(g(x))).mean()
        again.backward()
        opts[1].step()
        digest.add((loss, again))
    return digest.finish(both, *opts)


def by_hand(watch: Watch) -> str:
    """Gradients averaged by the script itself."""
    digest, model = Digest(), Net()
    watch(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches():
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        opt.step()
        digest.add(loss)
    return digest.finish(model, opt)


def lightning(watch: Watch) -> str:
    """Lightning calls its own training step through the wrapper."""
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ["LOCAL_RANK"] = os.environ["RANK"]  # so it starts no process of its own
    digest = Digest()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.norm = Net(), nn.LayerNorm(5)

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss = F.cross_entropy(self.norm(self.net(batch[0])), batch[1])
            self.log("loss", loss, on_step=True, on_epoch=True)
            digest.add(loss)
            return loss

        def on_train_epoch_end(self) -> None:
            digest.add({k: float(v) for k, v in self.trainer.callback_metrics.items()})

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    lightning.seed_everything(0, verbose=False)
    module = Module()
    watch(module)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, strategy="ddp", devices=2, gradient_clip_val=0.5, accumulate_grad_batches=2,
    )  # fmt: skip
    data = batches(4 * STEPS)  # of which Lightning gives each process every other one
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # pyright: ignore[reportArgumentType]
    return digest.finish(module, *trainer.optimizers)


def speaking() -> dict[str, Callable[[], object]]:
    """Every way to speak to the other process."""
    t, pieces = torch.ones(4), [torch.zeros(4), torch.zeros(4)]
    leaf = torch.ones(4, requires_grad=True)
    return {
        "all_reduce": lambda: dist.all_reduce(t),
        "later": lambda: dist.all_reduce(t, async_op=True),
        "broadcast": lambda: dist.broadcast(t, 0),
        "reduce": lambda: dist.reduce(t, 0),
        "all_gather": lambda: dist.all_gather(pieces, t),
        "into_tensor": lambda: dist.all_gather_into_tensor(torch.zeros(8), t),
        "gather": lambda: dist.gather(t, pieces),
        "scatter": lambda: dist.scatter(t, pieces),
        "reduce_scatter": lambda: dist.reduce_scatter(t, pieces),
        "all_to_all": lambda: dist.all_to_all_single(torch.zeros(4), t),
        "barrier": lambda: dist.barrier(),
        "monitored": lambda: dist.monitored_barrier(),
        "send": lambda: dist.send(t, 1),
        "recv": lambda: dist.recv(t, 1),
        "recv_any": lambda: dist.recv(t),
        "batched": lambda: dist.batch_isend_irecv([dist.P2POp(dist.isend, t, 1), dist.P2POp(dist.irecv, t, 1)]),
        "object": lambda: dist.all_gather_object([None, None], "x"),
        "coalesced": lambda: coalesced(dist.all_reduce),
        "broken_off": lambda: coalesced(lambda t: dist.send(t, 1)),
        "autograd": lambda: torch.distributed.nn.functional.all_reduce(leaf),
        "functional": lambda: functional.all_reduce(t, "sum", dist.distributed_c10d._get_default_group()),
        "backward": lambda: Halfway.apply(leaf).sum().backward(),
    }


def coalesced(speak: Callable[[Tensor], object]) -> None:
    """Two calls that become one."""
    with dist.distributed_c10d._coalescing_manager():
        for _ in range(2):
            speak(torch.ones(4))


class Halfway(torch.autograd.Function):
    """Speaks only on the way back, as tensor parallelism does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        dist.all_reduce(grad_outputs[0])
        return grad_outputs[0]


def silent() -> list[str]:
    """Ways that the first process was not kept from."""
    heard = []
    for name, speak in speaking().items() if dist.get_rank() == 0 and processes.several() else ():
        try:
            with processes.alone([]):
                speak()
        except processes.Alone:
            if not coalescing():
                continue
        heard.append(name)
    with processes.alone([]):
        TwoTensor(torch.ones(2), torch.ones(2)).exp()  # what has a dispatch of its own
    total = torch.ones(1)
    dist.all_reduce(total)
    return heard if total == dist.get_world_size() else ["nothing at all"]


KINDS: dict[str, Callable[[Watch], str]] = {
    "plain": net(),
    "accumulated": net(micro=3, clip=0.3),
    "autocast": net(autocast=True),
    "views": net(gradient_as_bucket_view=True, clip=0.3),
    "static": net(static_graph=True),
    "unused": net(find_unused_parameters=True),
    "closure": net(closure=True),
    "closures": net(closure=True, micro=3, clip=0.3),
    "lightning": lightning,
    "inner": net(find_unused_parameters=True, inner=True),
    "halved": halved,
    "pair": pair,
    "gathering": lambda watch: loop(Gathering(), watch),
    "gathered": net(loss=gathered),
    "by_hand": by_hand,
    "others": net(),
    "wrapper": net(),
    "oracle": net(micro=2, clip=0.1),
}


def dense(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Gradient ``(n,)`` and Hessian ``(n, n)`` of the mean loss of the parts, each with its own batch statistics."""
    twin = copy.deepcopy(model).double()
    names = [k for k, _ in twin.named_parameters()]
    shapes = [p.shape for _, p in twin.named_parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in twin.parameters()])

    def loss(v: Tensor) -> Tensor:
        pieces = v.split([s.numel() for s in shapes])
        held = {k: p.view(s) for k, p, s in zip(names, pieces, shapes, strict=True)}
        buffers = {k: b.clone() for k, b in twin.named_buffers()}
        each = [F.cross_entropy(torch.func.functional_call(twin, (held, buffers), (x.double(),)), y) for x, y in parts]
        return torch.stack(each).mean()

    return (
        torch.func.grad(loss)(flat).numpy(),
        torch.autograd.functional.hessian(loss, flat).numpy(),
    )


def watcher(kind: str, folder: Path, handles: list[monitor.Handle]) -> Watch:
    """What records this kind of training."""

    def watch(model: nn.Module) -> None:
        curvature: Curvature | None = Curvature(every=EVERY, full=2)
        probes: list[Probe] = []
        x, y = batches()[0]
        if kind == "others":
            sources = {"a": (F.cross_entropy, (x, y)), "b": lambda: F.cross_entropy(model(x), y)}
            probes = [TrajectoryKL(every=2), JacobianSpectrum(rows=8, every=3), Memorisation(every=1)]
            probes.append(Sources(sources, every=2))
            curvature = None
        if kind == "wrapper":
            curvature = Curvature(every=EVERY, loss_closure=lambda: F.cross_entropy(model(x), y))
        handles.append(monitor.attach(model, folder / kind, curvature=curvature, probes=probes))

    return watch


def oracle(folder: Path, watched: bool) -> Watch:
    """Keep what the Hessian of the first process was, at the steps at which it is measured."""

    def watch(model: nn.Module) -> None:
        inside = model.module
        assert isinstance(inside, Net)
        inside.drop.p = 0.0
        if dist.get_rank() != 0 or not watched:
            return
        seen: list[tuple[Tensor, Tensor]] = []
        own = iter(batches(STEPS * 2))
        updates = 0

        def before(*_: Any) -> None:
            nonlocal updates
            if updates == STEPS:  # of the next training
                return
            seen[:] = [next(own), next(own)]
            if updates % EVERY == 0:
                g, h = dense(inside, seen)
                np.savez(folder / f"dense-{updates}.npz", g=g, h=h)
            updates += 1

        register_optimizer_step_pre_hook(before)

    return watch


def main() -> None:
    """Train every kind twice."""
    meeting, folder, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=int(os.environ["WORLD_SIZE"])
    )
    print(f"rank {rank} silent but for {silent()}", flush=True)
    for kind in kinds:
        found = []
        for watched in (False, True):
            torch.manual_seed(0)
            handles: list[monitor.Handle] = []
            keep = oracle(Path(folder), watched) if kind == "oracle" else lambda _: None
            record = watcher(kind, Path(folder), handles) if watched else lambda _: None
            found.append(KINDS[kind](lambda m, keep=keep, record=record: (keep(m), record(m))))
            for handle in handles:
                handle.close()
        print(f"rank {rank} {kind} {'same' if found[0] == found[1] else 'changed'}", flush=True)
    dist.barrier()
    os._exit(0)  # gloo now and then aborts while it is taken down


if __name__ == "__main__":
    main()
