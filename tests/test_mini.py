"""polyvec-mini works: what the package ships, used as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polyvec import Embedder
from polyvec.samples import corpus, questions

PACKAGE = Path(__file__).parent.parent / "polyvec"


def test_questions_find_their_answers_in_other_languages(mini: Embedder) -> None:
    texts, asked = corpus(), questions()
    ids = [row["id"] for row in texts]
    passages = mini.encode([row["text"] for row in texts], task="retrieval.passage")
    queries = mini.encode([row["text"] for row in asked], task="retrieval.query")
    order = np.argsort(-(queries @ passages.T), axis=1)
    ranks = [[ids[i] for i in row].index(q["answer"]) for row, q in zip(order, asked, strict=True)]
    assert all(q["lang"] != q["answer"] for q in asked)
    # Chance is a mean reciprocal rank of 0.1 over 46 texts.
    assert np.mean([1 / (rank + 1) for rank in ranks]) > 0.3, ranks


def test_translations_are_nearer_than_other_sentences(mini: Embedder) -> None:
    english = ["The train is late.", "A cat sleeps on the chair.", "How do I change my password?", "It will rain."]
    others = {
        "de": ["Der Zug hat Verspätung.", "Eine Katze schläft auf dem Stuhl.", "Wie ändere ich mein Passwort?",
               "Es wird regnen."],
        "fr": ["Le train est en retard.", "Un chat dort sur la chaise.", "Comment changer mon mot de passe ?",
               "Il va pleuvoir."],
        "es": ["El tren llega tarde.", "Un gato duerme en la silla.", "¿Cómo cambio mi contraseña?", "Va a llover."],
    }  # fmt: skip
    first = mini.encode(english, task="text-matching")
    for lang, texts in others.items():
        nearest = (mini.encode(texts, task="text-matching") @ first.T).argmax(axis=1)
        assert (nearest == np.arange(4)).sum() >= 3, lang


def test_every_task_has_an_adapter_of_its_own(mini: Embedder) -> None:
    vectors = np.stack([mini.encode("a cat on a chair", task=task, prompt="") for task in (None, *mini.tasks)])
    cosines = vectors @ vectors.T
    assert (cosines[~np.eye(len(cosines), dtype=bool)] < 0.9999).all()


def test_the_int8_graph_gives_nearly_the_same_vectors() -> None:
    texts = [row["text"] for row in corpus()]
    words = [word for text in texts for word in text.split()[:3]]  # no mean over many tokens takes their errors away
    engines = Embedder(engine="onnx-int8"), Embedder(engine="onnx")
    for task in (None, *engines[0].tasks):
        int8, exact = (engine.encode(texts + words, task=task) for engine in engines)
        assert (int8 * exact).sum(axis=1).min() > 0.999, task


def test_int8_vectors_come_ready(mini: Embedder) -> None:
    texts = [row["text"] for row in corpus()]
    exact, codes = mini.encode(texts), mini.encode(texts, dtype="int8").astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    np.testing.assert_allclose(codes @ codes.T, exact @ exact.T, atol=0.02)


def test_the_package_stays_under_its_size(mini: Embedder) -> None:
    assert sum(path.stat().st_size for path in PACKAGE.rglob("*") if path.is_file()) < 100_000_000
    assert (mini.folder / "README.md").read_text().startswith("# polyvec-mini")


def peak_memory_of(model: str, work: str) -> int:
    """Return the peak resident bytes of a process that opens ``model`` as ``m`` and does ``work``."""
    code = (
        "import warnings; warnings.simplefilter('ignore'); from polyvec import Embedder; "
        f"m = Embedder({model!r}); {work}; print(open('/proc/self/status').read())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Not getrusage: its peak starts at the size of the process that started this one.
    line = next(line for line in result.stdout.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")


@on_linux
@pytest.mark.parametrize(
    "work",
    ["m.encode('word ' * 8100)", "m.encode('the quick brown fox ' * 520_000)"],
    ids=["8192 tokens", "10 MB, cut"],
)
def test_long_input_works_within_a_gigabyte(work: str) -> None:
    assert peak_memory_of("polyvec-mini", work) < 1_000_000_000


@on_linux
def test_a_text_of_many_windows_is_late_chunked_within_a_gigabyte(model_folder: Path) -> None:
    """A hundred kilobytes in dozens of windows, with a tiny encoder: mini would take minutes."""
    text = "'the quick brown fox ' * 5_000"
    assert peak_memory_of(str(model_folder), f"assert len(m.encode({text}, late_chunking=2000)) > 10") < 1_000_000_000
