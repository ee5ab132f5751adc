"""A job on a cluster that is killed at random, against a clean run: the same parts, byte for byte.

    python benchmarks/kills.py --data texts.parquet --column en --texts 200000 --kills 10 --part-rows 2048

Starts a Ray cluster of two nodes on this machine. Whenever a random number of parts is finished, kill -9 ends the
driver, a worker process, or a raylet (one of the second node, which is then replaced, or of the first one, with which
the cluster ends and a new one starts). A driver that is gone starts again with the same command. The clean run is one
process without Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import where

from polyvec.samples import corpus

KINDS = ("driver", "worker", "raylet", "head")
OBJECT_STORE_BYTES = 150_000_000


class TwoNodes:
    """A cluster of two nodes with a core each."""

    def __init__(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self.start()

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        arguments = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=arguments)
        self.second = self._join()

    def _join(self) -> Any:
        node = self.cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
        self.cluster.wait_for_nodes()
        return node

    def kill_raylet(self) -> None:
        """End the second node's raylet; another node takes its place."""
        os.kill(_pid(self.second), signal.SIGKILL)
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self._join()

    def kill_head(self) -> None:
        """End the first node's raylet, and with it the cluster; start another."""
        os.kill(_pid(self.cluster.head_node), signal.SIGKILL)
        self.stop()
        self.start()

    def kill_worker(self) -> bool:
        """End one of the processes that hold a model, if there is one."""
        nodes = {_pid(self.second), _pid(self.cluster.head_node)}
        workers = [pid for pid, parent, name in _processes() if parent in nodes and "_Embed" in name]
        if workers:
            os.kill(random.choice(workers), signal.SIGKILL)
        return bool(workers)

    def stop(self) -> None:
        self.cluster.shutdown()


def _pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _processes() -> list[tuple[int, int, str]]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            status = (entry / "stat").read_text() if entry.name.isdigit() else ""
            name = (entry / "cmdline").read_text() if status else ""
        except OSError:
            continue
        if status:
            found.append((int(entry.name), int(status.rpartition(")")[2].split()[1]), name))
    return found


def write_input(folder: Path, options: argparse.Namespace) -> None:
    """Write the texts in the order of their file, as two files of Parquet."""
    if options.data:
        batches = pq.ParquetFile(options.data).iter_batches(columns=[options.column], batch_size=8192)
        texts: list[str] = []
        for batch in batches:
            texts += batch.column(0).to_pylist()
            if len(texts) >= options.texts:
                break
    else:
        rng = random.Random(0)
        words = [word for row in corpus() for word in row["text"].split()]
        texts = [" ".join(rng.choices(words, k=rng.choice([1, 1, 6, 12]))) for _ in range(options.texts)]
    texts = texts[: options.texts]
    folder.mkdir()
    half = len(texts) // 2
    for name, part in (("a", texts[:half]), ("b", texts[half:])):
        pq.write_table(pa.table({"text": part}), folder / f"{name}.parquet", row_group_size=options.part_rows * 4)


def embed(folder: Path, output: str, options: argparse.Namespace, *more: str) -> list[str]:
    model = ["--model", options.model] if options.model else []
    fixed = ["--dtype", "int8", "--engine", options.engine, "--part-rows", str(options.part_rows)]
    program = [sys.executable, "-c", "from polyvec.cli import app; app()", "embed"]
    return [*program, str(folder / "input"), "-o", str(folder / output), *fixed, *model, *more]


def killed_run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the job to its end through all kills, and say what was killed when."""
    rng = random.Random(options.seed)
    total = len(list((folder / "clean").glob("part-*")))
    moments = sorted(rng.sample(range(1, total - 1), options.kills))
    kinds = [KINDS[i % len(KINDS)] for i in range(options.kills)]
    rng.shuffle(kinds)
    receipts = folder / "killed" / "_work" / "receipts"
    nodes = TwoNodes()
    log: list[dict[str, Any]] = []
    starts = 0
    started = time.monotonic()
    driver: subprocess.Popen[bytes] | None = None
    errors = (folder / "driver.log").open("wb")
    try:
        while True:
            if driver is None or driver.poll() is not None:
                if driver is not None and driver.returncode == 0:
                    break
                starts += 1
                if starts > options.kills * 2 + 2:
                    raise SystemExit(f"the job does not end:\n{(folder / 'driver.log').read_text()[-3000:]}")
                command = embed(folder, "killed", options, "--cluster", nodes.cluster.address)
                driver = subprocess.Popen(command, stdout=errors, stderr=errors)
            time.sleep(0.1)
            done = len(list(receipts.glob("*.json"))) if receipts.is_dir() else 0
            if kinds and done >= moments[0]:
                kind = kinds[0]
                if kind == "driver":
                    driver.kill()
                    driver.wait()
                elif kind == "raylet":
                    nodes.kill_raylet()
                elif kind == "head":
                    nodes.kill_head()
                elif not nodes.kill_worker():
                    continue
                log.append({"kind": kind, "parts_done": done, "second": round(time.monotonic() - started, 1)})
                kinds.pop(0)
                moments.pop(0)
    finally:
        nodes.stop()
        if driver is not None and driver.poll() is None:
            driver.kill()
        errors.close()
    return {"kills": log, "starts": starts, "seconds": round(time.monotonic() - started, 1), "not_killed": kinds}


def compare(clean: Path, killed: Path) -> dict[str, Any]:
    """Return how many parts are equal byte for byte, and what is only on one side."""
    names = {path.name for path in clean.glob("part-*")}
    others = {path.name for path in killed.glob("part-*")}
    equal = sum((clean / name).read_bytes() == (killed / name).read_bytes() for name in names & others)
    orders = [
        [part["name"] for part in json.loads((f / "_manifest.json").read_text())["parts"]] for f in (clean, killed)
    ]
    return {
        "parts": len(names), "equal": equal, "missing": len(names - others), "extra": len(others - names),
        "same_order": orders[0] == orders[1], "left_over": (killed / "_work").exists(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--part-rows", type=int, default=100)
    parser.add_argument("--data", help="Parquet file; the sample corpus if left out.")
    parser.add_argument("--column", default="text")
    parser.add_argument("--model")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Where to work, kept; goes on with what is there.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "input").exists():
            folder.mkdir(exist_ok=True)
            write_input(folder / "input", options)
        started = time.monotonic()
        subprocess.run(embed(folder, "clean", options), check=True, stdout=subprocess.DEVNULL)
        clean_seconds = round(time.monotonic() - started, 1)
        killed = killed_run(folder, options)
        summary = json.loads((folder / "clean" / "_manifest.json").read_text())["summary"]
        verdict = compare(folder / "clean", folder / "killed")
    machine = where("ray", "pyarrow")
    result = {"machine": machine, "clean": {**summary, "seconds": clean_seconds}, "killed": killed, "verdict": verdict}
    print(json.dumps(result, indent=1))
    is_same = verdict["equal"] == verdict["parts"] and not (verdict["missing"] or verdict["extra"])
    sys.exit(0 if is_same and verdict["same_order"] and not verdict["left_over"] else 1)


if __name__ == "__main__":
    main()
