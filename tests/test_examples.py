"""Every example runs, with the package that it is about, and finds the answer across languages."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from polyvec import Embedder
from polyvec.cli import app
from polyvec.model.encoder import Encoder
from polyvec.model.weights import save_hf

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("with_*.py"))
LOADERS = sorted(FOLDER.glob("load_*.py"))
TEXTS = ["The train is late.", "A cat sleeps on the chair.", "Bread needs flour."]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parts, as the command makes it."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "in.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    command = ["embed", str(folder / "in.txt"), "-o", str(folder / "out"), "--task", "retrieval.passage"]
    result = CliRunner().invoke(app, [*command, "--part-rows", "2"])
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.mark.filterwarnings("default")  # other packages' deprecations are not ours to raise
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_finds_the_answer(path: Path) -> None:
    main = runpy.run_path(str(path))["main"]
    assert main(TEXTS, "Wo schläft die Katze?") == TEXTS[1]


@pytest.mark.filterwarnings("default")
def test_sentence_transformers_gives_every_task_the_same_vectors(
    encoder: Encoder, torch_embedder: Embedder, tmp_path: Path
) -> None:
    save_hf(encoder, tmp_path / "hf", torch_embedder.folder / "tokenizer.json")
    path = FOLDER / "with_sentence_transformers.py"
    model = runpy.run_path(str(path))["TaskModel"](tmp_path / "hf")
    texts = ["The train is late.", "Wo?"]
    for task in (*torch_embedder.tasks, torch_embedder.tasks[0]):
        np.testing.assert_allclose(model.encode(texts, task), torch_embedder.encode(texts, task=task), atol=1e-5)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", LOADERS, ids=lambda path: path.stem)
def test_a_loader_finds_the_answer_in_the_output_of_a_job(path: Path, vectors: Path) -> None:
    main = runpy.run_path(str(path))["main"]
    assert main(str(vectors), "Wo schläft die Katze?") == "in.txt:2"
