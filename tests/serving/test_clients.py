"""A real process on a free port, asked by each dialect's own client."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import ollama
import openai
import pytest
from huggingface_hub import InferenceClient, close_session
from huggingface_hub.errors import HfHubHTTPError

from polyvec import Embedder
from polyvec.errors import TruncationWarning
from polyvec.inference.quantize import unit
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
        assert client.models.retrieve(name).id == name
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("x")
        answer = client.embeddings.create(model=name, input=TEXTS, dimensions=16)
        np.testing.assert_allclose(
            [row.embedding for row in answer.data], embedder.encode(TEXTS, dimensions=16), atol=1e-6
        )
        task = client.embeddings.create(
            model=name, input="a", encoding_format="float", extra_body={"task": "separation"}
        )
        np.testing.assert_allclose(task.data[0].embedding, embedder.encode("a", task="separation"), atol=1e-6)
        ids = [embedder.tokenizer.encode(text).input_ids[1:-1].tolist() for text in TEXTS]
        tokens = client.embeddings.create(model=name, input=ids)  # base64, as the client asks where nothing is said
        np.testing.assert_allclose([row.embedding for row in tokens.data], embedder.encode(TEXTS), atol=1e-6)
        many = client.embeddings.create(model=name, input=[f"text {i}" for i in range(2048)])
        assert [row.index for row in many.data] == list(range(2048))
        np.testing.assert_allclose(many.data[2047].embedding, embedder.encode("text 2047"), atol=1e-6)
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
    with InferenceClient(server, provider="hf-inference") as client:
        vector = client.feature_extraction(TEXTS[0], prompt_name="retrieval.passage", truncate=True)
        narrow = client.feature_extraction(TEXTS, dimensions=16, normalize=False, model=f"{server}/embed")
        scores = client.sentence_similarity(TEXTS[0], TEXTS[1:], model=f"{server}/similarity")
        info = client.get_endpoint_info()
        is_healthy = client.health_check()
        with pytest.raises(HfHubHTTPError) as refused:
            client.feature_extraction("")
    close_session()  # the package's own, shared by its clients
    np.testing.assert_allclose(vector[0], embedder.encode(TEXTS[0], task="retrieval.passage"), atol=1e-6)
    np.testing.assert_allclose(unit(narrow), embedder.encode(TEXTS, dimensions=16), atol=1e-6)
    vectors = embedder.encode(TEXTS, task="text-matching")
    np.testing.assert_allclose(scores, vectors[1:] @ vectors[0], atol=1e-5)
    assert info["max_client_batch_size"] == 2048 and info["max_input_length"] == embedder.max_tokens and is_healthy
    assert refused.value.response.status_code == 422


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


def test_tei_s_parameters_hold_on_every_route(server: str, embedder: Embedder) -> None:
    long = "word " * 2000
    named = {"prompt_name": "retrieval.query", "truncation_direction": "Right", "truncate": True}
    body = {"inputs": {"source_sentence": TEXTS[0], "sentences": [TEXTS[1], long]}}
    scores = httpx.post(f"{server}/similarity", json={**body, "parameters": named}).json()
    with pytest.warns(TruncationWarning):
        vectors = embedder.encode([TEXTS[0], TEXTS[1], long], task="retrieval.query")
    assert scores == pytest.approx(vectors[1:] @ vectors[0], abs=1e-5)
    states = httpx.post(f"{server}/embed_all", json={"inputs": [TEXTS[1], long], **named}).json()
    means = unit(np.array([np.mean(rows, axis=0) for rows in states], np.float32))
    np.testing.assert_allclose(means, vectors[1:], atol=1e-6)
    assert len(states[1]) == embedder.max_tokens
    for path, refused in (("similarity", body), ("embed_all", {"inputs": long})):
        answer = httpx.post(f"{server}/{path}", json=refused)
        assert answer.status_code == 422 and "must be at most" in answer.json()["error"]


def test_ollama(server: str, name: str, embedder: Embedder) -> None:
    with ollama.Client(server) as client:
        answer = client.embed(model=name, input=TEXTS)
        np.testing.assert_allclose(answer.embeddings, embedder.encode(TEXTS), atol=1e-6)
        for unknown in ("x", f"{name}:x"):
            with pytest.raises(ollama.ResponseError, match="model must be"):
                client.embed(model=unknown, input="a")
        tags = client.list().models
        assert [tag.model for tag in tags] == [f"{name}:{task}" for task in ("latest", *embedder.tasks)]
        for tag, task in zip(tags, (None, *embedder.tasks), strict=True):
            assert tag.model and tag.digest == embedder.weights_hash
            one = client.embeddings(model=tag.model, prompt="a").embedding
            np.testing.assert_allclose(one, embedder.encode("a", task=task), atol=1e-6)
            np.testing.assert_allclose(client.embed(model=tag.model, input="a").embeddings[0], one, atol=1e-6)
            shown = client.show(tag.model)
            assert shown.template == (embedder.config.prompts[task] if task else "")
            assert shown.modelinfo and shown.modelinfo["xlm-roberta.embedding_length"] == len(one)


def test_every_dialect_gives_what_encode_gives_alone_and_in_any_batch(mini: Embedder) -> None:
    """With the model in the package, on the engine that is faster here, while others share its batches."""
    texts = [*TEXTS, "Bread needs flour, water and salt. " * 12]
    others = [f"{text} {i}" for i in range(12) for text in texts]
    process, url = start(engine=mini.engine.name.removesuffix("-float32"))
    by_name: dict[str | None, list[str]] = {None: texts, "retrieval.query": texts, "text-matching": texts}
    expected = {task: mini.encode(own, task=task) for task, own in by_name.items()}

    def ask(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def through_all(client: httpx.Client, given: list[str]) -> dict[str, tuple[str | None, Any]]:
        name = {"model": "polyvec-mini"}
        openai_body = {**name, "input": given}
        jina = ask(client, "/v1/embeddings", {**openai_body, "task": "retrieval.query"})
        plain = ask(client, "/v1/embeddings", openai_body)
        cohere_body = {**name, "texts": given, "input_type": "search_query"}
        return {
            "openai": (None, [row["embedding"] for row in plain["data"]]),
            "jina": ("retrieval.query", [row["embedding"] for row in jina["data"]]),
            "cohere": ("retrieval.query", ask(client, "/v2/embed", cohere_body)["embeddings"]["float"]),
            "tei": ("text-matching", ask(client, "/embed", {"inputs": given, "prompt_name": "text-matching"})),
            "ollama": (None, ask(client, "/api/embed", openai_body)["embeddings"]),
        }

    try:
        with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(8) as pool:
            for i, text in enumerate(texts):
                for task, vectors in through_all(client, [text]).values():
                    np.testing.assert_allclose(vectors[0], expected[task][i], atol=1e-6)
            crowd = [pool.submit(through_all, client, [*others[i::8], *texts]) for i in range(8)]
            for one in crowd:
                for task, vectors in one.result().values():
                    np.testing.assert_allclose(vectors[-len(texts) :], expected[task], atol=1e-6)
    finally:
        stop(process)
