"""A real Ray cluster of two nodes on this machine, and kill -9."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyvec.batch.engines import OnRay
from polyvec.errors import InputError

KILLS = Path(__file__).parents[2] / "benchmarks" / "kills.py"


def test_killed_at_random_a_cluster_gives_the_bytes_of_a_clean_process(calibrated: Path) -> None:
    # A process of its own: Ray's warnings are not ours to raise, nor its threads to leave in this one.
    command = [sys.executable, str(KILLS), "--texts", "800", "--kills", "3", "--part-rows", "40", "--engine", "onnx"]
    done = subprocess.run([*command, "--model", str(calibrated)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert sorted(kill["kind"] for kill in result["killed"]["kills"]) == ["driver", "raylet", "worker"]
    verdict = result["verdict"]
    assert verdict["equal"] == verdict["parts"] == 20 and verdict["same_order"]
    assert verdict["missing"] == verdict["extra"] == 0 and not verdict["left_over"]
    assert result["clean"]["rows"] == 800 > result["clean"]["distinct"]


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself, also where it finds no cluster; what comes after gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own import, which pkg_resources and others raise
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_one_sentence(address: str) -> None:
    with pytest.raises(InputError, match="cluster must be reachable, got .*; start one with: ray start --head"):
        OnRay(address)
