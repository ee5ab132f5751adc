"""Whole stages from a TOML file: the loss falls, a stopped run goes on, two processes are one, errors are sentences."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

from polyvec import Embedder
from polyvec.errors import InputError, NotFiniteError
from polyvec.model.layouts import copy_companions, read_config
from polyvec.model.weights import load_encoder, save_encoder
from polyvec.samples import corpus
from polyvec.training.examples import INFERENCE
from polyvec.training.objectives import distinct
from polyvec.training.run import STAGES, Run, make_run, read_run
from polyvec.training.stages import run_stage
from tests.conftest import free_port

LANGS = ("en", "de", "fr", "es", "it", "pt", "nl", "pl")


def rows_of(stage: str) -> list[dict[str, Any]]:
    texts = [part for row in corpus() if row["lang"] in LANGS for part in row["text"].split(". ") if len(part) > 20]
    texts = list(dict.fromkeys(texts))
    if stage == "mlm":
        return [{"text": t, "lang": "en"} for t in texts]
    if stage == "distillation":
        generator = np.random.default_rng(0)
        return [{"text": t, "embedding": generator.standard_normal(32).round(3).tolist()} for t in texts]
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
    assert changed and all((".lora_" in name) == (stage not in ("mlm", "distillation", "pairs")) for name in changed)
    assert Embedder(run.output, engine="torch", device="cpu").encode("a text").shape == (32,)
    last = json.loads((Path(run.output) / "training.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20 and last["tokens_per_second"] > 0 and 0 < last["mfu"] < 1
    assert "<svg" in (Path(run.output) / "training.svg").read_text()
    assert tensorboard_of(run) == [(20, pytest.approx(last["loss"]))]


def tensorboard_of(run: Run) -> list[tuple[int, float]]:
    """Return step and loss of what TensorBoard reads of a run."""
    events = EventAccumulator(str(Path(run.output) / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_tensorboard_follows_a_run_step_by_step_and_over_a_stop(make: Callable[..., Run]) -> None:
    run = make("separation", steps=60, save_every=30)
    seen: list[list[int]] = []

    def watch(row: dict[str, float]) -> None:
        seen.append([step for step, _ in tensorboard_of(run)])
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(run, report=watch)
    run_stage(run, report=watch)  # from step 30
    assert seen == [[20], [20, 40], [20, 40], [20, 40, 60]]
    rows = [json.loads(line) for line in (Path(run.output) / "training.jsonl").read_text().splitlines()]
    assert tensorboard_of(run) == [(row["step"], pytest.approx(row["loss"])) for row in rows]


def test_a_run_records_itself_and_refuses_another(make: Callable[..., Run]) -> None:
    run = make("pairs", steps=2)
    run_stage(run)
    assert run_stage(run)  # done already: nothing to do
    with pytest.raises(InputError, match="same run, got learning_rate 0.003 instead of 0.1"):
        run_stage(replace(run, learning_rate=0.1))
    data = Path(run.data[0])
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(InputError, match=r"same run, got examples \['\d+ of hash .* give this run a folder of its own"):
        run_stage(run)
    data.write_text("".join(lines))  # at another time, which makes no other run
    assert run_stage(run)


def test_two_processes_equal_one(make: Callable[..., Run], tmp_path: Path) -> None:
    replicated = ("mlm", "mlm in one part", "distillation", "pairs", "retrieval")
    cases = [(stage, False) for stage in replicated] + [(stage, True) for stage in ("mlm", "distillation", "pairs")]
    ones: dict[str, list[float]] = {}
    files: dict[tuple[str, bool], Path] = {}
    for stage, sharded in cases:
        # A step so small that Adam's first, the sign of a gradient, do not part where gradients are nearly zero.
        settings: dict[str, Any] = {"learning_rate": 1e-5, "batch_size": 10, "dropout": True}
        settings["projection"] = stage == "distillation"
        if stage == "mlm in one part":  # the second process has none
            settings["part_tokens"] = 10_000
        run = make(stage.split()[0], steps=3, sharded=False, output=str(tmp_path / stage / "one"), **settings)
        if stage not in ones:
            ones[stage] = run_stage(run)
        two = replace(run, output=str(tmp_path / stage / ("sharded" if sharded else "two")), sharded=sharded)
        files[stage, sharded] = toml_of(two, tmp_path / f"{len(files)}.toml")
    torchrun(list(files.values()), 2)
    seconds = {}
    for stage, sharded in cases:
        folder = tmp_path / stage / ("sharded" if sharded else "two")
        first, second = (load_file(path / "model.safetensors") for path in (tmp_path / stage / "one", folder))
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, atol=2e-6, rtol=1e-5, msg=f"{folder}: {name}")
        logged = json.loads((folder / "training.jsonl").read_text().splitlines()[-1])
        assert logged["loss"] == pytest.approx(np.mean(ones[stage]), rel=1e-4)
        if sharded:  # each process has written its part, and one alone goes on from both
            parts = [folder / f"checkpoint.{part}safetensors" for part in ("", "step3.part1.")]
            assert sorted(parts) == sorted(folder.glob("checkpoint*"))
            sizes = [part.stat().st_size for part in parts]
            assert min(sizes) > 0.4 * sum(sizes)
            (folder / "model.safetensors").unlink()
            seconds[folder] = second
    torchrun([file for (_, sharded), file in files.items() if sharded], 1)
    for folder, second in seconds.items():
        again = load_file(folder / "model.safetensors")
        assert all(torch.equal(again[name], tensor) for name, tensor in second.items())


def toml_of(run: Run, path: Path) -> Path:
    """Write the file of a run and return its path."""
    values = {**run.__dict__, "data": list(run.data)}
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


#: ``polyvec train`` of each file in turn, at a port of its own: most of the time of a process is its start.
_EACH = """
import os, sys
from polyvec.cli import app
for file, port in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    os.environ["MASTER_PORT"] = port
    app(["train", file], standalone_mode=False)
"""


def torchrun(files: Sequence[Path], count: int) -> None:
    """Run ``count`` processes of each run."""
    results = started(count, "-c", _EACH, *(word for file in files for word in (str(file), str(free_port()))))
    assert [code for code, _ in results] == [0] * count, results


def started(count: int, *arguments: str) -> list[tuple[int, str]]:
    """Run ``count`` processes of Python, as torchrun would start them; return exit code and stderr of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", *arguments], stderr=subprocess.PIPE, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[1] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_a_batch_holds_no_text_twice() -> None:
    pairs = [
        ("a cat", "It sleeps all day.", []),
        ("A  Cat", "Another.", []),
        ("a dog", "it sleeps ALL day.", []),
        ("a bird", "It sings.", []),
    ]
    assert [query for query, _, _ in distinct(pairs)] == ["a cat", "a bird"]


COPIES = [{"query": f"the quick brown fox {i}", "passage": f"The quick brown fox {i} jumps."} for i in range(9)]


def test_pairs_that_repeat_their_query_are_left_out_and_counted(make: Callable[..., Run], tmp_path: Path) -> None:
    rows = rows_of("pairs")
    data = tmp_path / "copies.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*COPIES, *rows]))
    sentences: list[str] = []
    run_stage(make("pairs", steps=1, data=(str(data),)), notice=sentences.append)
    total = len(COPIES) + len(rows)
    assert sentences == [f"{data}: left out {len(COPIES)} of {total} pairs that share nearly all their words"]
    data.write_text("".join(json.dumps(row) + "\n" for row in COPIES))
    with pytest.raises(InputError, match="must hold pairs that share less than 80 % of their words, got none in 9"):
        run_stage(make("pairs", output=str(tmp_path / "other"), data=(str(data),)))


def test_what_no_step_draws_is_counted(make: Callable[..., Run], tmp_path: Path) -> None:
    inferences = [{"premise": f"p{i // 3}", "hypothesis": f"h{i}", "label": INFERENCE[i % 3]} for i in range(12)]
    inferences[9] = {**inferences[9], "label": "neutral"}
    texts = [*rows_of("mlm"), {"text": " "}, {"text": ""}]
    labelled = rows_of("classification")
    for stage, rows, sentence in (
        ("mlm", texts, f"left out 2 of {len(texts)} windows of texts without a token"),
        ("text-matching", inferences, "left out 6 of 12 inferences that are neutral, or contradict a premise"),
        (
            "classification",
            [*labelled, {"text": "rare", "label": "x"}],
            f"left out 1 of {len(labelled) + 1} texts of cl",
        ),
    ):
        data = tmp_path / f"more-{stage}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sentences: list[str] = []
        run_stage(make(stage, steps=1, data=(str(data),), output=str(tmp_path / stage)), notice=sentences.append)
        assert [told.startswith(f"{data}: {sentence}") for told in sentences] == [True], sentences
    pairs = [{"query": row["query"], "passage": row["passage"], "lang": "de" if i else "en"}
             for i, row in enumerate(rows_of("pairs"))]  # fmt: skip
    graded = [{"text_a": row["query"], "text_b": row["passage"], "score": i, "lang": row["lang"]}
              for i, row in enumerate(pairs)]  # fmt: skip
    for stage, rows, options in (
        ("retrieval", pairs, {"orthogonality": 1.0}),
        ("text-matching", graded, {}),
        ("text-matching", [{k: v for k, v in row.items() if k != "score"} for row in graded], {"orthogonality": 1.0}),
    ):
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sentences = []
        output = str(tmp_path / f"{stage} {len(rows[0])}")
        run = make(stage, steps=4, smoothing=0.0, data=(str(data),), output=output, **options)
        assert min(run_stage(run, notice=sentences.append)) > 0
        assert sentences == [f"{data}: left out 1 of {len(rows)} pairs that are alone in their lang and source"]
    data.write_text("".join(json.dumps({**row, "source": str(i)}) + "\n" for i, row in enumerate(pairs)))
    with pytest.raises(InputError, match="must hold two pairs of one lang and source to tell apart, got none"):
        run_stage(make("retrieval", data=(str(data),), output=str(tmp_path / "none")))
    data.write_text("".join(json.dumps({**row, "source": str(i)}) + "\n" for i, row in enumerate(rows_of("pairs"))))
    sentences = []
    run = make("retrieval", steps=1, data=(str(data),), output=str(tmp_path / "each"))
    assert run_stage(run, notice=sentences.append)[0] > 0 and not sentences  # its negatives are something to tell apart
    data.write_text("".join(json.dumps({**row, "label": "neutral" if i else "contradiction"}) + "\n"
                            for i, row in enumerate(inferences)))  # fmt: skip
    with pytest.raises(InputError, match="must hold an entailment, got 12 examples of other labels"):
        run_stage(make("text-matching", data=(str(data),), output=str(tmp_path / "none")))


@pytest.mark.parametrize("stage", STAGES)
def test_examples_in_memory_train_what_a_file_trains(
    stage: str, make: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(stage, steps=3)
    losses = run_stage(run)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not needed for them
    again = replace(run, output=str(tmp_path / "again"))
    assert run_stage(again, records={run.data[0]: rows_of(stage)}) == losses
    with pytest.raises(InputError, match="must hold at least 8 examples, got 0"):
        run_stage(replace(run, output=str(tmp_path / "third")), records={run.data[0]: []})


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(make: Callable[..., Run], tmp_path: Path) -> None:
    """The system refuses to write beyond a size that the first checkpoint has not reached, as a quota does."""
    run = make("separation", steps=4, save_every=2)
    toml = toml_of(run, tmp_path / "run.toml")
    program = (
        "import resource, sys; from polyvec.training import checkpoint; from polyvec.cli import app; "
        "save = checkpoint.Checkpoint.save\n"
        "def limited(self, *arguments):\n"
        "    save(self, *arguments)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "checkpoint.Checkpoint.save = limited; app()"
    )
    done = subprocess.run([sys.executable, "-c", program, "train", str(toml)], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"error: output must be a folder to write in, with room left, got {run.output}: " in done.stderr
    losses = run_stage(run)
    assert losses == run_stage(replace(run, output=str(tmp_path / "straight")))


def test_the_command_keeps_torchs_threads_from_turning_while_they_wait(tmp_path: Path) -> None:
    """Else training takes over ten times as long beside a program that has one of two cores."""
    toml = tmp_path / "run.toml"
    toml.write_text(f'stage = "pairs"\ndata = ["none.jsonl"]\nsteps = 1\noutput = "{tmp_path / "out"}"\n')
    for set_, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        done = subprocess.run(
            [sys.executable, "-m", "polyvec", "train", str(toml)], capture_output=True, text=True,
            env={**environment, "OMP_DISPLAY_ENV": "true", **set_},
        )  # fmt: skip
        assert done.returncode == 2 and f"OMP_WAIT_POLICY = '{policy}'" in done.stderr, done.stderr


def test_a_loss_that_is_not_finite_is_told_by_the_command(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make("separation", steps=4, learning_rate=1e30, save_every=1)
    with pytest.raises(NotFiniteError, match=f"{run.output}: .* must be finite, got .*; the last checkpoint"):
        run_stage(run)


def test_a_run_that_failed_goes_on_with_what_it_was_told_to_lower(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make("separation", steps=4, learning_rate=1e30)
    with pytest.raises(NotFiniteError, match="lower learning_rate"):
        run_stage(run)
    Path(run.output).rename(tmp_path / "moved")
    free = {"output": str(tmp_path / "moved"), "part_tokens": 100, "save_every": 3, "gradient_checkpointing": True}
    lower = replace(run, **free, learning_rate=1e-3)
    told: list[str] = []
    losses = run_stage(lower, notice=told.append)
    assert told == ["learning_rate is 0.001 from step 0 on, before it was 1e+30"]
    with safe_open(Path(lower.output) / "checkpoint.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["changes"]) == [{"until_step": 0, "learning_rate": 1e30}]
    straight = run_stage(replace(run, output=str(tmp_path / "other"), learning_rate=1e-3))
    assert straight == pytest.approx(losses, rel=1e-4)
    assert run_stage(lower, notice=told.append) == losses and len(told) == 1  # the checkpoint is of the new run
    with pytest.raises(InputError, match="must be of the same run, got temperature 0.05 instead of 0.1; give this run"):
        run_stage(replace(lower, temperature=0.1))


#: Each file's run, whose third step has, in one process, a gradient that is not finite under a loss that is.
_BROKEN = """
import os, sys
from polyvec.cli import app
from polyvec.training import distributed, stages

cached = stages.cached_shares

def broken(*arguments, **options):
    shares = list(cached(*arguments, **options))
    calls.append(0)
    for share in shares:
        rest = (share - share.detach()).square().sqrt() if len(calls) == 3 and distributed.is_first() else 0.0
        yield share + rest

stages.cached_shares = broken
for file, port in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    calls = []
    os.environ["MASTER_PORT"] = port
    try:
        app(["train", file])
    except SystemExit as stop:
        print("exit code", stop.code, file=sys.stderr)
"""


@pytest.mark.parametrize("count", [1, 2])
def test_a_gradient_that_is_not_finite_is_told_by_every_process(
    count: int, make: Callable[..., Run], tmp_path: Path
) -> None:
    runs = [
        make("pairs", steps=4, save_every=1, sharded=sharded, output=str(tmp_path / f"sharded {sharded}"))
        for sharded in (False, True)[:count]
    ]
    files = [toml_of(run, tmp_path / f"{i}.toml") for i, run in enumerate(runs)]
    said = started(count, "-c", _BROKEN, *(word for file in files for word in (str(file), str(free_port()))))
    for run in runs:
        told = f"error: {run.output}: gradients must be finite, got nan as their norm at step 2, first in layers.1.mlp"
        for code, errors in said:
            assert code == 0 and told in errors and errors.count("exit code 2") == len(runs), errors
        with safe_open(Path(run.output) / "checkpoint.safetensors", framework="pt") as file:
            assert len(file.get_tensor("losses")) == 2
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


def test_each_dataset_brings_its_own_loss(make: Callable[..., Run], tmp_path: Path) -> None:
    """Graded pairs, inferences and translations teach one adapter, one dataset a step, as often as ``shares`` says."""
    texts = [row["text"] for row in corpus()[:24]]
    inferences = [
        {"premise": t, "hypothesis": t[::-1] if i % 2 else t[:30], "label": ("entailment", "contradiction")[i % 2]}
        for i, t in enumerate(texts)
    ]
    equals = [{"text_a": t[:40], "text_b": t[40:]} for t in texts]
    files = [tmp_path / "text-matching.jsonl"]
    for name, rows in (("inferences", inferences), ("equals", equals), ("labelled", rows_of("separation"))):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make("text-matching", data=tuple(map(str, files[:3])), steps=6, shares=(1.0, 1.0, 1.0))
    mixed = run_stage(run)
    alone = [
        run_stage(replace(run, data=(str(f),), shares=(), steps=1, output=str(tmp_path / f.stem)))[0] for f in files[:3]
    ]
    assert len({round(loss, 4) for loss in alone}) == 3 and any(mixed[0] == pytest.approx(loss) for loss in alone)
    only = replace(run, shares=(1e-9, 1e-9, 1.0), steps=1, output=str(tmp_path / "only"))
    assert run_stage(only)[0] == pytest.approx(alone[2])
    data = (str(files[3]), str(files[2]))
    for stage in ("classification", "separation"):
        run = make(stage, data=data, steps=1)
        folders = [str(tmp_path / f"{stage} {i}") for i in range(3)]
        labels, pairs = (
            run_stage(replace(run, shares=shares, output=folder))
            for shares, folder in zip(((1.0, 1e-9), (1e-9, 1.0)), folders, strict=False)
        )
        assert labels != pytest.approx(pairs) and len(run_stage(replace(run, steps=4, output=folders[2]))) == 4


def test_separation_may_learn_from_classmates(make: Callable[..., Run], model_folder: Path, tmp_path: Path) -> None:
    """The labels' loss is then that of the classification stage, for the other adapter."""
    encoder = load_encoder(model_folder)
    ours, other = map(encoder.config.tasks.index, ("separation", "classification"))
    for name, tensor in encoder.state_dict().items():
        if ".lora_" in name:
            tensor[ours] = tensor[other]
    save_encoder(encoder, tmp_path / "twins")
    copy_companions(model_folder, tmp_path / "twins")
    run = make("separation", model=str(tmp_path / "twins"), steps=3, classmates=True, negatives=2)
    losses = run_stage(run)
    of_classification = replace(run, stage="classification", classmates=False, output=str(tmp_path / "other"))
    assert losses == pytest.approx(run_stage(of_classification))
    cosent = replace(run, classmates=False, output=str(tmp_path / "cosent"))
    assert losses[0] != pytest.approx(run_stage(cosent)[0])
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (run.model, run.output))
    factors = [name for name in before if ".lora_" in name]
    assert {i for name in factors for i in range(5) if not torch.equal(before[name][i], after[name][i])} == {ours}


def test_a_student_learns_from_a_teacher_of_another_width_through_a_matrix(
    make: Callable[..., Run], tmp_path: Path
) -> None:
    data = tmp_path / "teacher.jsonl"
    rng = np.random.default_rng(1)
    rows = [{**row, "embedding": rng.standard_normal(48).tolist()} for row in rows_of("distillation")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="embedding must have 32 numbers, got 48; set projection = true"):
        run_stage(make("distillation", data=(str(data),)))
    losses = run_stage(make("distillation", data=(str(data),), projection=True, others=4, learning_rate=1e-2))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
    for broken, sentence in (
        ({"embedding": [1.0, None]}, "example 3: 'embedding' must be a list of finite numbers"),
        ({"embedding": [0.0] * 48}, "example 3: 'embedding' must be a list of finite numbers, not all 0"),
        ({"embedding": [1.0] * 47}, "example 3: embedding must be of one teacher, got vectors of [47, 48] numbers"),
    ):
        lines = [row | broken if i == 2 else row for i, row in enumerate(rows)]
        data.write_text("".join(json.dumps(row) + "\n" for row in lines))
        with pytest.raises(InputError) as error:
            run_stage(make("distillation", data=(str(data),), output=str(tmp_path / "other")))
        assert sentence in str(error.value)


def test_gradient_checkpointing_changes_no_weight(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make("pairs", steps=3)
    run_stage(run)
    again = replace(run, gradient_checkpointing=True, output=str(tmp_path / "again"))
    run_stage(again)
    first, second = (load_file(Path(r.output) / "model.safetensors") for r in (run, again))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, msg=name)


def test_a_run_that_stopped_before_its_first_save_goes_on(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make("separation", steps=2)
    output = Path(run.output)

    def crash(row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(run, report=crash)
    assert (output / "training.jsonl").read_text()
    again = run_stage(run)
    shutil.rmtree(output)
    output.mkdir()
    for name in (".checkpoint.safetensors.partial", "checkpoint.step0.part1.safetensors"):  # killed in the first save
        (output / name).touch()
    assert run_stage(run) == again
    assert not (output / "checkpoint.step0.part1.safetensors").exists()


def test_a_run_never_writes_over_something_else(make: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="output must be a new or empty folder"):
        run_stage(make("pairs"))


def test_a_run_is_checked_before_it_starts(tmp_path: Path) -> None:
    good = {"stage": "pairs", "data": ["a.jsonl"], "output": "out", "steps": 2}
    assert make_run(good, source="run.toml").temperature == 0.05
    assert make_run({**good, "shares": [2]}, source="run.toml").shares == (2.0,)
    for change, sentence in (
        ({"learnig_rate": 1e-3}, "every field must be of a run, got 'learnig_rate'; did you mean 'learning_rate'?"),
        ({"stage": "pretrain"}, "stage must be one of mlm, distillation, pairs"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"data": "a.jsonl"}, "data must be a list of text, got 'a.jsonl'"),
        ({"data": ["a.jsonl", 3]}, "each of data must be text, got 3"),
        ({"shares": [True]}, "each of shares must be a finite number, got True"),
        ({"shares": [float("nan")]}, "each of shares must be a finite number, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number, got inf"),
        ({"temperature": 10**400}, "temperature must be a finite number, got 1000"),
        ({"smoothing": -0.5}, "smoothing must be between 0 and 1, got -0.5"),
        ({"seed": -1}, "seed must be at least 0 and less than 2**63, got -1"),
        ({"seed": 2**64}, "seed must be at least 0 and less than 2**63"),
        ({"rope_theta": 0.5}, "rope_theta must be greater than 1, or 0 for the model's, got 0.5"),
        ({"architecture": "tiny"}, "tokenizer must be given with an architecture"),
        ({"mask_rate": 1}, "mask_rate must be between 0 and 1, got 1.0"),
        ({"mask_rate": 0.2}, "mask_rate must be left out in stage pairs, which does not read it, got 0.2"),
        ({"stage": "separation", "hardness": 1.0}, "hardness must be left out in stage separation"),
        ({"stage": "classification", "classmates": True}, "classmates must be left out in stage classification"),
        ({"adapter": "legal"}, "adapter must be left out in stage pairs"),
        ({"shares": [1.0, 2.0]}, "shares must be one number greater than 0 for each of 1 files of data"),
    ):
        with pytest.raises(InputError) as error:
            make_run({**good, **change}, source="run.toml")
        assert sentence in str(error.value)
    with pytest.raises(InputError, match="^data must be a list of text, got 'a.jsonl'"):  # in Python too
        Run(stage="pairs", data="a.jsonl", output="out", steps=2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="output, steps must be given"):
        make_run({"stage": "mlm", "data": ["a"]}, source="run.toml")
    with pytest.raises(InputError, match="RUN must be a .toml file or one of classification, mlm-512, mlm-8192"):
        read_run("pair", {})
    (tmp_path / "broken.toml").write_text("steps = ")
    with pytest.raises(InputError, match="must be a readable TOML file"):
        read_run(str(tmp_path / "broken.toml"), {})


def test_a_model_trains_at_a_base_of_positions_that_it_does_not_keep(make: Callable[..., Run], tmp_path: Path) -> None:
    run = make("pairs", steps=2)
    losses = run_stage(run)
    nearer = run_stage(replace(run, rope_theta=10.0, output=str(tmp_path / "nearer")))
    assert nearer[0] != losses[0]
    configurations = [(Path(folder) / "config.json").read_text() for folder in (run.output, tmp_path / "nearer")]
    assert configurations[0] == configurations[1]


def test_masked_words_start_from_an_xlm_roberta(make: Callable[..., Run], tmp_path: Path, model_folder: Path) -> None:
    config = XLMRobertaConfig(
        vocab_size=read_config(model_folder).vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, type_vocab_size=1,
    )  # fmt: skip
    XLMRobertaForMaskedLM(config).save_pretrained(tmp_path / "xlm")
    shutil.copyfile(model_folder / "tokenizer.json", tmp_path / "xlm" / "tokenizer.json")
    run = make("mlm", model=str(tmp_path / "xlm"), rope_theta=10_000.0)
    losses = run_stage(run)
    assert np.mean(losses[-5:]) < np.mean(losses[:3])
    assert Embedder(run.output, engine="torch", device="cpu").encode("a text").shape == (32,)


def test_every_recipe_is_a_run_and_takes_changes() -> None:
    for name in (
        "mlm-512",
        "mlm-8192",
        "pairs",
        "pairs-long",
        "retrieval",
        "text-matching",
        "classification",
        "separation",
    ):
        run = read_run(name, {"steps": "7", "data": "x.jsonl,y.jsonl", "output": "there"})
        assert (run.steps, run.data, run.output) == (7, ("x.jsonl", "y.jsonl"), "there")
    assert read_run("separation", {"shares": "2.0, 1"}).shares == (2.0, 1.0)
    with pytest.raises(InputError, match="--set shares must be a TOML value, got 'much'"):
        read_run("separation", {"shares": "1,much"})


def test_data_that_does_not_fit_is_named(make: Callable[..., Run], tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    for row, sentence in (
        ({"query": "q"}, "example 1 must have the columns query, passage; or text_a, text_b for pairs, got query"),
        ({"query": "q", "passage": None}, "example 1 must have the columns query, passage for pairs, got query"),
        ({"query": "q", "passage": 3}, "example 1: 'passage' must be a text, got int"),
        ({"query": "q", "passage": "p", "lang": 7}, "example 1: 'lang' must be a language's code (BCP 47)"),
        ({"query": "q", "passage": "p", "lang": "jp"}, "such as de, pt-BR or zh-Hant, or left out, got 'jp'"),
        ({"query": "q", "passage": "p", "lang": "English"}, "example 1: 'lang' must be a language's code (BCP 47)"),
        ({"query": "q", "passage": "p", "lang": "fr_CA", "source": 7}, "'source' must be a text or left out, got 7"),
        ({"query": "q", "passage": "p", "negatives": "n"}, "'negatives' must be a list of texts"),
        ({"query": "q", "passage": "p", "negatives": ["n", " "]}, "'negatives' must hold text, got a blank one"),
        ({"query": "q", "passage": "p"}, "must hold at least 8 examples, got 1"),
    ):
        data.write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError) as error:
            run_stage(make("pairs", data=(str(data),)))
        assert str(data) in str(error.value) and sentence in str(error.value)
