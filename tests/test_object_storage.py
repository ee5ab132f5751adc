"""Object storage by URL: a real server of the S3 protocol, and the commands as a user runs them."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest

from tests.conftest import free_port

BUCKET = "texts"
TEXTS = [f"the router number {i % 9} is late" for i in range(20)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server, and the variables by which every client of S3 finds it."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert server.poll() is None, Path(log.name).read_text()
            time.sleep(0.1)
    address = f"http://127.0.0.1:{port}"
    yield {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": address, "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    server.terminate()
    server.wait()
    log.close()


@pytest.fixture(scope="module")
def client(environment: dict[str, str]) -> Any:
    client = boto3.client(
        "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="testing", aws_secret_access_key="testing",
    )  # fmt: skip
    client.create_bucket(Bucket=BUCKET)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    client.put_object(Bucket=BUCKET, Key="in/a.jsonl", Body=rows.encode())
    return client


def polyvec(environment: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, "-m", "polyvec", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def keys(client: Any, prefix: str) -> list[str]:
    return [found["Key"] for found in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]


def test_a_job_reads_and_writes_by_url_and_gives_the_bytes_of_a_local_one(
    environment: dict[str, str], client: Any, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    client.download_file(BUCKET, "in/a.jsonl", str(tmp_path / "in" / "a.jsonl"))
    options = ("--model", model_folder, "--engine", "onnx", "--part-rows", 8)
    polyvec({}, "embed", tmp_path / "in", "-o", tmp_path / "out", *options)
    summary = json.loads(polyvec(environment, "embed", f"s3://{BUCKET}/in", "-o", f"s3://{BUCKET}/in/out", *options))
    assert summary["rows"] == 20 and summary["parts"] == 3
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("part-*")}
    remote = {Path(key).name: key for key in keys(client, "in/out/part-")}
    assert {n: client.get_object(Bucket=BUCKET, Key=k)["Body"].read() for n, k in remote.items()} == local
    assert not keys(client, "in/out/_work/")
    before = client.list_objects_v2(Bucket=BUCKET, Prefix="in/out/part-")["Contents"]
    # The output lies in the input, and is none of it.
    polyvec(environment, "embed", f"s3://{BUCKET}/in", "-o", f"s3://{BUCKET}/in/out", *options)
    assert client.list_objects_v2(Bucket=BUCKET, Prefix="in/out/part-")["Contents"] == before

    polyvec(environment, "embed", f"s3://{BUCKET}/in/a.jsonl", "-o", f"s3://{BUCKET}/v.lance", *options)
    assert len(keys(client, "v.lance/data/")) == 3
    polyvec(environment, "embed", f"s3://{BUCKET}/v.lance", "--column", "id", "-o", f"s3://{BUCKET}/again", *options)
    again = [client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys(client, "again/part-")]
    assert sum(pq.read_table(io.BytesIO(data)).num_rows for data in again) == 20


def test_a_database_lies_there_and_is_searched(environment: dict[str, str], client: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("Hold the button for ten seconds to reset the router.")
    (tmp_path / "notes" / "b.txt").write_text("Bread needs flour, water and salt.")
    database = f"s3://{BUCKET}/db"
    polyvec(environment, "index", tmp_path / "notes", "-d", database)
    assert keys(client, "db/")
    found = polyvec(environment, "search", "Wie setze ich den Router zurück?", "-d", database, "--json")
    assert json.loads(found.splitlines()[0])["source"].endswith("a.txt")
    (tmp_path / "notes" / "a.txt").unlink()
    polyvec(environment, "index", tmp_path / "notes", "-d", database)
    found = polyvec(environment, "search", "router", "-d", database, "--json")
    assert [Path(json.loads(line)["source"]).name for line in found.splitlines()] == ["b.txt"]


def test_training_reads_it_too(environment: dict[str, str], client: Any, model_folder: Path, tmp_path: Path) -> None:
    pairs = [{"query": f"router {i}", "passage": f"It is number {i * i} of the house."} for i in range(12)]
    data = "".join(json.dumps(pair) + "\n" for pair in pairs).encode()
    client.put_object(Bucket=BUCKET, Key="pairs/a.jsonl", Body=data)
    (tmp_path / "a.jsonl").write_bytes(data)
    models = []
    for source, where in ((f"s3://{BUCKET}/pairs/", environment), (str(tmp_path / "a.jsonl"), {})):
        models.append(tmp_path / f"model-{len(models)}")
        (tmp_path / "run.toml").write_text(
            f'stage = "pairs"\ndata = ["{source}"]\noutput = "{models[-1]}"\nmodel = "{model_folder}"\n'
            "steps = 2\nbatch_size = 8\nmax_tokens = 64\n"
        )
        polyvec(where, "train", tmp_path / "run.toml")
    first, second = ((model / "model.safetensors").read_bytes() for model in models)
    assert first == second != (model_folder / "model.safetensors").read_bytes()
