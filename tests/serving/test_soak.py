"""The soak of ``benchmarks/soak.py`` with a model that breaks on some inputs.

For a quarter of a minute; ``POLYVEC_SOAK=2 pytest tests/serving/test_soak.py`` makes it two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MINUTES = os.environ.get("POLYVEC_SOAK", "0.25")


def test_a_short_soak_leaves_nothing_behind(model_folder: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    # Memory still settles within so short a time; a leak of every request would be far beyond this. Times are no test.
    options = ("--minutes", MINUTES, "--slope", "200", "--p99", "inf", "--faults", "--model", str(model_folder))
    result = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, timeout=180 + 60 * float(MINUTES)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "500: " in result.stdout and "400: " in result.stdout
