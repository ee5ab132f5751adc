"""Every dialect's answers and errors, in process."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from polyvec import Embedder
from polyvec.serving.app import make_app
from polyvec.serving.service import Service

TEXTS = ["The train is late.", "Wo ist der Bahnhof?", "a"]


def ask(client: TestClient, embedder: Embedder, **fields: Any) -> Any:
    response = client.post("/v1/embeddings", json={"model": embedder.model_name, "input": TEXTS, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def vectors(answer: Any) -> Any:
    return [row["embedding"] for row in answer["data"]]


@pytest.mark.parametrize("task", [None, "retrieval.query", "text-matching"])
def test_jina_answers_equal_encode(client: TestClient, embedder: Embedder, task: str | None) -> None:
    answer = ask(client, embedder, task=task, dimensions=16)
    np.testing.assert_allclose(vectors(answer), embedder.encode(TEXTS, task=task, dimensions=16), atol=1e-6)
    assert answer["usage"]["total_tokens"] == sum(e.num_tokens for e in embedder.encode_stream(TEXTS, task=task))


def test_types_in_a_list_come_by_name(client: TestClient, embedder: Embedder) -> None:
    first = vectors(ask(client, embedder, embedding_type=["float", "binary", "base64"]))[0]
    assert sorted(first) == ["base64", "binary", "float"]
    assert first["binary"] == embedder.encode(TEXTS, dtype="binary")[0].tolist()


def test_late_chunking_reads_the_inputs_as_one_text(client: TestClient, embedder: Embedder) -> None:
    text, edges = "".join(TEXTS), np.cumsum([0, *map(len, TEXTS)]).tolist()
    expected = embedder.encode(text, late_chunking=list(zip(edges[:-1], edges[1:], strict=True)))
    np.testing.assert_allclose(vectors(ask(client, embedder, late_chunking=True)), expected.vectors, atol=1e-6)


def test_token_ids_equal_their_text(client: TestClient, embedder: Embedder) -> None:
    ids = [embedder.tokenizer.encode(text).input_ids[1:-1].tolist() for text in TEXTS]
    expected = embedder.encode(TEXTS, task="retrieval.query")
    np.testing.assert_allclose(vectors(ask(client, embedder, input=ids, task="retrieval.query")), expected, atol=1e-6)


def test_operation(client: TestClient, embedder: Embedder) -> None:
    assert client.get("/health").json() == {"status": "ok"} and client.get("/ready").status_code == 200
    assert client.get("/info").json()["max_input_length"] == embedder.max_tokens
    assert "polyvec_requests_total" in client.get("/metrics").text
    assert client.get("/ready", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert "access-control-allow-origin" not in client.get("/ready", headers={"origin": "http://x.org"}).headers


BAD = [
    ({"input": "a", "dimensions": float("nan")}, 400, "dimensions must"),
    ({"input": "a", "dimensions": 10**400}, 400, "dimensions must"),
    ({"input": "a", "dimensions": True}, 400, "dimensions must"),
    ({"input": "a", "dimensions": 0}, 400, "dimensions must be between 1 and 32"),
    ({"input": "a", "dimensions": 33}, 400, "dimensions must be between 1 and 32"),
    ({"input": "a", "model": "gpt"}, 400, "model must be"),
    ({"input": "a", "task": "query"}, 400, "task must be one of"),
    ({"input": "a", "task": "long" * 5000}, 400, "task must be one of"),
    ({"input": "a", "tsak": "separation"}, 400, "no such field"),
    ({"input": [[1, 512]]}, 400, "token ids from 0 to 511"),
    ({"input": [[-1]]}, 400, "token ids from 0 to 511"),
    ({"input": ""}, 400, "input[0] must not be empty"),
    ({"input": []}, 400, "input must hold between 1 and 2048"),
    ({"input": ["a"] * 2049}, 400, "got 2049"),
    ({"input": "word " * 2000}, 400, "truncate"),
    ({"input": [5 for _ in range(2000)]}, 400, "input[0] must be at most"),
    ({"input": ["a", " "], "late_chunking": True}, 400, "not empty for late_chunking"),
    ({"input": "a", "embedding_type": "float", "encoding_format": "float"}, 400, "keep one"),
    ({"input": "a", "embedding_type": "binary", "dimensions": 12}, 400, "multiple of 8"),
]


@pytest.mark.parametrize(("fields", "status", "sentence"), BAD)
def test_bad_input_is_one_sentence(
    client: TestClient, embedder: Embedder, fields: dict[str, Any], status: int, sentence: str
) -> None:
    body = json.dumps({"model": embedder.model_name, **fields})
    response = client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})
    answer = response.json()
    assert response.status_code == status, answer
    assert sentence in answer["error"]["message"] and answer["detail"] == answer["error"]["message"]
    assert answer["request_id"] == response.headers["x-request-id"]
    assert len(response.content) < 1000
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (b"[" * 5000, 400, "nest at most"),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, 400, "nest at most"),
        (b"{", 400, "must be JSON"),
        (b"\xff\xfe", 400, "must be JSON"),
        (b"9" * 5000, 400, "must"),
        (b"x" * 1_000_001, 413, "at most 1000000 bytes"),
    ],
)
def test_a_bad_body_is_one_sentence(client: TestClient, content: bytes, status: int, sentence: str) -> None:
    response = client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status and sentence in response.json()["error"]["message"]


def test_odd_texts_are_texts(client: TestClient, embedder: Embedder) -> None:
    odd = ["\ud800", "\x00", " ", "\ufeffa", "\u202eabc", "a\u200db", "e" + "\u0301" * 60, "<s> [MASK] </s>"]
    as_json = {"content-type": "application/json"}
    body = json.dumps({"model": embedder.model_name, "input": odd})
    sent = client.post("/v1/embeddings", content=body, headers=as_json)
    assert sent.status_code == 200, sent.text
    np.testing.assert_allclose(vectors(sent.json()), embedder.encode(odd), atol=1e-6)
    assert client.post("/tokenize", content=json.dumps({"inputs": odd}), headers=as_json).status_code == 200


def test_each_dialect_has_its_envelope(client: TestClient, embedder: Embedder) -> None:
    tei = client.post("/embed", json={"inputs": ""})
    assert tei.status_code == 422 and tei.json()["error_type"] == "Validation"
    cohere = client.post("/v2/embed", json={"model": "x", "texts": ["a"], "input_type": "clustering"})
    assert cohere.status_code == 400 and sorted(cohere.json()) == ["id", "message"]
    ollama = client.post("/api/embed", json={"model": embedder.model_name, "input": []})
    assert ollama.status_code == 400 and list(ollama.json()) == ["error"]
    assert client.post("/v1/embeddings", content="a").status_code == 415
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"
    assert client.get("/embed").json()["error_type"] == "Backend" and client.get("/embed").status_code == 405


def test_an_overfull_queue_is_429_or_503(embedder: Embedder) -> None:
    service = Service(embedder, queue_tokens=1000)
    with TestClient(make_app(service)) as client:
        body = {"model": embedder.model_name, "input": "a"}
        service.scheduler._pending_tokens += 1000
        response = client.post("/v1/embeddings", json=body)
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        service.scheduler._pending_tokens -= 1000
        service.scheduler.draining = True
        assert client.post("/v1/embeddings", json=body).status_code == 503
        assert client.get("/ready").status_code == 503
