"""``polyvec serve`` as a process of its own on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

FAULTY = Path(__file__).with_name("faulty_server.py")
_LOGS: dict[int, IO[bytes]] = {}
_SECONDS: dict[int, float] = {}
_PLAIN = ("-W", "error", "-c", "from polyvec.cli import app; app()")


def start(
    *arguments: object, program: Sequence[object] = _PLAIN, engine: str = "onnx"
) -> tuple[subprocess.Popen[bytes], str]:
    """Return the process and its address once it answers. ``stop`` it, which gives its log."""
    command = [sys.executable, *program, "serve", "--port", "0", "--engine", engine, *arguments]
    began = time.monotonic()
    log = tempfile.TemporaryFile("w+b")  # not a pipe: it fills up when nobody reads, and the server would wait
    process = subprocess.Popen([*map(str, command)], stderr=log)
    _LOGS[process.pid] = log
    while process.poll() is None:
        if found := re.search(r"http://\S+", _said(process)):
            _SECONDS[process.pid] = time.monotonic() - began
            return process, found[0]
        time.sleep(0.02)
    raise AssertionError("the server ended before it served: " + stop(process))


def start_seconds(process: subprocess.Popen[bytes]) -> float:
    """Return what ``start`` took."""
    return _SECONDS[process.pid]


def stop(process: subprocess.Popen[bytes]) -> str:
    """End the server with SIGTERM, within 30 s, and return all that it has logged."""
    process.terminate()
    process.wait(30)
    said = _said(process)
    _LOGS.pop(process.pid).close()
    return said


def _said(process: subprocess.Popen[bytes]) -> str:
    # By position: the server writes through the same open file, whose place must not move.
    return os.pread(_LOGS[process.pid].fileno(), 1 << 26, 0).decode()


def worker_pid(process: subprocess.Popen[bytes]) -> int | None:
    """Return the process that computes, None while there is none."""
    for task in os.listdir(f"/proc/{process.pid}/task"):  # a restarted worker is a child of the thread that did it
        for child in Path(f"/proc/{process.pid}/task/{task}/children").read_text().split():
            with contextlib.suppress(OSError):  # it may end while we look
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
    return None
