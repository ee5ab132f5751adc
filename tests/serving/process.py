"""``polyvec serve`` as a process of its own on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FAULTY = Path(__file__).with_name("faulty_server.py")
_PLAIN = ("-W", "error", "-c", "from polyvec.cli import app; app()")


def start(*arguments: object, program: Sequence[object] = _PLAIN) -> tuple[subprocess.Popen[str], str]:
    """Return the process and its address once it answers."""
    command = [sys.executable, *program, "serve", "--port", "0", "--engine", "onnx", *arguments]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, encoding="utf-8")
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    process.communicate()
    raise AssertionError("the server ended before it served: " + "".join(said))


def worker_pid(process: subprocess.Popen[str]) -> int | None:
    """Return the process that computes, None while there is none."""
    for task in os.listdir(f"/proc/{process.pid}/task"):  # a restarted worker is a child of the thread that did it
        for child in Path(f"/proc/{process.pid}/task/{task}/children").read_text().split():
            with contextlib.suppress(OSError):  # it may end while we look
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
    return None
