"""One line that records a training: `attach`."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import sys
import time
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from monitor.diagnosis.text import plain, summary_lines
from monitor.errors import UsageError
from monitor.record.budget import Account
from monitor.record.facts import unwrap, versions
from monitor.record.flush import Flusher, to_stderr
from monitor.record.part import Part, Place, hear, is_parted, next_recording, rank, ranks_with_parts, sharers, tell
from monitor.record.private import quiet
from monitor.record.probe import Probe
from monitor.record.recorder import SHARDED, Recorder
from monitor.record.sites.example import ExampleSite
from monitor.record.sites.logged import LoggedSite
from monitor.record.told import Told
from monitor.store.ranks import Others, others_fact
from monitor.store.run import open_run
from monitor.store.writer import RunWriter

if TYPE_CHECKING:
    from monitor.probes.curvature import Curvature

_OPEN: dict[int, Handle] = {}
_NO_STEP = "no step of a torch optimizer was seen (parameters changed by hand are no steps)"


class Handle:
    """A recording under way. It may be dropped; it ends with `close`, a ``with`` block or the process."""

    def __init__(self, recorder: Recorder | None, flusher: Flusher | Part | None, told: Told | None = None) -> None:
        self._told = told
        self._recorder = recorder
        self._flusher = flusher
        self._notes: list[tuple[int, str]] = []
        self._account = Account(recorder, flusher) if recorder and isinstance(flusher, Flusher) else None

    @property
    def path(self) -> Path | None:
        """The run folder; None on ranks that do not record."""
        return self._flusher.path if self._flusher else None

    @property
    def recording(self) -> bool:
        """True until closed, unless the recorder had to give up."""
        return self._recorder is not None and self._recorder.active

    def log(self, **values: float | Tensor) -> None:
        """Record values of your own with the next step, for example ``log(val_loss=…, val_acc=…)``.

        Args:
            values: numbers or one-element tensors (not read until the step is over, so no sync).

        Raises:
            UsageError: if a value is neither.
        """
        for name, value in values.items():
            if not (value.numel() == 1 if isinstance(value, Tensor) else hasattr(value, "__float__")):
                got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(f"log({name}=…) received {got}; expected a number or a one-element tensor")
            for site in self._recorder.sites if self._recorder is not None else ():
                if isinstance(site, LoggedSite):
                    site.log(name, value if isinstance(value, Tensor) else float(value))

    def note(self, note: object) -> None:
        """Remember something about the coming step that is no number: the ids of its batch, a file name, a remark.

        Args:
            note: anything `json.dumps` takes; tensors and arrays are turned into lists. As many numbers or words as the
                coming batch has rows are the ids of its examples, by which the table `examples` names them.
        """
        if self._recorder is None or self._flusher is None:
            return
        for site in self._recorder.sites:
            if isinstance(site, ExampleSite):
                site.noted(note)
        text = json.dumps(note, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
        self._notes.append((self._recorder.step, text))
        if len(self._notes) >= 1000:
            self._write_notes()

    def _write_notes(self) -> None:
        if self._notes and self._flusher is not None:
            steps, texts = zip(*self._notes, strict=True)
            self._notes.clear()
            self._flusher.table("notes", steps[0], {"step": np.array(steps, dtype=np.int64), "note": texts})

    def close(self) -> None:
        """Stop recording, write everything and print the verdict. A second call does nothing."""
        self._close("finished", None)

    def _close(self, status: str, error: str | None, say: bool = True) -> None:
        recorder, flusher = self._recorder, self._flusher
        self._recorder = None
        for key in [k for k, h in _OPEN.items() if h is self]:
            del _OPEN[key]
        if recorder is None or flusher is None:
            return
        recorder.close()
        self._write_notes()
        complete = flusher.close(status, error)
        if not say or isinstance(flusher, Part):  # the first process has the verdict
            return
        folder = _short(flusher.path)
        if recorder.rows == 0:
            to_stderr(f"{_NO_STEP}; {folder} is empty")
            return
        if not complete:
            to_stderr(f"the disk is too slow to finish now; nothing is lost, {folder} keeps the tail")
        with contextlib.suppress(Exception):  # a verdict that cannot be printed must not end a program badly
            verdict = open_run(flusher.path).verdict()
            if self._told is None or self._told.ends(verdict, folder):
                sys.stderr.write("\n".join(["", *summary_lines(verdict, folder), ""]))
                sys.stderr.flush()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._close(*_how_it_ended(error))

    def __repr__(self) -> str:
        if self._recorder is None:
            return f"<monitor.Handle {_short(self.path)}: closed>" if self.path else "<monitor.Handle: not recording>"
        return f"<monitor.Handle {_short(self.path)}: recording, step {self._recorder.step}>"


def attach(
    model: nn.Module,
    *where: Optimizer | Iterable[Optimizer] | str | os.PathLike[str] | None,
    run_dir: str | os.PathLike[str] | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    resume: bool = False,
    start_step: int | None = None,
    every: int = 1,
    curvature: Literal["auto"] | Curvature | None = None,
    probes: Probe | Iterable[Probe] = (),
) -> Handle:
    """Record the training of ``model`` from here on. Nothing has to be called in the loop.

    Steps are seen by a hook that torch calls after each optimizer step; nothing about the training changes, bit for
    bit.
    The verdict is printed when the run ends: at `Handle.close`, at the end of a ``with`` block, or with the process,
    also after an exception or Ctrl-C.

    Args:
        model: the module that is trained, before or after `torch.compile` or a data-parallel wrapper.
        where: the run folder, the optimizer(s), or both in either order, for those who like it short.
        run_dir: folder to write; default ``runs/<script>-<time>``. An occupied folder is left alone and the next free
            name taken (``runs/grok-2``), which is said aloud.
        optimizer: follow only this optimizer, or these; default: every one that trains a parameter of the model.
        resume: append to the run in ``run_dir`` as a new attempt.
        start_step: with ``resume``, number of the first step, for a training that goes back to an older checkpoint;
            default: the one after the last recorded.
        every: look at gradients, inputs, logits, attention and routers only at each so many steps, after the first ten;
            the loss, and what costs little, is recorded at every step all the same.
        curvature: "auto" also measures the curvature of the training loss now and then, in at most 5 % of the time; a
            `monitor.Curvature` says more exactly what and when.
        probes: further measurements of `monitor.probes`.

    Returns:
        A `Handle`; it may be dropped.

    Raises:
        UsageError: if an argument is not what is said here, or there is nothing to resume.
    """
    for given in where:
        if given is None:
            continue
        if isinstance(given, str | os.PathLike):
            if run_dir is not None:
                raise UsageError(f"attach() received two folders, {str(run_dir)!r} and {str(given)!r}; expected one")
            run_dir = given
        elif optimizer is None:
            optimizer = given
        else:
            raise UsageError("attach() received the optimizer twice; give it once, or several as a list")
    if not isinstance(model, nn.Module):
        raise UsageError(f"attach() received {type(model).__name__} as model; expected a torch.nn.Module")
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for o in optimizers:
        if not isinstance(o, Optimizer):
            raise UsageError(f"attach() received {type(o).__name__} as optimizer; expected a torch.optim.Optimizer")
    if start_step is not None and not resume:
        raise UsageError("attach(start_step=…) needs resume=True: a new run begins at step 0")
    if resume and run_dir is None:
        raise UsageError("attach(resume=True) needs run_dir=: the run to go on with")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise UsageError(f"attach() received every={every!r}; expected a number of steps, 1 or more")
    asked = _probes(curvature, probes)
    for handle in set(_OPEN.values()):
        if handle._recorder is not None and handle._recorder.orphaned():
            handle.close()  # as in a search over many models: nobody else will
    root = unwrap(model)
    held = _OPEN.get(id(root))
    if held is not None:
        to_stderr(f"the model was being recorded into {_short(held.path)}; that recording ends here")
        held._close("detached", None, say=False)
    return begin(
        [model], run_dir, optimizers=optimizers, probes=asked, resume=resume, start_step=start_step, every=every
    )


def begin(
    models: Sequence[nn.Module],
    run_dir: str | os.PathLike[str] | None,
    *,
    optimizers: Sequence[Optimizer] = (),
    probes: Sequence[Probe] = (),
    resume: bool = False,
    start_step: int | None = None,
    every: int = 1,
    follow_all: bool = False,
    told: Told | None = None,
) -> Handle:
    """Start a recording, in the first of several processes; arguments are those of `attach`, checked.

    The others record only their parts of parameters, if they have any that the first one does not have. Where one
    recording after the other is begun, ``told`` says what of it is printed.
    """
    if rank() != 0:
        parted = any(is_parted(p) for m in models for p in m.parameters())
        return _begin_part(models, optimizers, follow_all, every) if parted else Handle(None, None)
    others = ranks_with_parts(models)
    script = _script()
    folder = Path(run_dir) if run_dir is not None else _default_folder(script)
    place = Place()
    try:
        writer = RunWriter.create(folder, script=script, resume=resume, start_step=start_step)
        place = Place(str(writer.path), writer.attempt, writer.start_step)
    except OSError as e:  # a full or read-only disk is no reason not to train
        to_stderr(f"cannot write {_short(folder)} ({e.strerror or e}); training goes on unrecorded")
        return Handle(None, None)
    finally:
        if others:
            tell(next_recording(models), place)
    try:
        if others:
            writer.others = Others(writer.path, writer.attempt, others)
            writer.update(facts=others_fact(writer.attempt, others))
        flusher = Flusher(writer, to_stderr)
        with quiet():
            recorder = Recorder(
                models,
                flusher,
                optimizers=optimizers,
                probes=probes,
                follow_all=follow_all,
                start_step=writer.start_step,
                every=every,
            )
    except Exception as e:  # an error of ours, or in a metric of the user's, is no reason not to train either
        to_stderr(f"cannot record: {type(e).__name__}: {e}; training goes on unrecorded")
        writer.close("failed", str(e))
        return Handle(None, None)
    flusher.missing = lambda: _missing(recorder, writer.others) if recorder.rows else [("loss", _NO_STEP)]
    handle = Handle(recorder, flusher, told)
    if handle._account is not None:
        flusher.overhead = handle._account.report
    argv = [_relative(sys.argv[0]), *sys.argv[1:]] if sys.argv else []
    writer.update(versions=versions(), facts={"argv": argv})
    roots = [unwrap(m) for m in models]
    for root in roots:
        _OPEN[id(root)] = handle
    if told is not None and not told.begins():
        return handle
    with quiet():
        tensors = sum(1 for m in roots for p in m.parameters() if p.requires_grad)
    moved = f" ({folder.name} is occupied)" if writer.renamed else ""
    to_stderr(f"recording {tensors} tensors → {_short(writer.path)}{moved}")
    return handle


def _begin_part(models: Sequence[nn.Module], optimizers: Sequence[Optimizer], follow_all: bool, every: int) -> Handle:
    """Record this process's parts into the run of the first one."""
    place = hear(next_recording(models))
    if not place.path:
        return Handle(None, None)  # the first one says why, or its run says that this one is silent
    try:
        part = Part(place, rank())
        with quiet():
            recorder = Recorder(
                models,
                part,
                optimizers=optimizers,
                follow_all=follow_all,
                start_step=place.start_step,
                every=every,
                part=True,
            )
    except Exception as e:
        to_stderr(f"process {rank()} cannot record: {type(e).__name__}: {e}; training goes on")
        return Handle(None, None)
    handle = Handle(recorder, part)
    for model in models:
        _OPEN[id(unwrap(model))] = handle
    return handle


def _missing(recorder: Recorder, others: Others | None) -> list[tuple[str, str]]:
    """What is absent, as the recorder has it, unless the other processes have recorded the rest."""
    found = recorder.missing()
    if others is None or SHARDED not in found:
        return found
    for process, (step, until) in others.behind.items():
        how = f"fell silent after step {step:,}: what it has parts of is absent from then on"
        if until < others.last:
            how = f"was late between steps {step:,} and {until:,}: what it has parts of may be absent there"
        found.append(("grad_norm", f"process {process} {how}"))
    why = None
    if others.silent:
        why = f"for process {others.silent[0]} recorded nothing here"
    elif others.alone is not None:
        why = f"up to step {others.alone:,}: another began to record later"
    elif not all(sharers(p) for root in recorder.roots for p in root.parameters() if hasattr(p, "_local_tensor")):
        why = "where they are spread in other ways than by cutting"
    found = [m for m in found if m != SHARDED]
    if why is not None:
        return [*found, (SHARDED[0], f"{SHARDED[1]}, {why}")]
    return [*found, ("eps_ratio", "the parameters are sharded: second moments are those of this process alone")]


def _probes(curvature: Literal["auto"] | Curvature | None, probes: Probe | Iterable[Probe]) -> list[Probe]:
    asked = [probes] if isinstance(probes, Probe) else list(probes)
    for p in asked:
        if not isinstance(p, Probe):
            raise UsageError(f"attach(probes=…) received {type(p).__name__}; expected probes of monitor.probes")
    if curvature is None:
        return asked
    from monitor.probes.curvature import Curvature

    if not (curvature == "auto" or isinstance(curvature, Curvature)):
        raise UsageError(f'attach(curvature=…) received {curvature!r:.80}; expected "auto" or a monitor.Curvature')
    return [*asked, Curvature() if curvature == "auto" else curvature]


def _script() -> str:
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    return _relative(str(file)) if file else "notebook"


def _default_folder(script: str) -> Path:
    path = Path(script)
    name = path.parent.name if path.stem == "__main__" else path.stem  # of a package that is run
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"
    return Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _short(path: Path | None) -> str:
    if path is None:
        return "nowhere"
    return plain(_relative(str(path)))


def _relative(path: str) -> str:
    """``path`` from the working directory if it lies below it: a run folder that travels names no machine."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).resolve().relative_to(Path.cwd()))
    return path


def _how_it_ended(error: BaseException | None) -> tuple[str, str | None]:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "finished", None
    said = f"{type(error).__name__}: {error}"[:1000]
    return ("interrupted" if isinstance(error, KeyboardInterrupt) else "failed"), said


def close_all(error: BaseException | None = None) -> None:
    """End every recording of this process; called when the interpreter goes."""
    error = error or getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    for handle in list(dict.fromkeys(_OPEN.values())):
        handle._close(*_how_it_ended(error))


atexit.register(close_all)
os.register_at_fork(after_in_child=_OPEN.clear)
