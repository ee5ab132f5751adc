"""The attention kernel of short texts is the one that was measured faster here; long texts are always fused."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from polyvec.training import kernels
from polyvec.training.loop import training_kernels

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[SDPBackend]]:
    """What is timed, on a machine of which nothing is known: in bfloat16 keeping scores is the faster."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.keeps_scores.cache_clear()
    found: list[SDPBackend] = []

    def seconds(backend: SDPBackend, bf16: bool) -> float:
        found.append(backend)
        return 0.5 if bf16 and backend == SDPBackend.MATH else 1.0 if backend == SDPBackend.FLASH_ATTENTION else 0.95

    monkeypatch.setattr(kernels, "_seconds", seconds)
    yield found
    kernels.keeps_scores.cache_clear()


@pytest.mark.parametrize(
    ("bf16", "longest", "is_fused"), [(False, 64, True), (True, 128, False), (True, 129, True), (True, math.inf, True)]
)
def test_scores_are_kept_where_that_was_clearly_faster(
    timed: list[SDPBackend], bf16: bool, longest: float, is_fused: bool
) -> None:
    with training_kernels(CPU, bf16=bf16, longest=longest):
        assert torch.backends.cuda.flash_sdp_enabled() == is_fused  # type: ignore[no-untyped-call]
    assert bool(timed) == (longest <= 128)


def test_the_measurement_is_remembered(timed: list[SDPBackend]) -> None:
    assert kernels.keeps_scores(bf16=True)
    count = len(timed)
    kernels.keeps_scores.cache_clear()
    assert kernels.keeps_scores(bf16=True) and len(timed) == count


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the C library of GNU")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_stays_where_it_is_asked_for(kept: bool) -> None:
    program = (
        "import resource, sys, torch; from polyvec.training.kernels import keep_freed_memory\n"
        f"if {kept}: keep_freed_memory()\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "before = resident(); torch.ones(25_000_000); print(resident() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 90_000_000) == kept


def test_a_real_measurement_times_both() -> None:
    assert all(kernels._seconds(backend, False) > 0 for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION))
