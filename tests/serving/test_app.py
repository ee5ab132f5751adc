"""Every dialect's answers and errors, in process."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from polyvec import Embedder
from polyvec.errors import InputError
from polyvec.inference.batching import Batch
from polyvec.serving import bodies
from polyvec.serving import service as service_module
from polyvec.serving.app import make_app
from polyvec.serving.caller import CALLER, NOBODY, Caller
from polyvec.serving.errors import Problem
from polyvec.serving.guard import check_shape
from polyvec.serving.keys import Keys, add_key
from polyvec.serving.scheduler import DeadlineError, DrainingError, OverloadedError
from polyvec.serving.service import Service

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
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


def refusals() -> dict[str, tuple[int, str]]:
    """The documented table: what is sent, its status, and how the sentence begins."""
    rows = re.findall(r"^\| (.+) \| (\d{3}) \| `(.+)` \|$", DOCUMENT.read_text(), re.M)
    return {sent: (int(status), sentence) for sent, status, sentence in rows}


#: Fields of a request for each row of the table, beside ``"input": "a"``.
FIELDS: dict[str, dict[str, Any]] = {
    "a field that the API has not": {"tsak": "separation"},
    "no model's name": {"model": None},
    "the name of another model": {"model": "gpt"},
    "a task that the model has not": {"task": "long" * 5000},
    "`dimensions` NaN": {"dimensions": float("nan")},
    "`dimensions` true": {"dimensions": True},
    "`dimensions` 64.0": {"dimensions": 64.0},
    "`dimensions` 0, or wider than the model": {"dimensions": 33},
    "`dimensions` of 400 digits": {"dimensions": 10**400},
    "an input that is a number": {"input": 5},
    "no input": {"input": []},
    "2049 inputs": {"input": ["a"] * 2049},
    "an empty text": {"input": ""},
    "a text beyond the model's tokens, without `truncate`": {"input": "word " * 2000},
    "a token id out of the vocabulary": {"input": [[1, 512]]},
    "a token id of `<s>`, `</s>` or `<pad>`": {"input": [[0]]},
    "more tokens than `queue_tokens`": {"input": ["word " * 90] * 1000},
    "white space alone, with `late_chunking`": {"input": ["a", " "], "late_chunking": True},
    "`encoding_format` beside `embedding_type`": {"embedding_type": "float", "encoding_format": "float"},
    "`binary` in a width that is not a multiple of 8": {"embedding_type": "binary", "dimensions": 12},
}
JSON = {"content-type": "application/json"}
#: Whole requests for the other rows.
REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no JSON": ("POST", "/v1/embeddings", {"content": b"\xff\xfe", "headers": JSON}),
    "JSON 5000 levels deep": ("POST", "/v1/embeddings", {"content": b'{"a": ' * 5000 + b"1", "headers": JSON}),
    "more than 10000 fields, lists and objects": (
        "POST", "/v1/embeddings", {"content": b"{" + b'"": 0, ' * 10_000 + b'"a": [1]}', "headers": JSON},
    ),
    "a whole number of 5000 digits": ("POST", "/v1/embeddings", {"content": b"9" * 5000, "headers": JSON}),
    "more bytes than `max_body_bytes`": ("POST", "/v1/embeddings", {"content": b"x" * 1_000_001, "headers": JSON}),
    "another content type": ("POST", "/v1/embeddings", {"content": "a"}),
    "a compressed body": ("POST", "/v1/embeddings", {"content": "{}", "headers": {**JSON, "content-encoding": "gzip"}}),
    "`x-polyvec-timeout` that is no number of seconds": (
        "POST", "/v1/embeddings", {"content": "{}", "headers": {**JSON, "x-polyvec-timeout": "soon"}},
    ),
    "a path of nobody": ("GET", "/nowhere", {}),
    "another method": ("GET", "/v1/embeddings", {}),
}  # fmt: skip
ELSEWHERE = {"no key, or none of this server's"}  # test_keys


def test_every_documented_refusal_is_tested() -> None:
    assert refusals().keys() == FIELDS.keys() | REQUESTS.keys() | ELSEWHERE


@pytest.mark.parametrize("sent", [*FIELDS, *REQUESTS])
def test_bad_input_is_refused_as_documented(client: TestClient, embedder: Embedder, sent: str) -> None:
    if sent in FIELDS:
        content = json.dumps({"model": embedder.model_name, "input": "a", **FIELDS[sent]})
        response = client.post("/v1/embeddings", content=content, headers=JSON)
    else:
        method, path, options = REQUESTS[sent]
        response = client.request(method, path, **options)
    status, sentence = refusals()[sent]
    answer = response.json()
    assert response.status_code == status, answer
    assert answer["error"]["message"].startswith(sentence) and answer["detail"] == answer["error"]["message"]
    assert answer["request_id"] == response.headers["x-request-id"]
    assert len(response.content) < 1000
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"null", "the body must follow the API, got a fault (input should be an object)"),
        (b"[" * 5000, "nest at most"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v2/embed", "/embed", "/api/embed"])
def test_a_bad_body_is_refused_in_every_dialect(client: TestClient, path: str, content: bytes, sentence: str) -> None:
    response = client.post(path, content=content, headers=JSON)
    assert response.status_code == (422 if path == "/embed" else 400)
    said = response.json().get("error", response.json().get("message"))
    said = said["message"] if isinstance(said, dict) else said
    assert sentence in said


MANY: list[Any] = [None] * 1000


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/embeddings", {"model": "x", "input": MANY}),
        ("/v1/embeddings", {"model": "x", "input": [{"x": 1}] * 1000}),
        ("/v1/embeddings", {"model": "x", "input": [MANY] * 100}),
        ("/v1/embeddings", {"model": "x", "input": "a", "embedding_type": MANY}),
        ("/v2/embed", {"model": "x", "input_type": "clustering", "texts": MANY}),
        ("/v2/embed", {"model": "x", "input_type": "clustering", "texts": ["a"], "embedding_types": MANY}),
        ("/embed", {"inputs": MANY}),
        ("/embed_all", {"inputs": [MANY] * 100}),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": MANY}}),
        ("/tokenize", {"inputs": MANY}),
        ("/api/embed", {"model": "x", "input": MANY}),
    ],
)
def test_of_many_faults_one_is_read(
    client: TestClient, path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[int] = []
    invalid = bodies.invalid
    monkeypatch.setattr(bodies, "invalid", lambda errors: faults.append(len(errors)) or invalid(errors))
    assert client.post(path, json=fields).status_code in (400, 422)
    assert faults and faults[0] < 20  # a few for each kind that a list may be of


def test_quotes_without_end_are_read_once() -> None:
    started = time.monotonic()
    with pytest.raises(Problem, match="nest at most"):
        check_shape(b"[" * 40 + b'"' * 200_000)
    with pytest.raises(Problem, match="must be JSON in UTF-8"):
        check_shape("[[]]".encode("utf-16"))
    check_shape(b"[" * 32 + b"]" * 5_000_000)  # looks at as many as were opened, and leaves the rest to the parser
    assert time.monotonic() - started < 5  # minutes, if each were looked from to the end
    check_shape(b"[" + b'"\\", ""[[{:", ' * 5000 + b"1]")  # brackets in strings are text


def test_a_type_named_twice_is_computed_once(
    client: TestClient, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    quantize = Service.quantize
    monkeypatch.setattr(
        Service, "quantize", lambda self, vectors, dtype: computed.append(dtype) or quantize(self, vectors, dtype)
    )
    assert list(vectors(ask(client, embedder, embedding_type=["binary"] * 100))[0]) == ["binary"]
    sent = {
        "model": embedder.model_name,
        "texts": ["a"],
        "input_type": "clustering",
        "embedding_types": ["binary"] * 100,
    }
    assert list(client.post("/v2/embed", json=sent).json()["embeddings"]) == ["binary"]
    assert computed == ["binary"] * 2


@pytest.mark.parametrize(
    ("path", "limit", "most"), [("/embed_all", "MAX_NUMBERS", 32 * 6), ("/tokenize", "MAX_DESCRIBED", 6)]
)
def test_an_answer_of_every_token_is_bounded(
    client: TestClient, path: str, limit: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, limit, most)
    assert client.post(path, json={"inputs": [[5] * 4] if path == "/embed_all" else "a"}).status_code == 200
    refused = client.post(path, json={"inputs": ["some words of a text"]})
    assert refused.status_code == 422 and "must hold at most 6 tokens, got" in refused.json()["error"]


def test_odd_texts_are_texts(client: TestClient, embedder: Embedder) -> None:
    odd = ["\ud800", "\x00", " ", "\ufeffa", "\u202eabc", "a\u200db", "e" + "\u0301" * 60, "<s> [MASK] </s>"]
    as_json = {"content-type": "application/json"}
    body = json.dumps({"model": embedder.model_name, "input": odd})
    sent = client.post("/v1/embeddings", content=body, headers=as_json)
    assert sent.status_code == 200, sent.text
    many = {"model": embedder.model_name, "input": "e" + "\u0301" * 10_000, "truncate": True}
    assert client.post("/v1/embeddings", json=many).status_code == 200
    np.testing.assert_allclose(vectors(sent.json()), embedder.encode(odd), atol=1e-6)
    assert client.post("/tokenize", content=json.dumps({"inputs": odd}), headers=as_json).status_code == 200


def test_of_two_fields_of_one_name_the_last_counts(client: TestClient, embedder: Embedder) -> None:
    body = f'{{"model": "x", "model": {json.dumps(embedder.model_name)}, "input": "b", "input": "a"}}'
    sent = client.post("/v1/embeddings", content=body, headers=JSON)
    np.testing.assert_allclose(vectors(sent.json())[0], embedder.encode("a"), atol=1e-6)


def test_each_dialect_has_its_envelope(client: TestClient, embedder: Embedder) -> None:
    tei = client.post("/embed", json={"inputs": ""})
    assert tei.status_code == 422 and tei.json()["error_type"] == "Validation"
    cohere = client.post("/v2/embed", json={"model": "x", "texts": ["a"], "input_type": "clustering"})
    assert cohere.status_code == 400 and sorted(cohere.json()) == ["id", "message"]
    ollama = client.post("/api/embed", json={"model": embedder.model_name, "input": []})
    assert ollama.status_code == 400 and list(ollama.json()) == ["error"]
    for keep, status in (("5m", 200), (-1, 200), (0.5, 200), (True, 400)):
        sent = {"model": embedder.model_name, "input": "a", "keep_alive": keep}
        assert client.post("/api/embed", json=sent).status_code == status
    assert client.post("/v1/embeddings", content="a").status_code == 415
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"
    assert client.get("/embed").json()["error_type"] == "Validation" and client.get("/embed").status_code == 405


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed", "/health", "/v1/models"])
@pytest.mark.parametrize("end", ["%0A", "/", "%00"])
def test_a_path_is_one_of_the_servers_to_the_letter(client: TestClient, path: str, end: str) -> None:
    """The router's idea of a path is wider, and of what it lets in nobody checks size, shape and type."""
    for method in ("GET", "POST"):
        body = {"inputs": "a", "dimensions": "secret"}
        refused = client.request(method, path + end, json=body, follow_redirects=False)
        assert refused.status_code == 404 and "secret" not in refused.text and "location" not in refused.headers


def test_methods_are_those_that_are_allowed(client: TestClient) -> None:
    for path in ("/", "/health", "/metrics", "/v1/models"):
        head, got = client.head(path), client.get(path)
        assert (
            head.status_code == got.status_code == 200 and head.headers["content-type"] == got.headers["content-type"]
        )
    assert client.put("/").headers["allow"] == "GET, HEAD, POST"
    assert client.head("/v1/embeddings").headers["allow"] == "POST"
    assert client.post("/health", json={}).headers["allow"] == "GET, HEAD"


def test_cohere_takes_null_where_its_client_sends_it(client: TestClient, embedder: Embedder) -> None:
    body = {"model": embedder.model_name, "texts": ["a"], "input_type": "clustering"}
    optional = ("truncate", "images", "inputs", "max_tokens", "priority", "embedding_types", "output_dimension")
    answers = [client.post("/v2/embed", json={**body, **fields}) for fields in ({}, dict.fromkeys(optional))]
    assert [a.status_code for a in answers] == [200, 200]
    assert answers[0].json()["embeddings"] == answers[1].json()["embeddings"]
    refused = client.post("/v2/embed", json={**body, "truncate": "START"})
    assert "'NONE' or 'END'" in refused.json()["message"]


def test_the_documentation_of_routes_without_a_body_is_the_truth(embedder: Embedder, tmp_path: Path) -> None:
    secret = add_key("a", tmp_path / "keys.toml", {})
    with TestClient(make_app(Service(embedder, queue_tokens=1000), keys=Keys(tmp_path / "keys.toml"))) as client:
        paths = client.get("/openapi.json", headers={"authorization": f"Bearer {secret}"}).json()["paths"]
        for path in ("/health", "/ready", "/metrics", "/v1/models", "/info"):
            documented = paths[path]["get"]
            for headers in ({}, {"x-polyvec-timeout": "abc", "authorization": f"Bearer {secret}"}):
                answer = client.get(path, headers=headers)
                kind = answer.headers["content-type"].partition(";")[0]
                status = str(answer.status_code)
                assert kind in documented["responses"][status]["content"], (path, status)
                if status == "401":
                    assert answer.headers["www-authenticate"] == "Bearer"
            is_open = client.get(path).status_code == 200
            assert is_open == (documented.get("security") == [])


def test_an_answer_that_would_be_late_is_504(
    client: TestClient, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = embedder.engine.pool
    body = {"model": embedder.model_name, "input": "late"}

    def slow(batch: Batch) -> Any:
        time.sleep(0.5)
        return pool(batch)

    monkeypatch.setattr(embedder.engine, "pool", slow)
    late = client.post("/v1/embeddings", json=body, headers={"x-polyvec-timeout": "0.05"})
    in_time = client.post("/v1/embeddings", json=body, headers={"x-polyvec-timeout": "30"})
    assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
    assert late.json()["detail"].startswith("a request must be answered within 0.05 s")
    np.testing.assert_allclose(vectors(in_time.json())[0], embedder.encode("late"), atol=1e-6)


def test_an_overfull_queue_is_429_or_503(embedder: Embedder) -> None:
    service = Service(embedder, queue_tokens=1000)
    with TestClient(make_app(service)) as client:
        body = {"model": embedder.model_name, "input": "a"}
        service.scheduler._pending_tokens += 1000
        response = client.post("/v1/embeddings", json=body)
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        service.scheduler._pending_tokens -= 1000
        service.scheduler.draining = True
        refused = client.post("/v1/embeddings", json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert client.get("/ready").status_code == 503


def test_what_is_read_counts_is_in_time_and_is_finished(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(embedder, queue_tokens=1000)
    read, gate = service._rows, threading.Event()
    monkeypatch.setattr(service, "_rows", lambda *arguments: gate.wait(10) and read(*arguments))
    text = "a text" + " " * 2000  # is read aside, and counts as 126 tokens until then

    async def work() -> None:
        service.start()
        with pytest.raises(InputError, match="at most 1000 tokens, got 1251"):
            await service.embed(["a" * 20_000], task=None, late_chunking=True)
        CALLER.set(Caller(timeout=0.05))
        with pytest.raises(DeadlineError, match=r"within 0\.05 s"):
            await service.embed([text], task=None)
        CALLER.set(NOBODY)
        asked = [asyncio.create_task(service.embed([text], task=None)) for _ in range(6)]  # the late one is read still
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="got 882 waiting and 126 more"):
            await service.embed([text], task=None)
        stopping = asyncio.create_task(service.stop())
        await asyncio.sleep(0.03)
        with pytest.raises(DrainingError):
            await service.embed(["a text"], task=None)
        assert not stopping.done()
        gate.set()
        for answer in await asyncio.gather(*asked):
            np.testing.assert_allclose(answer.vectors, embedder.encode([text]), atol=1e-6)
        await stopping

    asyncio.run(work())


def test_health_is_not_the_load_s(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that is full of bulk and other work, with a row like that of the check in it."""
    service = Service(embedder, queue_tokens=300)
    pool, gate, passes = embedder.engine.pool, threading.Event(), list[list[int]]()

    def slow(batch: Batch) -> Any:
        assert gate.wait(10)
        passes.append(list(batch.lengths))
        return pool(batch)

    monkeypatch.setattr(embedder.engine, "pool", slow)
    monkeypatch.setattr(embedder.engine, "batch_tokens", 8)
    monkeypatch.setattr(embedder.engine, "lanes", 1)
    short = len(embedder.tokenizer.encode("health"))

    async def work() -> None:
        service.start()
        texts = ["health", *(f"the text of number {i}" for i in range(100))]
        asked = [asyncio.create_task(service.embed([text], task=None)) for text in texts]
        await asyncio.sleep(0.05)
        assert any(task.done() and isinstance(task.exception(), OverloadedError) for task in asked)
        checks = [asyncio.create_task(service.check()) for _ in range(3)]
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(*checks)
        places = [i for i, lengths in enumerate(passes) if lengths == [short]]  # of the work's row and of the checks'
        assert len(places) <= 2 and places[-1] < 6
        await asyncio.gather(*asked, return_exceptions=True)
        await service.stop()

    asyncio.run(work())
