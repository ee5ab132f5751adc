"""Workers of one machine have cores of their own, and a dead one's are free again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, sys
from pathlib import Path
from polyvec.batch.cores import take_cores
cores = take_cores(int(sys.argv[2]), Path(sys.argv[1]))
assert not cores or os.sched_getaffinity(0) == cores
print(*sorted(cores), flush=True)
sys.stdin.read()
"""
ALL = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class Holder:
    """A process that takes cores and keeps them until it is killed."""

    def __init__(self, folder: Path, count: int) -> None:
        command = [sys.executable, "-c", CODE, str(folder), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.cores = [int(core) for core in self.process.stdout.readline().split()]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.skipif(len(ALL) < 2, reason="needs two cores")
def test_no_two_have_the_same_core_and_a_dead_one_s_is_free(tmp_path: Path) -> None:
    holders = [Holder(tmp_path, 1) for _ in ALL]
    try:
        assert sorted(core for holder in holders for core in holder.cores) == ALL
        late = Holder(tmp_path, 1)
        assert late.cores == []  # it runs, on any
        late.kill()
        holders[0].kill()
        again = Holder(tmp_path, 1)
        assert again.cores == holders[0].cores
        again.kill()
        holders[1].kill()
        wide = Holder(tmp_path, 2)
        assert wide.cores == sorted(holders[0].cores + holders[1].cores)
        wide.kill()
    finally:
        for holder in holders:
            holder.kill()


@pytest.mark.skipif(not ALL, reason="needs affinity")
def test_too_many_takes_none(tmp_path: Path) -> None:
    greedy = Holder(tmp_path, len(ALL) + 1)
    greedy.kill()
    whole = Holder(tmp_path, len(ALL))
    whole.kill()
    assert (greedy.cores, whole.cores) == ([], ALL)
