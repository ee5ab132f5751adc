"""The soak of ``benchmarks/soak.py`` for a quarter of a minute, with a model that breaks on some inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_short_soak_leaves_nothing_behind(model_folder: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    # Memory still settles within so short a time; a leak of every request would be far beyond this. Times are no test.
    options = ("--minutes", "0.25", "--slope", "200", "--p99", "inf", "--faults", "--model", str(model_folder))
    result = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "500: " in result.stdout and "400: " in result.stdout
