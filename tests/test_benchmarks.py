"""Benchmarks that no machine of the tests can run in earnest do run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_benchmark_of_a_gpu_compares_equal_vectors_on_a_cpu() -> None:
    options = (
        "--shape tiny --device cpu --texts 16 --repeats 1 --seconds 600 --sections rate tasks --mixes short log-normal"
    )
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "gpu.py"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    systems = "polyvec, eager|polyvec, compiled|transformers, sdpa"
    rows = re.findall(rf"^\| (short|log-normal) \| ({systems}) \| (\S+) ", done.stdout, re.MULTILINE)
    assert len(rows) == 6 and all(float(cosine) > 0.99999 for _, _, cosine in rows)
    assert "| polyvec, eager | five | " in done.stdout
    assert "flash_attention_2 left out: ImportError" in done.stdout


def test_a_section_of_the_benchmark_that_fails_or_is_late_leaves_the_others_alone() -> None:
    options = "--shape tiny --device cpu --texts 16 --repeats 1 --seconds 0 --sections texts latency"
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "gpu.py"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "texts ended early: WeightsError" in done.stdout
    assert "polyvec, eager left out: no time left of the section's 0 s" in done.stdout


def test_the_benchmark_of_training_compares_equal_losses(tmp_path: Path) -> None:
    options = f"--together --shapes tiny --batch 8 --steps 1 --repeats 1 --texts 24 --out {tmp_path / 'out.md'}"
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "training_throughput.py"), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "out.md").read_text()
    assert set(said.splitlines()) <= set(done.stdout.splitlines())
    losses = [re.findall(r" (\d+\.\d{4})", line) for line in said.splitlines() if "loss of one batch" in line]
    assert [len(found) for found in losses] == [2, 4]
    rows = re.findall(r"^\| (masked words|pairs) \| 8 \| ([^|]+) \| ([\d,]+) \|", said, re.MULTILINE)
    assert len(rows) == 6 and all(int(rate.replace(",", "")) > 0 for _, _, rate in rows)


def test_the_pictures_of_performance_are_those_of_the_results(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(BENCHMARKS / "plots.py"), str(tmp_path)], check=True)
    drawn = {path.name for path in tmp_path.iterdir()}
    text = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    assert drawn == set(re.findall(r"images/(\S+\.svg)", text))
    for path in tmp_path.iterdir():
        kept = (BENCHMARKS.parent / "docs" / "images" / path.name).read_text()
        words = [re.findall(r"<text[^>]*>([^<]*)</text>", picture) for picture in (path.read_text(), kept)]
        assert words[0] == words[1] and len(words[0]) > 5, f"{path.name} is old: run benchmarks/plots.py docs/images"
