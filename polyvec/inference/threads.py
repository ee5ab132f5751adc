"""How many CPU threads this process may run at once: fewer than the machine's cores in most containers."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores that affinity and the CPU quotas of this process's cgroups leave it, at least 1.

    A thread pool of the machine's size in a container of two cores' quota spends its quota on waiting threads and is
    then stopped for the rest of each period. ``root`` is where ``proc`` and ``sys`` lie.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def physical_cores(root: Path = Path("/")) -> int:
    """Return the usable cores, where two threads of one core, which share its arithmetic units, count once."""
    cores = usable_cores(root)
    if not hasattr(os, "sched_getaffinity"):
        return cores
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings.add(path.read_text().strip() if path.exists() else str(cpu))
    return min(cores, len(siblings))


def _quotas(root: Path) -> list[float]:
    """Return the quotas, in cores, of this process's cgroups and of all above them."""
    quotas = []
    with suppress(OSError):  # not Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            folder = mount / name.lstrip("/")
            # In a container the name may be one of the host's, which is not to be seen: its mount is the group then.
            for group in [folder, *folder.parents]:
                if group == mount or mount in group.parents:
                    quotas += [quota for quota in (_quota(group),) if quota is not None]
    return quotas


def _quota(group: Path) -> float | None:
    """Return the cores that one group may use: cgroup v2's ``cpu.max``, or v1's two files; None without a limit."""
    with suppress(OSError, ValueError):
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        cores = float(quota) / float(period)  # "max" is no number, -1 is v1's word for no limit
        return cores if cores > 0 else None
    return None
