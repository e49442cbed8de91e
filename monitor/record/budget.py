"""What the recording itself costs, measured while it runs."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from monitor.record.flush import Flusher
    from monitor.record.mode import StepMode
    from monitor.record.recorder import Recorder

_CALLS, _ROUNDS = 100, 9


class Account:
    """Adds up the time spent in hooks, in the writer thread and in calls that the mode sees but does not watch.

    Time in hooks is wall time on the training thread, compared with the wall time of the run; the writer's is the
    thread's CPU time, compared with the CPU time of the process.
    """

    def __init__(self, recorder: Recorder, flusher: Flusher) -> None:
        self._recorder = recorder
        self._flusher = flusher
        self._per_call = dispatch_cost(recorder.mode)
        self._wall = time.perf_counter()
        self._cpu = time.process_time()

    def report(self) -> dict[str, Any]:
        """The account so far.

        Returns:
            ``fraction``: what training is slower by, all parts together; ``training_thread``, ``dispatch``, ``writer``,
            ``probes``:
            its parts; ``seconds``: hook time; ``steps``. Fractions of the time that remains without us.
        """
        wall = max(1e-9, time.perf_counter() - self._wall)
        cpu = max(1e-9, time.process_time() - self._cpu)
        probes = self._recorder.probed
        hooks, dispatch = self._recorder.spent - probes, self._recorder.mode.calls * self._per_call
        writer = self._flusher.cpu
        mine = hooks + dispatch + probes
        thread = hooks / max(1e-9, wall - mine)
        call = dispatch / max(1e-9, wall - mine)
        probe = probes / max(1e-9, wall - mine)
        # what training used of the CPU, taking our hooks to use it as the training does
        write = writer / max(1e-9, (cpu - writer) / (1 + thread + call + probe))
        return {
            "fraction": thread + call + write + probe,
            "training_thread": thread,
            "dispatch": call,
            "writer": write,
            "probes": probe,
            "seconds": hooks,
            "steps": self._recorder.rows,
        }


def dispatch_cost(mode: StepMode) -> float:
    """Seconds that one call costs more while ``mode`` is on the stack.

    Measured here and now on a thread of its own, whose stack of modes is empty: no mode of the user's sees it.
    """
    found: list[float] = []

    def measure() -> None:
        x = torch.zeros(1)
        calls = mode.calls
        for on in (False, True) * _ROUNDS:
            if on:
                mode.enter()
            begin = time.perf_counter()
            for _ in range(_CALLS):
                x.add(0)
            found.append(time.perf_counter() - begin)
            if on:
                mode.leave()
        mode.calls = calls

    thread = threading.Thread(target=measure, name="monitor-calibration")
    thread.start()
    thread.join()
    return max(0.0, min(found[1::2]) - min(found[::2])) / _CALLS
