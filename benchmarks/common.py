"""What the benchmarks share: texts, limits of the chip, memory, and the line that says where a number was taken."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from polyvec.model.config import ModelConfig
from polyvec.samples import corpus

MAX_TOKENS = 8192


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of log-normal length, median 60 tokens, to 8192, of words in many languages."""
    rng = np.random.default_rng(seed)
    words = [word for row in corpus() for word in row["text"].split()]
    lengths = np.clip(rng.lognormal(np.log(60), 0.9, count), 3, MAX_TOKENS) / 2  # about two tokens a word
    return [" ".join(rng.choice(words, int(length) + 1)) for length in lengths]


def matrix_rate(clock: Callable[[], float], size: int = 2048, repeats: int = 5) -> float:
    """Return the float32 operations a second of a large matrix product: what no float32 model exceeds.

    ``clock`` is that of what it is compared with: ``time.perf_counter`` for all cores, ``time.process_time`` for one.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        started = clock()
        a @ b
        seconds.append(clock() - started)
    return 2 * size**3 / min(seconds)


def randomise(encoder: Any) -> None:
    """Give every parameter of an encoder random values of the size of trained ones, scales of norms near 1."""
    from torch.nn.init import normal_  # here: torch must not weigh on what is measured

    for name, parameter in encoder.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        normal_(parameter.data, mean=1.0 if is_scale else 0.0, std=0.1 if is_scale else 0.02)


def operations(lengths: list[int], config: ModelConfig) -> float:
    """Return what the base encoder must multiply and add for texts of these token counts, padding not included."""
    from polyvec.training.utilisation import forward_flops  # here: torch must not weigh on what is measured

    return sum(forward_flops(config, lengths))


def memory_mb(field: str = "VmHWM", process: int | str = "self") -> float:
    """Return a field of Linux's account of a process: ``VmHWM`` is the peak of what was resident, mapped files too.

    Not getrusage: its peak starts at the size of the process that started this one.
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


def processes(pid: int) -> list[int]:
    """Return ``pid`` and its children."""
    children = [Path(f"/proc/{pid}/task/{task.name}/children") for task in Path(f"/proc/{pid}/task").iterdir()]
    return [pid, *(int(child) for path in children for child in path.read_text().split())]


def cpu_seconds(process: int) -> float:
    """Return the seconds of a core that a process has used, its ended threads included, by Linux's account."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """Return the seconds of a core that all processes of the machine have used since it started."""
    user, nice, system, _, _, interrupts, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def forget_peak() -> None:
    """Let ``VmHWM`` start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def where(*packages: str) -> str:
    """Return processor, cores, commit and versions in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    best = next((name for name in ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2") if name in flags), "none")
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    found = []
    for name in ("polyvec", "onnxruntime", *packages):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return (
        f"{cpu} ({best}), {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(found)}, "
        f"commit {commit.stdout.strip()}"
    )
