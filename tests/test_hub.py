"""Data on a hub by ``hf://``: a server of its endpoints that reading needs, and the command as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyvec.samples import corpus
from polyvec.training.run import Run
from polyvec.training.stages import run_stage
from tests.training.test_stages import toml_of

REPO, COMMIT = "someone/pairs", "0" * 40
ROWS = [{"query": t[: len(t) // 2], "passage": t[len(t) // 2 :]} for t in (row["text"] for row in corpus())]


class Hub(BaseHTTPRequestHandler):
    """One public dataset, of the files in ``folder``; ``read`` collects the ranges that were asked for."""

    folder: Path
    read: list[tuple[str, str]]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if re.fullmatch(rf"/api/datasets/{REPO}(/revision/\w+)?", path):
            self.answer({"id": REPO, "sha": COMMIT, "private": False, "tags": []})
        elif match := re.fullmatch(rf"/api/datasets/{REPO}/tree/\w+/?(.*)", path):
            below = self.folder / match[1]
            is_deep = parse_qs(urlsplit(self.path).query).get("recursive") in (["True"], ["true"])
            found = below.rglob("*") if is_deep else below.glob("*")
            self.answer([self.entry(file) for file in sorted(found)] if below.is_dir() else None)
        elif (match := re.fullmatch(rf"/datasets/{REPO}/resolve/\w+/(.+)", path)) and (
            self.folder / match[1]
        ).is_file():
            self.part_of(match[1], (self.folder / match[1]).read_bytes())
        else:
            self.answer(None)

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        is_json = self.headers["Content-Type"].startswith("application/json")
        assert not is_json and self.path.startswith(f"/api/datasets/{REPO}/paths-info/"), self.path
        files = [self.folder / path for path in asked["paths"]]
        self.answer([self.entry(file) for file in files if file.exists()])

    def entry(self, file: Path) -> dict[str, Any]:
        kind = "directory" if file.is_dir() else "file"
        own = {} if file.is_dir() else {"size": file.stat().st_size}
        return {"type": kind, "oid": "1" * 40, "path": str(file.relative_to(self.folder)), **own}

    def part_of(self, name: str, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2] or len(content) - 1)) if asked else (0, len(content) - 1)
        self.read.append((name, self.command))
        self.send(206 if asked else 200, content[first : last + 1], "application/octet-stream")

    def answer(self, value: Any) -> None:
        self.send(404 if value is None else 200, json.dumps(value).encode(), "application/json")

    def send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, text in (("Content-Type", kind), ("Content-Length", len(body)), ("X-Repo-Commit", COMMIT)):
            self.send_header(name, str(text))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """Return the address of a hub with a folder of JSONL and Parquet."""
    folder = tmp_path / "dataset"
    (folder / "pair").mkdir(parents=True)
    half = len(ROWS) // 2
    (folder / "pair" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:half]), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS[half:]), folder / "pair" / "b.parquet")
    (folder / "README.md").write_text("A dataset.")
    handler = type("OneHub", (Hub,), {"folder": folder, "read": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_training_reads_a_dataset_of_the_hub(hub: tuple[str, type[Hub]], tmp_path: Path, model_folder: Path) -> None:
    address, handler = hub
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
    near = Run(
        stage="pairs", data=(str(handler.folder / "pair"),), output=str(tmp_path / "near"), steps=2,
        model=str(model_folder), batch_size=8, max_tokens=32,
    )  # fmt: skip

    def train(name: str, source: str) -> subprocess.CompletedProcess[str]:
        far = replace(near, data=(source,), output=str(tmp_path / name))
        toml = toml_of(far, tmp_path / f"{name}.toml")
        command = [sys.executable, "-m", "polyvec", "train", str(toml)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    done = train("far", f"hf://datasets/{REPO}/pair/")
    assert done.returncode == 0, done.stderr
    run_stage(near)
    far, here = (json.loads((tmp_path / name / "training.jsonl").read_text())["loss"] for name in ("far", "near"))
    assert far == here
    assert {name for name, command in handler.read if command == "GET"} == {"pair/a.jsonl", "pair/b.parquet"}
    done = train("none", f"hf://datasets/{REPO}/nothing/")
    assert done.returncode == 2 and f"hf://datasets/{REPO}/nothing/, which is not there" in done.stderr, done.stderr
