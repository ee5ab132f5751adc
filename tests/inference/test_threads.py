"""Thread pools are as large as what a container may use, not as the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polyvec import Embedder
from polyvec.inference import threads
from polyvec.inference.engines import onnx


def system(root: Path, cgroup: str, **files: str) -> Path:
    """Write /proc/self/cgroup and files of /sys/fs/cgroup under ``root``; ``__`` in a name stands for a slash."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max").replace("cfs_", "cpu.cfs_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {"cpu_max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu_max": "150000 100000\n"}, 2),  # one and a half cores keep two threads busy
        ("0::/\n", {"cpu_max": "20000 100000\n"}, 1),
        ("0::/\n", {"cpu_max": "max 100000\n"}, 16),
        ("0::/pod/box\n", {"pod__cpu_max": "300000 100000", "pod__box__cpu_max": "max 100000"}, 3),  # of its parent
        ("0::/elsewhere/on/host\n", {"cpu_max": "400000 100000"}, 4),
        ("3:memory:/\n1:cpu,cpuacct:/\n", {"cpu__cfs_quota_us": "250000", "cpu__cfs_period_us": "100000"}, 3),
        ("1:cpu:/\n", {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, 16),
        ("0::/\n", {"cpu_max": "nonsense"}, 16),
        ("0::/\n", {}, 16),
    ],
)
def test_a_quota_bounds_the_cores(tmp_path: Path, cgroup: str, files: dict[str, str], cores: int) -> None:
    assert threads.usable_cores(system(tmp_path, cgroup, **files)) == cores


def test_without_cgroups_affinity_counts(tmp_path: Path) -> None:
    assert threads.usable_cores(tmp_path) == 16


@pytest.mark.parametrize(("quota", "cores"), [("max", 8), ("300000", 3)])
def test_two_threads_of_a_core_count_once(tmp_path: Path, quota: str, cores: int) -> None:
    system(tmp_path, "0::/\n", cpu_max=f"{quota} 100000\n")
    for cpu in range(16):
        path = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    assert threads.physical_cores(tmp_path) == cores


def test_without_a_topology_every_core_counts(tmp_path: Path) -> None:
    assert threads.physical_cores(tmp_path) == 16


def test_the_engine_takes_no_more_threads_than_it_may_run(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for usable, asked, wanted in ((1, None, 1), (3, None, 3), (16, None, 0), (1, 2, 2)):  # 0: ONNX Runtime decides
        monkeypatch.setattr(onnx, "usable_cores", lambda usable=usable: usable)
        engine = Embedder(model_folder, engine="onnx", threads=asked).engine
        assert isinstance(engine, onnx.OnnxEngine)
        assert engine.session_options.intra_op_num_threads == wanted
