"""A sixth task: trained from a file, usable by name at once, and nothing else moved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyvec import Embedder
from polyvec.errors import InputError
from polyvec.model.weights import load_encoder, save_hf
from polyvec.samples import corpus
from polyvec.training.own_adapter import add_tasks, new_tasks
from polyvec.training.run import Run
from polyvec.training.stages import run_stage
from tests.conftest import random_encoder

TEXTS = [row["text"] for row in corpus()[:16]]
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "retrieval": [{"query": t[:20], "passage": t[20:]} for t in TEXTS],
    "text-matching": [{"text_a": t[:25], "text_b": t[10:], "score": i % 5} for i, t in enumerate(TEXTS)],
    "classification": [{"text": t, "label": i % 4} for i, t in enumerate(TEXTS)],
    "separation": [{"text": t, "label": i % 4} for i, t in enumerate(TEXTS)],
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_of(stage: str, data: Path, model: Path, output: Path, **changes: Any) -> Run:
    fields = {"steps": 12, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 1, "adapter": "legal", **changes}
    return Run(stage=stage, data=(str(data),), model=str(model), output=str(output), **fields)


@pytest.mark.parametrize("stage", list(EXAMPLES))
def test_a_sixth_task_is_usable_by_name_and_nothing_else_moved(stage: str, model_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", EXAMPLES[stage])
    losses = run_stage(run_of(stage, data, model_folder, tmp_path / "out"))
    names = tuple(new_tasks("legal", stage))
    assert names == (("legal.query", "legal.passage") if stage == "retrieval" else ("legal",))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    before, after = Embedder(model_folder, engine="torch"), Embedder(tmp_path / "out", engine="torch")
    assert after.tasks == (*before.tasks, *names)
    for task in (None, *before.tasks):
        np.testing.assert_array_equal(after.encode(TEXTS, task=task), before.encode(TEXTS, task=task))
    for name in names:
        vectors = after.encode(TEXTS, task=name)
        assert all(np.abs(vectors - after.encode(TEXTS, task=task)).max() > 1e-3 for task in before.tasks)


def test_a_new_adapter_starts_as_a_copy_or_as_no_change() -> None:
    encoder = random_encoder()
    grown = add_tasks(encoder, {"legal": "separation", "other": "unknown"}).eval()
    assert grown.config.prompts["legal"] == encoder.config.prompts["separation"]
    ids, cu_seqlens = torch.arange(4, 12), torch.tensor([0, 8], dtype=torch.int32)
    with torch.no_grad():
        states = {i: grown(ids, cu_seqlens, torch.tensor([i])) for i in (-1, 2, 5, 6)}
    assert torch.equal(states[5], states[2])
    torch.testing.assert_close(states[6], states[-1])


@pytest.mark.parametrize(
    ("stage", "rows", "options", "message"),
    [
        ("retrieval", EXAMPLES["separation"], {}, "must have the columns query, passage; or text_a, text_b for ret"),
        ("classification", EXAMPLES["retrieval"], {}, r"labels in stage classification, got pairs .*mine\.jsonl"),
        ("retrieval", [{"query": "a", "passage": None}] * 9, {}, "example 1 must have the columns query, passage"),
        ("retrieval", [{"query": "a", "passage": 5}] * 9, {}, "example 1: 'passage' must be a text, got int"),
        ("text-matching", [{"text_a": "a", "text_b": "b", "score": "high"}] * 9, {}, "'score' must be a finite number"),
        ("text-matching", [{"text_a": "a", "text_b": "b", "score": 10**400}] * 9, {}, "a finite number, got 1000"),
        (
            "text-matching",
            [{"text_a": "a", "text_b": " ", "score": 1}] * 9,
            {},
            "1: 'text_b' must hold text, got nothing",
        ),
        ("classification", [{"text": "a", "label": ""}] * 9, {}, "1: 'label' must hold text, got nothing; fill it in"),
        ("classification", [{"text": "a", "label": math.nan}] * 9, {}, "1: 'label' must hold text, got nothing"),
        ("classification", [{"text": "a", "label": ["b"]}] * 9, {}, r"'label' must be a text or a number, got \['b'\]"),
        ("text-matching", [{"text_a": "a", "text_b": "b", "score": 1}] * 9, {}, "score must differ between examples"),
        ("classification", [{"text": f"t{i}", "label": i} for i in range(9)], {}, "two classes of 2 texts"),
        ("separation", EXAMPLES["separation"][:3], {}, "at least 8 examples, got 3"),
        ("separation", EXAMPLES["separation"], {"adapter": "separation"}, "new to the model, which has retr"),
        ("separation", EXAMPLES["separation"], {"adapter": "../legal"}, "name must be letters, digits"),
        ("separation", EXAMPLES["separation"], {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_examples_that_do_not_fit_are_named(
    model_folder: Path, tmp_path: Path, stage: str, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    data = write(tmp_path / "mine.jsonl", rows)
    with pytest.raises(InputError, match=message):
        run_stage(run_of(stage, data, model_folder, tmp_path / "out", **{"steps": 2, **options}))
    assert not (tmp_path / "out").exists()


def test_a_sixth_task_goes_out_as_peft_and_comes_back(model_folder: Path, tmp_path: Path) -> None:
    encoder = add_tasks(load_encoder(model_folder), {"legal.query": "retrieval.query"})
    save_hf(encoder, tmp_path / "hf", model_folder / "tokenizer.json")
    assert (tmp_path / "hf" / "legal_query" / "adapter_model.safetensors").exists()
    again = load_encoder(tmp_path / "hf")
    assert again.config.tasks == encoder.config.tasks
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), encoder.state_dict().values(), strict=True)
    )


def test_a_model_is_never_written_over(model_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", EXAMPLES["separation"])
    with pytest.raises(InputError, match="new or empty folder"):
        run_stage(run_of("separation", data, model_folder, model_folder))


def test_the_base_is_bit_identical_in_the_file(model_folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", EXAMPLES["separation"])
    run_stage(run_of("separation", data, model_folder, tmp_path / "out", steps=3))
    before, after = load_encoder(model_folder).state_dict(), load_encoder(tmp_path / "out").state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name] if ".lora_" not in name else after[name][:5], tensor), name
