"""Recording a training script that was not changed: ``monitor run train.py …``."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from monitor.probes.curvature import Curvature
from monitor.record.attach import _OPEN, Handle, begin, close_all
from monitor.record.flush import to_stderr
from monitor.record.followed import find_models
from monitor.record.probe import Probe


class _Finder:
    """Finds the model of a script nobody told us about: the first module called to train, or the optimizer's."""

    def __init__(self, run_dir: Path | None, probes: Sequence[Probe]) -> None:
        self._run_dir = run_dir
        self._probes = probes
        self._handle: Handle | None = None
        self._hooks: list[Any] = [
            register_module_forward_pre_hook(self._called),
            register_optimizer_step_pre_hook(self._stepped),
        ]

    @property
    def found(self) -> bool:
        """True once something is being recorded."""
        return self._handle is not None

    def _called(self, module: nn.Module, args: Any) -> None:
        """The outermost module of the first call that can be trained. Runs before any compiled region is entered."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not module.training:
            return
        if any(p.requires_grad for p in module.parameters()):
            begun = not _OPEN
            self._begin([module])
            if begun and self._handle is not None and self._handle._recorder is not None:
                self._handle._recorder.forward_under_way(module, args)

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer steps before any module was called: its parameters lead to the module."""
        models = find_models(optimizer)
        if models:
            self._begin(models)

    def _begin(self, models: list[nn.Module]) -> None:
        self.stop()
        if _OPEN:  # the script attaches by itself
            self._handle = next(iter(_OPEN.values()))
            return
        try:
            self._handle = begin(models, self._run_dir, probes=self._probes, follow_all=True)
        except Exception as e:
            to_stderr(f"cannot record: {type(e).__name__}: {e} (training goes on)")

    def stop(self) -> None:
        """Stop looking."""
        for h in self._hooks:
            h.remove()
        self._hooks.clear()


def run_script(script: Path, argv: list[str], run_dir: Path | None, curvature: bool = False) -> int:
    """Run ``script`` as ``python script argv…`` would, recording what it trains.

    The model is the outermost module of the first training call; models of further optimizers are found from their
    parameters and followed too. ``__main__``, ``sys.argv`` and ``sys.path[0]`` are the script's own.

    Args:
        script: an existing Python file.
        argv: its arguments.
        run_dir: folder to write; default ``runs/<script>-<time>``.
        curvature: measure the curvature of the training loss too, as `monitor.attach` does with "auto".

    Returns:
        The exit status the script would have had by itself.
    """
    finder = _Finder(run_dir, [Curvature()] if curvature else [])
    sys.argv = [str(script), *argv]
    sys.path[0] = str(script.resolve().parent)
    error: BaseException | None = None
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as e:
        error = e
    except BaseException as e:
        error = e
        _print(e, script)
    finder.stop()
    close_all(error)
    if not finder.found:
        to_stderr(f"{script} called no optimizer step on a torch module; nothing was recorded")
    return _status(error)


def _print(error: BaseException, script: Path) -> None:
    """The traceback as the script alone would have printed it: without the frames of the launcher.

    Of a script that cannot be compiled there are no others, and Python prints none.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != str(script):
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


def _status(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1
