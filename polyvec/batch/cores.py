"""Cores of a machine, shared out among the workers on it without anyone to ask."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

_held: list[IO[bytes]] = []  # open until the process ends, however it ends: then the kernel lets the locks go


def take_cores(count: int, folder: Path | None = None) -> frozenset[int]:
    """Keep this thread, and those that it starts, on ``count`` cores that no other worker of this user has.

    Returns them; where fewer are free, or the system has no affinity, nothing, and the thread stays where it may run.
    ``folder`` is where the locks lie, one file a core; by default the system's for temporary files.
    """
    if not hasattr(os, "sched_setaffinity"):
        return frozenset()
    import fcntl

    folder = folder or Path(tempfile.gettempdir())
    taken: dict[int, IO[bytes]] = {}
    for core in sorted(os.sched_getaffinity(0)):
        if len(taken) == count:
            break
        with suppress(OSError):  # held by another, or another user's file
            file = (folder / f"polyvec-core-{core}-of-{os.getuid()}").open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken[core] = file
            except OSError:
                file.close()
    if len(taken) < count:
        for lock in taken.values():
            lock.close()
        return frozenset()
    os.sched_setaffinity(0, taken)
    _held.extend(taken.values())
    return frozenset(taken)
