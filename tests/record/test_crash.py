"""Promises two and four: nothing that happens to the recording stops the training, a kill loses at most one step."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import monitor
from monitor.record.attach import close_all
from monitor.record.sites.gradient import GradientSite
from tests.record import trainings
from tests.warm import Warm, run_warm

ENDLESS = """
import sys, torch, monitor
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
opt = torch.optim.AdamW(model.parameters())
monitor.attach(model, sys.argv[1])
done = open(sys.argv[2], "w")
for i in range(10**9):
    opt.zero_grad()
    x = torch.randn(8, 12)
    torch.nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
    opt.step()
    done.seek(0); done.write(f"{i + 1:09d}"); done.flush()
"""


def kill_one(folder: Path, seed: int) -> None:
    folder.mkdir()
    count = folder / "count"
    script = folder / "endless.py"
    script.write_text(ENDLESS)
    run_dir = folder / "run"
    process = Warm([script, run_dir, count], folder)
    limit = time.monotonic() + 60
    while not (count.exists() and count.read_text()) and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.0, 0.8))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = int(count.read_text() or 0)
    run = monitor.open(run_dir)
    assert run.status == "died"
    steps, values = run.series("loss.value")
    assert len(steps) >= finished - 1  # of the steps that the training had finished, at most one is missing
    assert steps.tolist() == list(range(len(steps)))
    assert all(v == v for v in values)
    assert run.verdict().level in ("healthy", "info", "not_enough_evidence")


def test_five_kills(tmp_path: Path) -> None:
    """Oracle: planted fault. SIGKILL at a random moment of a recorded training: readable, at most one step lost."""
    for i in range(5):
        kill_one(tmp_path / str(i), i)


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    """Oracle: planted fault, as above."""
    for i in range(50):
        kill_one(tmp_path / str(i), 100 + i)


def test_an_error_inside_disables_one_site_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: planted fault. The gradient site raises at step 5; the rest is recorded, training is unchanged."""
    control = trainings.plain(lambda _: None)
    original = GradientSite.on_step

    def fails(self: GradientSite, optimizer: torch.optim.Optimizer) -> None:
        if self.rec.step == 5:
            raise RuntimeError("planted")
        original(self, optimizer)

    monkeypatch.setattr(GradientSite, "on_step", fails)
    with pytest.warns(monitor.MonitorWarning, match="gradient is no longer recorded from step 5") as said:
        digest = trainings.plain(lambda m: monitor.attach(m, tmp_path / "run"))
    close_all()
    assert digest == control
    assert len(said) == 1
    run = monitor.open(tmp_path / "run")
    assert len(run.series("grad_norm_total.norm")[0]) == 5
    assert len(run.series("loss.value")[0]) == 30
    assert any("planted" in w for w in run.warnings)


def test_an_unwritable_folder_is_no_reason_not_to_train(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: planted fault. A folder below a file cannot be made; training runs, one line says so."""
    (tmp_path / "file").write_text("")
    control = trainings.plain(lambda _: None)
    assert trainings.plain(lambda m: monitor.attach(m, tmp_path / "file" / "run")) == control
    assert "training goes on unrecorded" in capfd.readouterr().err


FULL = """
import resource, signal, sys, torch, monitor
torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
opt = torch.optim.AdamW(model.parameters())
monitor.attach(model, sys.argv[1])
for i in range(1500):
    if i == 100:
        resource.setrlimit(resource.RLIMIT_FSIZE, (56_000, resource.RLIM_INFINITY))
    opt.zero_grad()
    torch.nn.functional.cross_entropy(model(torch.randn(8, 12)), torch.randint(0, 5, (8,))).backward()
    opt.step()
print("trained", i + 1)
"""


def test_a_full_disk_is_survived_and_said(tmp_path: Path) -> None:
    """Oracle: planted fault. No file beyond 56 kB from step 100 on: training ends, the run can be read and says so."""
    script = tmp_path / "full.py"
    script.write_text(FULL)
    done = run_warm(script, tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained 1500" in done.stdout
    run = monitor.open(tmp_path / "run")
    assert run.steps == 1500  # the parts could not be written; the tail, in small files, has it all
    assert "File too large" in done.stderr


def test_a_second_attach_ends_the_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Oracle: definition. One model, one recording; the occupied folder is left alone."""
    model = trainings.mlp()
    first = monitor.attach(model, tmp_path / "run")
    second = monitor.attach(model, tmp_path / "run")
    assert not first.recording
    assert second.recording
    assert second.path == tmp_path / "run-2"
    second.close()
    said = capfd.readouterr().err
    assert "that recording ends here" in said
    assert "run-2" in said


def test_resume_appends_an_attempt(tmp_path: Path) -> None:
    """Oracle: definition. Steps go on where the first attempt ended, or where it is said; both are kept."""
    for start in (None, 4):
        model = trainings.mlp()
        opt = torch.optim.AdamW(model.parameters())
        resume = start is not None or (tmp_path / "run").exists()
        with monitor.attach(model, opt, tmp_path / "run", resume=resume, start_step=start):
            for x, y in trainings.batches(6):
                opt.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
    run = monitor.open(tmp_path / "run")
    assert run.attempts == 2
    frame = run.frame("loss")
    assert frame[frame.attempt == 0].step.tolist() == [0, 1, 2, 3, 4, 5]
    assert frame[frame.attempt == 1].step.tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": 3}, "received int as model"),
        ({"optimizer": "adam"}, "as optimizer"),
        ({"start_step": 3}, "needs resume=True"),
        ({"resume": True}, "needs run_dir"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: dict[str, Any], said: str) -> None:
    """Oracle: definition. What was received, what was expected."""
    with pytest.raises(monitor.UsageError, match=said) as error:
        monitor.attach(**(dict[str, Any](model=trainings.mlp()) | arguments))
    assert "\n" not in str(error.value)


def test_log_and_note(tmp_path: Path) -> None:
    """Oracle: definition. A value logged after k updates belongs to step k, also after the last; notes are a table."""
    model = trainings.mlp()
    opt = torch.optim.AdamW(model.parameters())
    handle = monitor.attach(model, tmp_path / "run")
    for i, (x, y) in enumerate(trainings.batches(5)):
        handle.note({"ids": torch.arange(3) + i})
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        handle.log(val_acc=torch.tensor(0.1 * i), val_loss=i)
    with pytest.raises(monitor.UsageError, match="shape"):
        handle.log(bad=torch.zeros(3))
    handle.close()
    run = monitor.open(tmp_path / "run")
    assert run.series("logged.value", "val_acc")[0].tolist() == [1, 2, 3, 4, 5]
    assert run.series("logged.value", "val_loss")[1].tolist() == [0, 1, 2, 3, 4]


def test_a_dropped_handle_keeps_recording(tmp_path: Path) -> None:
    """Oracle: definition. Nobody holds the handle; the run is complete when the process ends."""
    script = tmp_path / "train.py"
    script.write_text(ENDLESS.replace("10**9", "20"))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), str(tmp_path / "count")],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0
    assert "recording 4 tensors" in done.stderr
    assert "monitor inspect" in done.stderr
    assert monitor.open(tmp_path / "run").steps == 20


@pytest.mark.parametrize(
    ("how", "status"), [("raise ValueError('boom')", "failed"), ("raise KeyboardInterrupt", "interrupted")]
)
def test_an_exception_is_kept_with_the_verdict(tmp_path: Path, how: str, status: str) -> None:
    """Oracle: planted fault. The program ends as it would have; the run says how it ended."""
    script = tmp_path / "train.py"
    script.write_text(ENDLESS.replace("10**9", "20") + how)
    done = run_warm(script, tmp_path / "run", tmp_path / "count", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    run = monitor.open(tmp_path / "run")
    assert run.status == status
    assert run.steps == 20


def test_private_corners_of_torch_are_there() -> None:
    """Oracle: definition. Each private function the recorder relies on answers on this version of torch."""
    from monitor.record import private

    assert not private.saved_tensor_hooks_active()
    assert not private.transformed()
    with torch.autograd.graph.save_on_cpu():
        assert private.saved_tensor_hooks_active()
    assert torch.func.vmap(lambda x: x * private.transformed())(torch.ones(2)).tolist() == [1, 1]
    z = torch.randn(3, 4, requires_grad=True)
    node = z.log_softmax(1).grad_fn
    result = private.saved(node, "result")
    assert result is not None
    assert torch.equal(result, z.log_softmax(1))
    with warnings.catch_warnings(), private.quiet():
        assert not torch.is_grad_enabled()
