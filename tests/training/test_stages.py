"""Whole stages from a TOML file: the loss falls, a stopped run goes on, two processes are one, errors are sentences."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from polyvec import Embedder
from polyvec.errors import InputError
from polyvec.samples import corpus
from polyvec.training.run import STAGES, Run, make_run, read_run
from polyvec.training.stages import distinct, run_stage

LANGS = ("en", "de", "fr", "es", "it", "pt", "nl", "pl")


def rows_of(stage: str) -> list[dict[str, Any]]:
    texts = [part for row in corpus() if row["lang"] in LANGS for part in row["text"].split(". ") if len(part) > 20]
    texts = list(dict.fromkeys(texts))
    if stage == "mlm":
        return [{"text": t, "lang": "en"} for t in texts]
    if stage in ("pairs", "retrieval"):
        before = [texts[-1], *texts]
        return [{"query": f"{t.split()[0]} {i}", "passage": t, "negatives": [before[i]]} for i, t in enumerate(texts)]
    if stage == "text-matching":
        others = [t if i % 2 else texts[i - 3] for i, t in enumerate(texts)]
        return [{"text_a": t, "text_b": u, "score": float(t == u)} for t, u in zip(texts, others, strict=True)]
    return [{"text": f"{t} {'printer' if i % 2 else 'kitchen'}", "label": i % 2} for i, t in enumerate(texts)]


@pytest.fixture
def make(tmp_path: Path, model_folder: Path) -> Callable[..., Run]:
    def made(stage: str, **changes: Any) -> Run:
        data = tmp_path / f"{stage}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(stage)))
        values = dict(
            stage=stage, data=(str(data),), output=str(tmp_path / "out"), steps=20, model=str(model_folder),
            batch_size=12, part_tokens=200, max_tokens=64, learning_rate=3e-3, warmup_steps=2,
        )  # fmt: skip
        return Run(**{**values, **changes})

    return made


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_of_every_stage_falls_in_20_steps(stage: str, make: Callable[..., Run], model_folder: Path) -> None:
    run = make(stage)
    losses = run_stage(run)
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:3])
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, Path(run.output)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all((".lora_" in name) == (stage not in ("mlm", "pairs")) for name in changed)
    assert Embedder(run.output, engine="torch", device="cpu").encode("a text").shape == (32,)
    last = json.loads((Path(run.output) / "training.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20 and last["tokens_per_second"] > 0
    assert "<svg" in (Path(run.output) / "training.svg").read_text()
    events = EventAccumulator(str(Path(run.output) / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [pytest.approx(last["loss"])]


def test_a_run_records_itself_and_refuses_another(make: Callable[..., Run]) -> None:
    run = make("pairs", steps=2)
    run_stage(run)
    assert run_stage(run)  # done already: nothing to do
    with pytest.raises(InputError, match="same run, got learning_rate 0.003 instead of 0.1"):
        run_stage(replace(run, learning_rate=0.1))


@pytest.mark.parametrize(
    ("stage", "sharded"), [("mlm", False), ("pairs", False), ("retrieval", False), ("pairs", True)]
)
def test_two_processes_equal_one(stage: str, sharded: bool, make: Callable[..., Run], tmp_path: Path) -> None:
    # A step small enough that Adam's first steps, the sign of a gradient, do not part where gradients are nearly zero.
    run = make(stage, steps=3, learning_rate=1e-5, batch_size=10, sharded=False)
    one = run_stage(run)
    toml = tmp_path / "run.toml"
    values = {**run.__dict__, "output": str(tmp_path / "two"), "data": list(run.data), "sharded": sharded}
    toml.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "polyvec", "train", str(toml)], stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (load_file(Path(folder) / "model.safetensors") for folder in (run.output, tmp_path / "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-6, rtol=1e-5, msg=name)
    logged = json.loads((tmp_path / "two" / "training.jsonl").read_text().splitlines()[-1])
    assert logged["loss"] == pytest.approx(np.mean(one), rel=1e-4)


def test_a_batch_holds_no_text_twice_and_no_copied_pair() -> None:
    rows = [
        {"query": "a cat", "passage": "It sleeps all day."},
        {"query": "A  Cat", "passage": "Another."},
        {"query": "a dog", "passage": "it sleeps ALL day."},
        {"query": "the quick brown fox jumps", "passage": "The quick brown fox jumps over it."},
        {"query": "a bird", "passage": "It sings."},
    ]
    assert [row["query"] for row in distinct(rows)] == ["a cat", "a bird"]


def test_a_run_is_checked_before_it_starts(tmp_path: Path) -> None:
    good = {"stage": "pairs", "data": ["a.jsonl"], "output": "out", "steps": 2}
    assert make_run(good, source="run.toml").temperature == 0.05
    for change, sentence in (
        ({"learnig_rate": 1e-3}, "every field must be of a run, got 'learnig_rate'; did you mean 'learning_rate'?"),
        ({"stage": "pretrain"}, "stage must be one of mlm, pairs"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"data": "a.jsonl"}, "data must be a list of text, got 'a.jsonl'"),
        ({"architecture": "tiny"}, "tokenizer must be given with an architecture"),
        ({"mask_rate": 1}, "mask_rate must be between 0 and 1, got 1.0"),
    ):
        with pytest.raises(InputError) as error:
            make_run({**good, **change}, source="run.toml")
        assert sentence in str(error.value)
    with pytest.raises(InputError, match="output, steps must be given"):
        make_run({"stage": "mlm", "data": ["a"]}, source="run.toml")
    with pytest.raises(InputError, match="RUN must be a .toml file or one of mlm-512, mlm-8192, pairs, retrieval"):
        read_run("pair", {})
    (tmp_path / "broken.toml").write_text("steps = ")
    with pytest.raises(InputError, match="must be a readable TOML file"):
        read_run(str(tmp_path / "broken.toml"), {})


def test_every_recipe_is_a_run_and_takes_changes() -> None:
    for name in ("mlm-512", "mlm-8192", "pairs", "retrieval"):
        run = read_run(name, {"steps": "7", "data": "x.jsonl,y.jsonl", "output": "there"})
        assert (run.steps, run.data, run.output) == (7, ("x.jsonl", "y.jsonl"), "there")


def test_data_that_does_not_fit_is_named(make: Callable[..., Run], tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    for row, sentence in (
        ({"query": "q"}, "example 1 must have the columns query, passage for pairs, got query"),
        ({"query": "q", "passage": 3}, "example 1: 'passage' must be a text, got int"),
        ({"query": "q", "passage": "p", "negatives": "n"}, "'negatives' must be a list of texts"),
        ({"query": "q", "passage": "p"}, "must hold at least 8 examples, got 1"),
    ):
        data.write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError) as error:
            run_stage(make("pairs", data=(str(data),)))
        assert str(data) in str(error.value) and sentence in str(error.value)
