"""A ceiling on the memory of this process, kept by the system: what would pass it fails, and nothing else does."""

from __future__ import annotations

import re
from pathlib import Path

from polyvec.batch.trial import WorkerError
from polyvec.errors import InputError

_REASON = re.compile(r"needs more memory than --memory (\S+) MB")


def set_ceiling(megabytes: float) -> None:
    """Let the memory that this process has written to grow to ``megabytes`` and no further (Linux, ``RLIMIT_DATA``).

    Weights that are mapped from their file and code are not counted: they are the system's to take back. What an
    allocator has reserved and not touched, a gigabyte in Arrow's case, is left aside.
    Raises ``WorkerError`` where the process with its model already has more.
    """
    try:
        import resource

        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except (ImportError, OSError) as error:
        raise WorkerError(f"memory can have a ceiling on Linux alone, got: {error}; leave --memory out") from error
    fields = dict(line.split(":", 1) for line in status.splitlines())
    reserved, used = (int(fields[name].split()[0]) * 1024 for name in ("VmData", "RssAnon"))
    left = megabytes * 2**20 - used
    if left < 0:
        raise WorkerError(
            f"memory must be more than the {used >> 20} MB of the model alone, got --memory {megabytes:g}"
        )
    resource.setrlimit(resource.RLIMIT_DATA, (reserved + int(left), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def told(error: Exception, megabytes: float | None) -> Exception:
    """Return ``error``, in one sentence if it is the ceiling's."""
    is_memory = isinstance(error, MemoryError) or any(s in str(error) for s in ("Failed to allocate", "bad_alloc"))
    if is_memory and megabytes is not None:
        return InputError(f"needs more memory than --memory {megabytes:g} MB")
    return error


def is_below(reason: str, megabytes: float | None) -> bool:
    """Whether ``told`` gave this reason for a ceiling lower than ``megabytes``, of which None is none."""
    found = _REASON.fullmatch(reason)
    return found is not None and (megabytes is None or float(found[1]) < megabytes)
