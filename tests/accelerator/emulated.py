"""The device of `device.cpp`: how it is built, put under torch as ``emulated``, and asked what was waited for."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import traceback
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "emulated"
#: Operations that only make another view of a tensor: nothing is launched for them.
_VIEWS = frozenset((
    "alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "movedim", "permute", "reshape", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "_reshape_alias", "_unsafe_view",
))  # fmt: skip


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return shutil.which("c++") or shutil.which("g++")


def build(folder: Path) -> Path:
    """The library, compiled into ``folder`` unless it is there already.

    Raises:
        subprocess.CalledProcessError: if the compiler fails.
    """
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"{key}.so"
    if not library.exists():
        fresh = library.with_suffix(f".{id(library)}")
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        there = [*(f"-I{p}" for p in include_paths()), *(f"-L{p}" for p in library_paths())]
        order = [compiler() or "c++", "-O1", "-std=c++20", "-fPIC", "-shared", abi, str(SOURCE), "-o", str(fresh)]
        subprocess.run([*order, *there, "-lc10", "-ltorch_cpu", "-ltorch"], check=True, capture_output=True, text=True)
        fresh.rename(library)
    return library


def start(library: Path) -> torch.device:
    """Put the device under torch, for the rest of this process."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    known: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "is_current_stream_capturing": torch.ops.emulated.capturing,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),  # it draws from the host's generator
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    vars(module).update(known)
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME)


class Waits:
    """Counts, while it is open, where the host waits for the device: the reason and the innermost lines of ``part``.

    Args:
        part: what the path of a file has in it to be named; a wait of nobody else is the training's own.

    Attributes:
        found: where, and how often.
        measuring: how often in a probe, which may wait as long as its share of the time allows.
    """

    def __init__(self, part: str) -> None:
        self._part = part
        self.found: Counter[str] = Counter()
        self.measuring = 0

    def __enter__(self) -> Waits:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("always")
        self._shown, warnings.showwarning = warnings.showwarning, self._show
        torch.set_warn_always(True)
        torch.ops.emulated.say(True)
        return self

    def _show(self, message: Warning | str, *args: Any) -> None:
        _, found, why = str(message).partition("the host waits for the device: ")
        if found:
            lines = [f for f in traceback.extract_stack() if self._part in f.filename]
            if any(f.name == "_measure" and f.filename.endswith("sites/probe.py") for f in lines):
                self.measuring += 1
            elif lines and not lines[-1].filename.endswith("mode.py"):  # which calls what the training calls
                where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(lines[-3:]))
                self.found[f"{why.split(' (')[0]} in {where}"] += 1

    def __exit__(self, *error: object) -> None:
        torch.ops.emulated.say(False)
        torch.set_warn_always(False)
        warnings.showwarning = self._shown
        self._caught.__exit__(None, None, None)


class Operations(TorchDispatchMode):
    """Counts, while it is open, the operations that are launched on a device, by name; lists count once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _VIEWS and _on_device((args, result)):
            self.found[name] += 1
        return result


def _on_device(x: object) -> bool:
    if isinstance(x, torch.Tensor):
        return x.device.type == NAME
    return isinstance(x, tuple | list) and any(map(_on_device, x))
