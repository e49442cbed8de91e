"""Recording a training script that was not changed: ``monitor run train.py …``."""

from __future__ import annotations

import gc
import io
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from pkgutil import get_importer
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook, register_module_module_registration_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from monitor.errors import UsageError
from monitor.probes.curvature import Curvature
from monitor.record.attach import _OPEN, Handle, _short, begin, close_all
from monitor.record.copies import HiddenHooks
from monitor.record.flush import to_stderr
from monitor.record.followed import find_models, find_whole
from monitor.record.private import transformed
from monitor.record.probe import Probe
from monitor.record.recorder import Recorder
from monitor.record.told import Told


class _Finder:
    """Finds the model of a script nobody told us about: the first module called to train, or the optimizer's.

    A script that trains one model after another, each with an optimizer of its own, gives a run for each.
    """

    def __init__(self, run_dir: Path | None, probes: Sequence[Probe], every: int) -> None:
        self._run_dir = run_dir
        self._probes = probes
        self._every = every
        self._handle: Handle | None = None
        self._begun = False  # by us, not by the script
        self._told = Told()
        self._tried: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._failed = False
        self._calls = register_module_forward_pre_hook(partial(self._guard, self._called))
        self._hooks: list[Any] = [
            self._calls,
            register_module_module_registration_hook(partial(self._guard, self._registered)),
        ]
        self._steps = register_optimizer_step_pre_hook(partial(self._guard, self._stepped))
        self._first: Any = None

    @property
    def found(self) -> bool:
        """True once something is being recorded."""
        return self._handle is not None

    @property
    def _recorder(self) -> Recorder | None:
        """What records, if it was begun here and goes on."""
        return self._handle._recorder if self._begun and self._handle is not None else None

    def _guard(self, what: Callable[..., Any], *args: Any) -> Any:
        """What it returns; an error of ours is said once, and no more is looked for."""
        if self._failed:
            return None
        try:
            return what(*args)
        except Exception as e:
            self._failed = True
            to_stderr(f"cannot record: {type(e).__name__}: {e} (training goes on)")
            return None

    def _called(self, module: nn.Module, args: Any) -> None:
        """The outermost module of the first call that can be trained. Runs before any compiled region is entered."""
        if _trains(module) and any(p.requires_grad for p in module.parameters()):
            self._begin([module])
            if self._recorder is not None:
                self._recorder.forward_under_way(module, args)

    def _registered(self, module: nn.Module, name: str, part: nn.Module | None) -> None:
        """`torch.compile` makes a module: from now on a hook on all calls would be compiled too, and warned of."""
        if name == "_orig_mod":
            self._calls.remove()
            hidden, entered = HiddenHooks(module), partial(self._guard, self._entered)
            self._hooks += [hidden.hide(module.register_forward_pre_hook(entered)), hidden]

    def _entered(self, module: nn.Module, args: Any) -> None:
        """A compiled module is called, of which it may be a part that is of interest."""
        if not _trains(module):
            return
        whole = find_whole(module)
        if whole is module:
            self._called(module, args)
        else:
            self._begin([whole])

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """An optimizer steps before any module was called, or that of another training: its parameters lead to it."""
        if optimizer in self._tried:
            return
        self._tried.add(optimizer)
        if self._handle is None or self._over(optimizer):
            # torch is going through the hooks of all optimizers, to which none can be added; next are this one's own
            self._first = optimizer.register_step_pre_hook(partial(self._guard, self._first_step))

    def _over(self, optimizer: Optimizer) -> bool:
        """True if what is recorded trains no longer, and ``optimizer`` trains something else, as with a new seed."""
        recorder = self._recorder
        if recorder is None or not recorder.rows:
            return False
        mine = {id(p) for root in recorder.roots for p in root.parameters()}
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            return False
        if recorder.optimizers:
            gc.collect()  # an optimizer and its scheduler hold each other
        return not recorder.optimizers

    def _first_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Returns: what the step is given, as a hook before it may say."""
        if self._first is not None:
            self._first.remove()
        models = find_models(optimizer)
        if not models:
            return None
        if self._handle is not None:
            self._handle.close()
        self._begin(models)
        return None if self._recorder is None else self._recorder._before_step(optimizer, args, kwargs)

    def _begin(self, models: list[nn.Module]) -> None:
        self._stop_looking()
        self._begun = not _OPEN
        if not self._begun:  # the script attaches by itself
            self._handle = next(iter(_OPEN.values()))
            return
        self._handle = begin(
            models, self._run_dir, probes=self._probes, every=self._every, follow_all=True, told=self._told
        )

    def _stop_looking(self) -> None:
        """No module is waited for any more."""
        for h in self._hooks:
            h.remove()
        self._hooks.clear()

    def sum_up(self) -> None:
        """Print what of many recordings was not printed one by one."""
        if self._handle is not None and self._handle.path is not None:
            self._told.sum_up(_short(self._handle.path.parent))

    def stop(self) -> None:
        """Begin no recording any more."""
        self._stop_looking()
        self._steps.remove()


def _trains(module: nn.Module) -> bool:
    """True if the call of ``module`` that begins is one of a training, and is no part of something compiled."""
    return not torch.compiler.is_compiling() and not transformed() and torch.is_grad_enabled() and module.training


@dataclass(frozen=True)
class _Main:
    """What is to be run as ``__main__``.

    Attributes:
        path: its file.
        folder: ``sys.path[0]`` while it runs.
        names: what Python puts into a ``__main__`` beforehand.
        code: makes its code; raises what Python would say of it.
    """

    path: str
    folder: str
    names: dict[str, Any]
    code: Callable[[], types.CodeType | None]


def find_script(script: Path) -> _Main:
    """What ``python script`` runs; ``script`` is an existing file, or a folder or zip file with a ``__main__.py``.

    Raises:
        UsageError: if it is a folder or a zip file without one.
    """
    # as Python does it: absolute, so that a script that changes folder still finds itself, and links not followed
    path = str(Path.cwd() / script)
    if get_importer(path) is not None:
        spec = PathFinder.find_spec("__main__", [path])
        if spec is None:
            raise UsageError(f"there is no __main__.py in {path}")
        return _found(spec, path)

    def code() -> types.CodeType:
        with io.open_code(path) as file:
            return compile(file.read(), path, "exec", dont_inherit=True)

    names = {"__loader__": SourceFileLoader("__main__", path), "__cached__": None}
    return _Main(path, str(script.resolve().parent), names, code)


def find_module(name: str) -> _Main:
    """What ``python -m name`` runs; importing the packages it is in.

    Raises:
        UsageError: if there is no such module, or it cannot be run.
        SystemExit: if one of the packages fails, after its traceback was printed, or ends the program.
    """
    sys.path[0] = folder = str(Path.cwd())
    try:
        spec = _find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = _find_spec(f"{name}.__main__")
    except (ImportError, AttributeError, TypeError, ValueError) as e:  # as runpy has it
        raise UsageError(f"module {name!r} cannot be found: {type(e).__name__}: {e}") from e
    if spec is None or spec.origin is None or not hasattr(spec.loader, "get_code"):
        raise UsageError(f"there is no module {name!r} that Python could run from {folder}")
    return _found(spec, folder)


def _find_spec(name: str) -> ModuleSpec | None:
    """`importlib.util.find_spec`; what goes wrong in a package, other than an import, is its user's."""
    package = name.rpartition(".")[0]
    if package and not name.startswith("."):
        try:
            __import__(package)
        except (ImportError, SystemExit):
            raise
        except BaseException as e:
            frames = e.__traceback__
            traceback.print_exception(type(e), e, frames and frames.tb_next)  # the first one is ours
            raise SystemExit(_status(e)) from None
    return find_spec(name)


def _found(spec: ModuleSpec, folder: str) -> _Main:
    loader: Any = spec.loader
    names = {"__loader__": loader, "__cached__": spec.cached, "__package__": spec.parent, "__spec__": spec}
    return _Main(str(spec.origin), folder, names, lambda: loader.get_code(spec.name))


def run_main(main: _Main, argv: list[str], run_dir: Path | None, curvature: bool = False, every: int = 1) -> int:
    """Run a script or a module as Python would, recording what it trains.

    The model is the outermost module of the first training call; models of further optimizers are found from their
    parameters and followed too. ``__main__``, ``sys.argv`` and ``sys.path[0]`` are the script's own.

    Args:
        main: of `find_script` or `find_module`.
        argv: ``sys.argv``, the name of the script first.
        run_dir: folder to write; default ``runs/<script>-<time>``.
        curvature: measure the curvature of the training loss too, as `monitor.attach` does with "auto".
        every: steps between two at which gradients and the like are looked at, as in `monitor.attach`.

    Returns:
        The exit status the script would have had by itself.
    """
    finder = _Finder(run_dir, [Curvature()] if curvature else [], every)
    sys.argv = argv
    sys.path[0] = main.folder
    sys.excepthook = sys.__excepthook__  # the command line's is not the script's
    error: BaseException | None = None
    try:
        _run(main)
    except SystemExit as e:
        error = e
    except BaseException as e:
        error = e
        _print(e, main.path)
    finder.stop()
    close_all(error)
    finder.sum_up()
    if not finder.found:
        to_stderr(f"{argv[0]} called no optimizer step on a torch module; nothing was recorded")
    return _status(error)


def _run(main: _Main) -> None:
    """Execute it as Python does, in a ``__main__`` that stays.

    `runpy` would change ``sys.argv[0]``, and put ours back at the end, when exit handlers and threads of the script
    still look for theirs.
    """
    module = types.ModuleType("__main__")
    module.__dict__.update(main.names, __file__=main.path, __annotations__={})
    code = main.code()
    sys.modules["__main__"] = module
    if code is not None:
        exec(code, module.__dict__)


def _print(error: BaseException, script: str) -> None:
    """The traceback as the script alone would have printed it, or as it has it printed: without the launcher's frames.

    Of a script that cannot be compiled there are no others, and Python prints none.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    try:
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    except Exception:
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
