"""A job on a Ray cluster against the same job on one process, and against Ray Data with sentence-transformers.

    python benchmarks/batch.py --data texts.parquet --column text --texts 20000 --repeats 3

Every system runs in processes of its own; repeats alternate. ``process`` is ``polyvec embed`` into a folder, ``ray-1``
and ``ray-2`` the same on a cluster of one node, with one and two workers of one core; ``process`` uses all cores of the
machine. ``sentence-transformers-N`` is Ray Data as its documentation shows batch inference, with the same weights and N
workers of one core. Seconds are those of the whole command, start and planning included; ``embedding`` is from the
first file of vectors to the last, without what a larger input would not repeat. Memory is the proportional set size of
everything that was started, Ray's own processes included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from common import where

from polyvec import Embedder

SYSTEMS = ("process", "ray-1", "ray-2", "sentence-transformers-1", "sentence-transformers-2")
PACKAGES = ("ray", "torch", "sentence-transformers")

PEER = """
import sys, time
import numpy as np
import ray
from sentence_transformers import SentenceTransformer

source, output, model, workers, address = sys.argv[1:]
ray.init(address, log_to_driver=False)

class Embed:
    def __init__(self):
        import torch
        torch.set_num_threads(1)
        self.model = SentenceTransformer(model, device="cpu")

    def __call__(self, batch):
        batch["embedding"] = self.model.encode(list(batch["text"]), batch_size=32, normalize_embeddings=True)
        return batch

data = ray.data.read_parquet(source)
data = data.map_batches(Embed, concurrency=int(workers), batch_size=1024, num_cpus=1)
data.write_parquet(output)
"""


def memory_mb(root: int) -> float:
    """Return the proportional set size, in MB, of a process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
        except OSError:
            continue
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


class Peak:
    """The largest memory of this process's descendants while it is open."""

    def __enter__(self) -> Peak:
        self.mb, self._is_open = 0.0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._is_open:
            self.mb = max(self.mb, memory_mb(os.getpid()))
            time.sleep(1)

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._thread.join()


def command(system: str, folder: Path, output: Path, address: str, options: argparse.Namespace) -> list[str]:
    kind, _, workers = system.rpartition("-")
    if kind == "sentence-transformers":
        peer = folder / "peer.py"
        peer.write_text(PEER)
        return [sys.executable, str(peer), str(folder / "input"), str(output), str(folder / "hf"), workers, address]
    program = [sys.executable, "-c", "from polyvec.cli import app; app()", "embed", str(folder / "input")]
    program += ["-o", str(output), "--engine", options.engine, "--part-rows", str(options.part_rows)]
    return program if system == "process" else [*program, "--cluster", address, "--workers", workers]


def measure(system: str, folder: Path, number: int, options: argparse.Namespace) -> dict[str, float]:
    """Run one system once, on a cluster of its own where it needs one."""
    cluster: Any = None
    address = ""
    if system != "process":
        from ray.cluster_utils import Cluster

        # Of the peer's, reading and writing ask for a core each beside the models, and on two would wait for ever.
        cores = 4 if system.startswith("sentence") else 2
        arguments = {"num_cpus": cores, "object_store_memory": 300_000_000, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        address = cluster.address
    output = folder / f"{system}-{number}"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with Peak() as peak:
        started = time.time()
        line = command(system, folder, output, address, options)
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        seconds = time.time() - started
    if cluster is not None:
        cluster.shutdown()
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-3000:]}")
    parts = sorted(path.stat().st_mtime for path in output.glob("*.parquet"))
    return {"seconds": seconds, "embedding": parts[-1] - parts[0] if len(parts) > 1 else seconds, "peak_mb": peak.mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=10000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part-rows", type=int, default=1024)
    parser.add_argument("--data", required=True, help="Parquet file.")
    parser.add_argument("--column", default="text")
    parser.add_argument("--most-characters", type=int, default=10**9, help="Leave longer texts out.")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--folder", type=Path, help="Where to work; runs that are there already are kept.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "input").exists():
            (folder / "input").mkdir()
            table = pq.ParquetFile(options.data).read(columns=[options.column]).rename_columns(["text"])
            short = (text for text in table["text"].to_pylist() if len(text) <= options.most_characters)
            texts = pa.table({"text": list(dict.fromkeys(short))[: options.texts]})
            pq.write_table(texts, folder / "input" / "a.parquet", row_group_size=4 * options.part_rows)
        mini = Embedder()
        if not (folder / "hf").exists():
            from polyvec.model.weights import load_encoder, save_hf

            save_hf(load_encoder(mini.folder), folder / "hf", mini.folder / "tokenizer.json")
        runs: dict[str, list[dict[str, float]]] = {system: [] for system in options.systems}
        for number in range(options.repeats):
            for system in options.systems:
                kept = folder / f"{system}-{number}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(measure(system, folder, number, options)))
                runs[system].append(json.loads(kept.read_text()))
    print(where(*PACKAGES))
    print(f"{options.texts} distinct texts, {options.repeats} alternating repeats, medians; {mini.engine.name}\n")
    print("| system | rows/s | seconds over process | embedding over process | peak MB |\n|---|---|---|---|---|")
    base = {key: statistics.median(r[key] for r in runs[options.systems[0]]) for key in ("seconds", "embedding")}
    for system in options.systems:
        middle = {key: statistics.median(r[key] for r in runs[system]) for key in ("seconds", "embedding", "peak_mb")}
        ratios = f"{middle['seconds'] / base['seconds']:.2f} | {middle['embedding'] / base['embedding']:.2f}"
        print(f"| {system} | {options.texts / middle['seconds']:.0f} | {ratios} | {middle['peak_mb']:.0f} |")


if __name__ == "__main__":
    main()
