"""torchrun over two nodes that are two network namespaces, each with an address of its own and nothing else shared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from polyvec.training.run import Run
from polyvec.training.stages import run_stage
from tests.training.test_stages import rows_of, toml_of

PORT = 29400
ADDRESSES = ("10.254.77.1", "10.254.77.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Two namespaces, joined by a cable."""
    names = [f"polyvec-{os.getpid()}-{i}" for i in range(2)]
    cable = [f"pv{os.getpid() % 10**8}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for name, end, address in zip(names, cable, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "eth0")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need the ip command and CAP_NET_ADMIN, got: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextmanager
def started(nodes: list[str], toml: Path, log: Path, *, restarts: int = 0) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run the documented command on each node; none of it is left when the context ends."""
    processes: list[subprocess.Popen[bytes]] = []
    for rank, name in enumerate(nodes):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank), "--max-restarts", str(restarts)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", "polyvec"]
        # A namespace's name is not its address, by which torchrun would know the node that holds the rendezvous.
        command += ["--rdzv-conf", f"is_host={int(rank == 0)}"]
        command += ["--local-addr", ADDRESSES[rank], "-m", "polyvec", "train", str(toml)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        with (log / f"node{rank}.log").open("wb") as output:
            processes.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def prepare(folder: Path, model_folder: Path, **changes: Any) -> tuple[Run, Path]:
    """Return a run on one process, and the file of the same run on two."""
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of("pairs")))
    values = {
        "stage": "pairs", "data": (str(data),), "output": str(folder / "one"), "steps": 4, "model": str(model_folder),
        "batch_size": 10, "part_tokens": 200, "max_tokens": 64, "learning_rate": 1e-5, "warmup_steps": 1, **changes,
    }  # fmt: skip
    run = Run(**values)
    return run, toml_of(replace(run, output=str(folder / "two")), folder / "run.toml")


def check_equal(folder: Path) -> None:
    first, second = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-6, rtol=1e-5, msg=name)


def logs(folder: Path) -> str:
    return "\n".join((folder / f"node{rank}.log").read_text()[-3000:] for rank in range(2))


def test_two_nodes_meet_and_train_what_one_process_trains(tmp_path: Path, model_folder: Path, nodes: list[str]) -> None:
    run, toml = prepare(tmp_path, model_folder)
    run_stage(run)
    with started(nodes, toml, tmp_path) as processes:
        assert [process.wait(timeout=240) for process in processes] == [0, 0], logs(tmp_path)
    check_equal(tmp_path)


def test_a_process_that_dies_is_started_again_and_the_run_goes_on(
    tmp_path: Path, model_folder: Path, nodes: list[str]
) -> None:
    run, toml = prepare(tmp_path, model_folder, steps=60, save_every=2)
    run_stage(run)
    checkpoint = tmp_path / "two" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    # One death takes several restarts: the node that lost its peer and the peer itself come back at different times.
    with started(nodes, toml, tmp_path, restarts=8) as processes:
        while saved_steps(checkpoint) < 2:
            assert time.monotonic() < deadline and processes[0].poll() is None, logs(tmp_path)
            time.sleep(0.05)
        os.kill(worker_below(processes[1].pid), signal.SIGKILL)
        assert [process.wait(timeout=240) for process in processes] == [0, 0], logs(tmp_path)
    assert "(exitcode: -9)" in (tmp_path / "node1.log").read_text()
    check_equal(tmp_path)


def saved_steps(checkpoint: Path) -> int:
    if not checkpoint.exists():
        return 0
    with safe_open(checkpoint, framework="pt") as file:
        return len(file.get_tensor("losses"))


def worker_below(pid: int) -> int:
    """Return the process that trains under a torchrun."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if command else 0
        except OSError:
            continue
        if parent == pid and b"polyvec" in command:
            return int(entry.name)
    raise AssertionError(f"no worker below {pid}")
