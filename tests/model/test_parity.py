"""Against transformers' own class with PEFT adapters: an implementation that shares no code with ours."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyvec.model.encoder import Encoder
from polyvec.model.layouts import adapter_folder
from polyvec.model.weights import load_encoder, save_hf
from tests.conftest import packed

LENGTHS = [5, 40, 17, 9, 64, 2]
GOLDEN = Path(__file__).parent.parent / "golden" / "jina_embeddings_v3.json"


def load_reference(folder: Path, tasks: tuple[str, ...]) -> Any:
    """Return transformers' model with one PEFT adapter per task."""
    from peft import PeftModel
    from transformers import JinaEmbeddingsV3Model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own deprecations
        base = JinaEmbeddingsV3Model.from_pretrained(folder, attn_implementation="sdpa").eval()
        model = PeftModel.from_pretrained(
            base, folder / adapter_folder(tasks[0]), adapter_name=tasks[0].replace(".", "_")
        )
        for task in tasks[1:]:
            model.load_adapter(folder / adapter_folder(task), adapter_name=task.replace(".", "_"))
    return model.eval()


@torch.no_grad()
def reference_states(model: Any, ids: torch.Tensor, cu_seqlens: torch.Tensor, tasks: list[str | None]) -> torch.Tensor:
    """Run the padded batch and return the packed (N, D) states."""
    lengths = cu_seqlens.diff().tolist()
    grid = torch.ones((len(lengths), max(lengths)), dtype=torch.long)
    mask = torch.zeros_like(grid)
    for row, (start, length) in enumerate(zip(cu_seqlens.tolist(), lengths, strict=False)):
        grid[row, :length], mask[row, :length] = ids[start : start + length], 1
    names = ["__base__" if task is None else task.replace(".", "_") for task in tasks]
    states = model(input_ids=grid, attention_mask=mask, adapter_names=names).last_hidden_state
    return states[mask.bool()]


@pytest.fixture(scope="module")
def reference(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("hf")
    (folder / "tokenizer.json").write_text("{}")
    save_hf(encoder, folder / "model", folder / "tokenizer.json")
    return load_reference(folder / "model", encoder.config.tasks)


TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")


@pytest.mark.parametrize(
    "tasks",
    [*([task] * 6 for task in (None, *TASKS)), [None, *TASKS]],
    ids=["base", *TASKS, "mixed"],
)
def test_states_equal_those_of_transformers_with_peft(
    encoder: Encoder, reference: Any, tasks: list[str | None]
) -> None:
    ids, cu_seqlens = packed(LENGTHS)
    task_ids = torch.tensor([-1 if t is None else encoder.config.tasks.index(t) for t in tasks])
    with torch.no_grad():
        ours = encoder(ids, cu_seqlens, task_ids)
    theirs = reference_states(reference, ids, cu_seqlens, tasks)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_each_adapter_changes_the_states(encoder: Encoder) -> None:
    ids, cu_seqlens = packed([12])
    with torch.no_grad():
        states = [encoder(ids, cu_seqlens, torch.tensor([task])) for task in range(-1, 5)]
    for i, first in enumerate(states):
        for second in states[i + 1 :]:
            assert (first - second).abs().max() > 0.01


@pytest.mark.skipif(
    "POLYVEC_JINA_V3" not in os.environ,
    reason="POLYVEC_JINA_V3 names no folder with the published jina-embeddings-v3 weights (CC-BY-NC-4.0, not shipped)",
)
def test_published_weights_give_the_published_values() -> None:
    """The values of transformers' integration test: last_hidden_state[0, 1:4, 1:10] per task, no prompt, 1e-4."""
    from tokenizers import Tokenizer

    folder = Path(os.environ["POLYVEC_JINA_V3"])
    golden = json.loads(GOLDEN.read_text())
    encoder = load_encoder(folder)
    ids = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(golden["text"]).ids)
    assert len(ids) == golden["num_tokens"]
    for task, rows in golden["states"].items():
        task_id = encoder.config.tasks.index(task) if task != "base" else -1
        with torch.no_grad():
            states = encoder(ids, torch.tensor([0, len(ids)], dtype=torch.int32), torch.tensor([task_id]))
        np.testing.assert_allclose(states[1:4, 1:10].numpy(), np.array(rows), atol=1e-4, err_msg=task)
