"""``python -m tests.store.endless FOLDER PROGRESS``: record until killed, and say after each step that it is done.

Writes the last finished step into PROGRESS (8 bytes). An existing run is resumed.
"""

from __future__ import annotations

import os
import struct
import sys
import time

import monitor.store.parts as parts
import monitor.store.writer as writer
from tests.store.kit import SMALL, Recorder, make_layout, use_definitions


def main(folder: str, progress: str) -> None:
    use_definitions()
    for name, value in (SMALL | {"writer.FLUSH_STEPS": 40}).items():
        module, _, constant = name.partition(".")
        setattr({"writer": writer, "parts": parts}[module], constant, value)
    recorder = Recorder(
        writer.RunWriter.create(folder, script="endless.py", resume=True), make_layout(), 8, threaded=True
    )
    out = os.open(progress, os.O_WRONLY | os.O_CREAT)
    step = recorder.writer.start_step
    while True:
        recorder.step(step)
        os.pwrite(out, struct.pack("<q", step), 0)
        step += 1
        time.sleep(0.0002)


if __name__ == "__main__":
    main(*sys.argv[1:])
