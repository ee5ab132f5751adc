"""Every example runs, with the package that it is about, and finds the answer across languages."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from polyvec import Embedder
from polyvec.model.encoder import Encoder
from polyvec.model.weights import save_hf

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("with_*.py"))


@pytest.mark.filterwarnings("default")  # other packages' deprecations are not ours to raise
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_finds_the_answer(path: Path) -> None:
    main = runpy.run_path(str(path))["main"]
    texts = ["The train is late.", "A cat sleeps on the chair.", "Bread needs flour."]
    assert main(texts, "Wo schläft die Katze?") == texts[1]


@pytest.mark.filterwarnings("default")
def test_sentence_transformers_gives_every_task_the_same_vectors(
    encoder: Encoder, torch_embedder: Embedder, tmp_path: Path
) -> None:
    save_hf(encoder, tmp_path / "hf", torch_embedder.folder / "tokenizer.json")
    path = Path(__file__).parent.parent / "examples" / "with_sentence_transformers.py"
    model = runpy.run_path(str(path))["TaskModel"](tmp_path / "hf")
    texts = ["The train is late.", "Wo?"]
    for task in (*torch_embedder.tasks, torch_embedder.tasks[0]):
        np.testing.assert_allclose(model.encode(texts, task), torch_embedder.encode(texts, task=task), atol=1e-5)
