"""Peers as systems: each runs through its own library, and gives what that library gives."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from typer.testing import CliRunner

from polyvec import Embedder
from polyvec.cli import app
from polyvec.errors import InputError
from polyvec.evaluation.peers import terms
from polyvec.evaluation.run import plan, run_cells
from polyvec.evaluation.suites import Pairs, Ranking, Suite
from polyvec.evaluation.systems import System, open_system
from polyvec.serving.app import make_app
from polyvec.serving.service import Service

TEXTS = ["It will rain today.", "The train is late.", "Bread and music"]


def encode(system: System, texts: Sequence[str] = TEXTS) -> np.ndarray:
    assert system.encode is not None
    return system.encode(texts, None, "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_folder_of_sentence_transformers_gives_its_own_vectors(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({w for t in TEXTS for w in t.lower().split()})]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    transformer = models.Transformer(str(tmp_path / "bert"))
    library = SentenceTransformer(modules=[transformer, models.Pooling(24)], device="cpu")
    library.save(str(tmp_path / "st"))
    system = open_system(f"st:{tmp_path / 'st'}")
    expected = library.encode(TEXTS)
    np.testing.assert_allclose(encode(system), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    assert (system.width, system.prompts, system.engine) == (24, {}, "sentence-transformers")
    assert system.num_bytes == (tmp_path / "st/model.safetensors").stat().st_size
    before = system.weights
    (tmp_path / "st/modules.json").write_text((tmp_path / "st/modules.json").read_text() + " ")
    assert open_system(f"st:{tmp_path / 'st'}").weights != before  # any setting may change a vector


def test_a_folder_of_model2vec_gives_its_own_vectors(tmp_path: Path) -> None:
    from model2vec import StaticModel
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = sorted({w for t in TEXTS for w in t.replace(".", "").split()})
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, **{w: i + 2 for i, w in enumerate(words)}}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    vectors = np.random.default_rng(0).normal(size=(len(words) + 2, 8)).astype(np.float32)
    library = StaticModel(vectors, tokenizer)
    library.save_pretrained(tmp_path)
    found = encode(open_system(f"model2vec:{tmp_path}"))
    expected = library.encode(TEXTS)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_the_universal_sentence_encoder_knows_a_translation() -> None:
    system = open_system("use16")
    texts = ["The weather is nice today.", "Das Wetter ist heute schön.", "Der Zug hat Verspätung."]
    vectors = encode(system, [*texts, "x " * 500])
    assert system.width == 512 and vectors[0] @ vectors[1] > 0.7 > vectors[0] @ vectors[2] + 0.2
    np.testing.assert_allclose(vectors[:1], encode(system, texts[:1]), atol=1e-2)


@pytest.fixture(scope="module")
def server(embedder: Embedder) -> Iterator[str]:
    """Our own server over a socket; the client is OpenAI's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        served = make_app(Service(embedder, queue_tokens=50_000), max_body_bytes=1_000_000)
        running = uvicorn.Server(uvicorn.Config(served, log_level="warning"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        running.should_exit = True
        thread.join()


def test_a_server_gives_the_vectors_of_its_model(server: str, embedder: Embedder) -> None:
    name = f"{server}#{embedder.model_name}"
    system = open_system(name)
    texts = [f"{TEXTS[i % 3]} {i}" for i in range(150)]  # more than one request
    np.testing.assert_allclose(encode(system, texts), embedder.encode(texts), atol=1e-5)
    assert system.weights == f"{name}, 32 components"
    with pytest.raises(InputError, match="must answer requests for embeddings, got: .*model"):
        open_system(f"{server}#another")
    with pytest.raises(InputError, match="must be named with its model"):
        open_system(server)


def test_words_rank_passages_and_score_as_vectors_do(tmp_path: Path) -> None:
    data = Ranking(
        {"q1": "Regen im Norden", "q2": "北京的天气", "q3": "unheard"},
        {"a": "Im Norden fällt Regen.", "b": "Der Zug ist spät.", "c": "今天北京天气很好", "d": "東京の電車"},
        {"q1": {"a": 1}, "q2": {"c": 1}, "q3": {"b": 1}},
    )
    system = open_system("bm25")
    (row,) = run_cells(plan([system], [Suite("retrieval", "words", data)]), tmp_path)
    assert row["score"] == pytest.approx(2 / 3) and row["dimensions"] == row["bytes_per_vector"] == 0
    candidates = Ranking(data.queries, data.corpus, data.qrels, {q: ["b", "a", "c"] for q in data.queries})
    assert system.rank is not None
    assert system.rank(candidates) == [["a", "c", "b"], ["c", "b", "a"], ["c", "b", "a"]]


def test_terms_are_words_or_pairs_of_characters_where_a_script_parts_none() -> None:
    assert terms("Don't PANIC, 42!") == ["don", "t", "panic", "42"]
    assert terms("abc北京天") == ["abc", "北京", "京天"]
    assert terms("हिन्दी में") == ["हिन्दी", "में"]
    assert terms("京") == ["京"]


def test_suites_without_ranking_are_not_for_words(tmp_path: Path) -> None:
    pairs = Suite("sts", "s", Pairs(["a", "b"], ["c", "d"], [1.0, 0.0]))
    with pytest.raises(InputError, match="bm25 must fit a suite's kind, got sts; bm25 ranks passages alone"):
        plan([open_system("bm25")], [pairs])


@pytest.mark.parametrize("name", ["st", "model2vec"])
def test_a_peer_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}:FOLDER must be a folder of the model, got none at nowhere"):
        open_system(f"{name}:nowhere")


def test_the_command_compares_a_model_with_words(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"query": text.split()[-1], "passage": text} for text in TEXTS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", str(tmp_path / "pairs.jsonl"), "--model", str(model_folder), "--model", "bm25"]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out"), "--json", "--engine", "onnx"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [row["model"] for row in answer["results"]] == [str(model_folder), "bm25"]
    assert answer["results"][1]["score"] == 1.0 and answer["comparisons"][0]["second"] == "bm25"
