"""A real Ray cluster of two nodes on this machine, and kill -9."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from polyvec.batch.engines import OnRay
from polyvec.batch.job import Job
from polyvec.errors import InputError
from tests.batch.conftest import Output

KILLS = Path(__file__).parents[2] / "benchmarks" / "kills.py"


def test_killed_at_random_a_cluster_gives_the_bytes_of_a_clean_process(calibrated: Path) -> None:
    # A process of its own: Ray's warnings are not ours to raise, nor its threads to leave in this one.
    command = [sys.executable, str(KILLS), "--texts", "800", "--kills", "3", "--part-rows", "40", "--engine", "onnx"]
    done = subprocess.run([*command, "--model", str(calibrated)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert sorted(kill["kind"] for kill in result["killed"]["kills"]) == ["driver", "raylet", "worker"]
    verdict = result["verdict"]
    assert verdict["equal"] == verdict["parts"] == 20 and verdict["same_order"]
    assert verdict["missing"] == verdict["extra"] == 0 and not verdict["left_over"]
    assert result["clean"]["rows"] == 800 > result["clean"]["distinct"]


#: A cluster that counts a GPU, which two workers share and no one uses.
WITH_GPU = """
import json, sys
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False})
from polyvec.batch import engines, tokens
from polyvec.batch.job import Job
from polyvec.batch.run import prepare, run

job, output = Job(**json.loads(sys.argv[1])), sys.argv[2]
place = engines.OnRay(cluster.address, gpus=0.5)
assert place.workers == 2
if len(sys.argv) > 3:
    engines.tokenizer_hash = lambda model: "another"
try:
    run(prepare(job, output, place), place)
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_workers_with_gpus_get_tokens_and_give_the_bytes_of_a_process(
    calibrated: Path, new_job: Callable[..., Job], embed: Callable[..., Output], tmp_path: Path
) -> None:
    texts = [f"text {i % 17} of a few words" for i in range(40)] + ["long " * 600]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = {"truncate": False, "task": "classification"}  # what is too long is known from the tokens
    here = embed(source, tmp_path / "here", **fields)
    command = [sys.executable, "-c", WITH_GPU, json.dumps(asdict(new_job(source, **fields)))]
    done = subprocess.run([*command, str(tmp_path / "there")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Starting execution" not in done.stderr  # what Ray tells of itself hides what a job tells
    there = Output(tmp_path / "there")
    assert there.parts() == here.parts() and len(there.parts()) == 11
    assert [reject["row"] for reject in there.rejects] == ["texts.jsonl:41"] == [r["row"] for r in here.rejects]
    done = subprocess.run([*command, str(tmp_path / "other"), "other"], capture_output=True, text=True)
    assert "every machine must have the same tokenizer" in done.stderr and "for another" in done.stderr


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself, also where it finds no cluster; what comes after gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own import, which pkg_resources and others raise
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_one_sentence(address: str) -> None:
    with pytest.raises(InputError, match="cluster must be reachable, got .*; start one with: ray start --head"):
        OnRay(address)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"cpus": 0}, "a worker must have cores or a share of a GPU, got --cpus 0 and --gpus 0"),
        ({"gpus": -1}, "a worker must have cores or a share of a GPU, got --cpus 1 and --gpus -1"),
    ],
)
def test_workers_of_nothing_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnRay("auto", **options)
