"""A ceiling on the memory of this process, kept by the system: what would pass it fails, and nothing else does."""

from __future__ import annotations

from pathlib import Path

from polyvec.batch.trial import WorkerError
from polyvec.errors import InputError


def set_ceiling(megabytes: float) -> None:
    """Let this process write to at most ``megabytes`` of its own memory (Linux, ``RLIMIT_DATA``).

    Weights that are mapped from their file and code are not counted: they are the system's to take back.
    Raises ``WorkerError`` where the process with its model already has more.
    """
    try:
        import resource

        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except (ImportError, OSError) as error:
        raise WorkerError(f"memory can have a ceiling on Linux alone, got: {error}; leave --memory out") from error
    used = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmData:"))
    if used > megabytes:
        raise WorkerError(f"memory must be more than the {used:.0f} MB of the model alone, got --memory {megabytes:g}")
    limit = int(megabytes * 2**20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def told(error: Exception, megabytes: float | None) -> Exception:
    """Return ``error``, in one sentence if it is the ceiling's."""
    is_memory = isinstance(error, MemoryError) or any(s in str(error) for s in ("Failed to allocate", "bad_alloc"))
    if is_memory and megabytes is not None:
        return InputError(f"needs more memory than --memory {megabytes:g} MB")
    return error
