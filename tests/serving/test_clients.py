"""A real process on a free port, asked by each dialect's own client."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import ollama
import openai
import pytest
from huggingface_hub import InferenceClient, close_session

from polyvec import Embedder
from tests.serving.process import start, stop

TEXTS = ["The train is late.", "Wo ist der Bahnhof?", "a"]


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[str]:
    process, url = start("--model", model_folder)
    yield url
    log = stop(process)
    assert process.returncode in (0, -signal.SIGTERM), log
    assert "Traceback" not in log and not any(text in log for text in TEXTS[:2])


@pytest.fixture(scope="module")
def name(model_folder: Path) -> str:
    return str(model_folder)


def test_openai(server: str, name: str, embedder: Embedder) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none") as client:
        assert client.models.list().data[0].id == name
        answer = client.embeddings.create(model=name, input=TEXTS, dimensions=16)
        np.testing.assert_allclose(
            [row.embedding for row in answer.data], embedder.encode(TEXTS, dimensions=16), atol=1e-6
        )
        task = client.embeddings.create(
            model=name, input="a", encoding_format="float", extra_body={"task": "separation"}
        )
        np.testing.assert_allclose(task.data[0].embedding, embedder.encode("a", task="separation"), atol=1e-6)
        with pytest.raises(openai.BadRequestError, match="dimensions must be between 1 and 32"):
            client.embeddings.create(model=name, input="a", dimensions=64)


def test_cohere(server: str, name: str, embedder: Embedder) -> None:
    with httpx.Client() as connection:
        client = cohere.ClientV2(api_key="none", base_url=server, httpx_client=connection)
        answer: Any = client.embed(
            model=name,
            texts=TEXTS,
            input_type="search_query",
            embedding_types=["float", "ubinary"],
            output_dimension=16,
        )
        expected = embedder.encode(TEXTS, task="retrieval.query", dimensions=16)
        np.testing.assert_allclose(answer.embeddings.float_, expected, atol=1e-6)
        assert len(answer.embeddings.ubinary[0]) == 2
        with pytest.raises(cohere.BadRequestError, match="model must be"):
            client.embed(model="x", texts=TEXTS, input_type="search_query", embedding_types=["float"])


def test_hugging_face(server: str, embedder: Embedder) -> None:
    with InferenceClient(server) as client:
        vector = client.feature_extraction(TEXTS[0], prompt_name="retrieval.passage", truncate=True)
    close_session()  # the package's own, shared by its clients
    np.testing.assert_allclose(vector[0], embedder.encode(TEXTS[0], task="retrieval.passage"), atol=1e-6)


def test_tei_routes(server: str, embedder: Embedder) -> None:
    vectors = embedder.encode(TEXTS, task="text-matching")
    body = {"inputs": {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}}
    assert httpx.post(f"{server}/similarity", json=body).json() == pytest.approx(vectors[1:] @ vectors[0], abs=1e-5)
    tokens = httpx.post(f"{server}/tokenize", json={"inputs": TEXTS}).json()
    assert [token["id"] for token in tokens[0]] == embedder.tokenizer.encode(TEXTS[0]).input_ids.tolist()
    states = httpx.post(f"{server}/embed_all", json={"inputs": TEXTS}).json()
    assert [len(rows) for rows in states] == [len(row) for row in tokens]
    mean = np.mean(states[1], axis=0)
    np.testing.assert_allclose(mean / np.linalg.norm(mean), embedder.encode(TEXTS[1]), atol=1e-6)


def test_ollama(server: str, name: str, embedder: Embedder) -> None:
    with ollama.Client(server) as client:
        answer = client.embed(model=name, input=TEXTS)
        np.testing.assert_allclose(answer.embeddings, embedder.encode(TEXTS), atol=1e-6)
        with pytest.raises(ollama.ResponseError, match="model must be"):
            client.embed(model="x", input="a")
