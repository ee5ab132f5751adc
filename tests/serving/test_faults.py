"""Faults of every kind against a real process: what is asked beside them is answered, and answered right."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from polyvec import Embedder
from tests.serving import faulty_server as faults
from tests.serving.process import FAULTY, start, start_seconds, stop, worker_pid

ORIGIN = "https://example.org"


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    process, url = start("--model", model_folder, "--cors-origin", ORIGIN, program=(FAULTY,))
    yield process, url
    log = stop(process)
    assert "secret" not in log and faults.BAD_TEXT not in log


@pytest.fixture
def client(server: tuple[subprocess.Popen[bytes], str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[1], timeout=60) as client:
        yield client


def body(name: Any, *inputs: Any, **fields: Any) -> dict[str, Any]:
    return {"model": str(name), "input": list(inputs), "encoding_format": "float", **fields}


def texts_of(count: int) -> list[str]:
    return [f"text number {i} of a client" for i in range(count)]


def check(response: httpx.Response, expected: Any) -> None:
    assert response.status_code == 200, response.text
    vectors = [row["embedding"] for row in response.json()["data"]]
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


def ask_all(client: httpx.Client, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda one: client.post("/v1/embeddings", json=one), bodies))


@pytest.mark.parametrize(
    ("fault", "fields"),
    [
        ([faults.RAISES, 5], {}),
        ([faults.NOT_A_NUMBER, 5], {}),
        ([faults.DIES, 5], {}),
        (faults.BAD_TEXT, {}),
        ("a text", {"dimensions": faults.BAD_WIDTH}),
    ],
    ids=["forward", "not a number", "death of the worker", "tokenizer", "after the model"],
)
def test_a_fault_is_its_own_request_s_alone(
    client: httpx.Client, embedder: Embedder, fault: Any, fields: dict[str, Any]
) -> None:
    texts = texts_of(12)
    name = embedder.model_name
    bodies = [body(name, text) for text in texts]
    bodies.insert(5, body(name, fault, **fields))
    answers = ask_all(client, bodies)
    failed = answers.pop(5)
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert "secret" not in failed.text and "Traceback" not in failed.text
    for answer, expected in zip(answers, embedder.encode(texts), strict=True):
        check(answer, expected[None])
    assert client.get("/health").json() == {"status": "ok"}


def test_a_batch_beyond_the_memory_is_split_until_it_fits(client: httpx.Client, embedder: Embedder) -> None:
    ids = [[faults.TOO_LARGE, i] for i in range(5, 45)]  # together, so that they share passes
    answer = client.post("/v1/embeddings", json=body(embedder.model_name, *ids))
    alone = [client.post("/v1/embeddings", json=body(embedder.model_name, row)).json() for row in ids[:3]]
    assert answer.status_code == 200, answer.text
    vectors = [row["embedding"] for row in answer.json()["data"]]
    assert len(vectors) == 40
    np.testing.assert_allclose(vectors[:3], [one["data"][0]["embedding"] for one in alone], atol=1e-6)


def test_a_killed_worker_is_replaced_and_its_batch_computed_again(
    server: tuple[subprocess.Popen[bytes], str], client: httpx.Client, embedder: Embedder
) -> None:
    process = server[0]
    texts = [text * 15 for text in texts_of(40)]
    first = worker_pid(process)
    assert first is not None

    def kill() -> float:
        os.kill(first, signal.SIGKILL)
        started, statuses = time.monotonic(), list[int]()
        while 503 not in statuses or statuses[-1] != 200:  # the first may still be from before anyone noticed
            statuses.append(client.get("/ready").status_code)
            assert time.monotonic() < started + 30, set(statuses)  # to end at all
        return time.monotonic() - started

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_all, client, [body(embedder.model_name, text) for text in texts])
        while "polyvec_queue_tokens 0.0" in client.get("/metrics").text and not asked.done():
            pass
        seconds = kill()
        answers = asked.result()
    for answer, expected in zip(answers, embedder.encode(texts), strict=True):
        check(answer, expected[None])
    assert worker_pid(process) not in (None, first)
    # Alone a quarter of what the whole server took to start (benchmarks/restarts.py); here 40 clients ask meanwhile.
    assert seconds < 5 * start_seconds(process)


def test_slow_clients_are_closed_and_hold_up_no_one(client: httpx.Client, embedder: Embedder) -> None:
    url = client.base_url
    slow = [socket.create_connection((url.host, url.port)) for _ in range(200)]
    heads = (b"", b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\nx: ")
    for i, connection in enumerate(slow):
        connection.sendall(heads[i % 2])
    late = socket.create_connection((url.host, url.port))  # a whole head and half a body
    late.sendall(b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
    check(client.post("/v1/embeddings", json=body(embedder.model_name, "a text")), embedder.encode(["a text"]))
    for connection in slow:
        connection.settimeout(20)
        assert connection.recv(1) == b""  # closed
        connection.close()
    late.settimeout(20)
    answer = b""
    while b"must arrive within" not in answer and (part := late.recv(65536)):  # head and body may come apart
        answer += part
    late.close()
    assert answer.startswith(b"HTTP/1.1 408") and b"must arrive within" in answer


def test_a_head_without_end_is_closed(client: httpx.Client) -> None:
    url = client.base_url
    with socket.create_connection((url.host, url.port)) as connection:
        connection.settimeout(20)
        connection.sendall(b"GET / HTTP/1.1\r\nx: ")
        with pytest.raises(OSError):  # noqa: B017, PT011 - reset or broken pipe, by the order of packets
            for _ in range(1000):
                connection.sendall(b"y" * 65536)


def test_a_body_that_goes_on_after_its_answer_is_not_waited_for(client: httpx.Client) -> None:
    url = client.base_url
    with socket.create_connection((url.host, url.port)) as connection:
        connection.settimeout(20)
        connection.sendall(b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: text/plain\r\ncontent-length: 99\r\n\r\n")
        answer = b""
        while b"content-type must be" not in answer:
            answer += connection.recv(65536)
        connection.sendall(b"{")
        assert answer.startswith(b"HTTP/1.1 415") and connection.recv(1) == b""  # closed


def test_clients_that_leave_take_their_work_with_them(client: httpx.Client, embedder: Embedder) -> None:
    texts = [text * 15 for text in texts_of(60)]
    expected = embedder.encode(texts)

    async def all_of_them() -> list[httpx.Response | None]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60, limits=limits) as many:

            async def one(i: int) -> httpx.Response | None:
                post = many.post("/v1/embeddings", json=body(embedder.model_name, texts[i]))
                if i % 10 >= 3:
                    return await post
                try:
                    return await asyncio.wait_for(post, 0.03)
                except (asyncio.TimeoutError, httpx.HTTPError):
                    return None

            return await asyncio.gather(*map(one, range(60)))

    for i, answer in enumerate(asyncio.run(all_of_them())):
        if answer is not None:
            check(answer, expected[i][None])
    deadline = time.monotonic() + 10
    while "polyvec_queue_tokens 0.0" not in client.get("/metrics").text:
        assert time.monotonic() < deadline


def test_another_origin_may_call_only_where_it_is_named(client: httpx.Client, embedder: Embedder) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for origin, allowed in ((ORIGIN, ORIGIN), ("https://evil.org", None)):
        preflight = client.options("/v1/embeddings", headers={"origin": origin, **asked})
        assert preflight.headers.get("access-control-allow-origin") == allowed
        answer = client.post("/v1/embeddings", json=body("x", "a"), headers={"origin": origin})
        assert answer.status_code == 400 and answer.headers.get("access-control-allow-origin") == allowed
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("to_all", [False, True], ids=["to the server", "to its worker too, as some supervisors do"])
def test_sigterm_answers_all_that_is_in_flight(
    model_folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch, to_all: bool
) -> None:
    monkeypatch.setenv("FAULTY_PASS_SECONDS", "1.5")
    process, url = start("--model", model_folder, program=(FAULTY,))
    texts = [text * 4 for text in texts_of(64)]
    expected = embedder.encode(texts)
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        total = sum(e.num_tokens for e in embedder.encode_stream(texts))
        warm = client.get("/health")
        asked = pool.submit(ask_all, client, [body(embedder.model_name, text) for text in texts])
        seen: list[float] = []
        while not seen or max(seen) < total:  # all of them wait or run at one time: the first pass is not over
            line = next(x for x in client.get("/metrics").text.splitlines() if x.startswith("polyvec_queue_tokens "))
            seen.append(float(line.split()[1]))
            assert not asked.done(), (total, max(seen))
        if to_all:
            worker = worker_pid(process)
            assert worker is not None
            os.kill(worker, signal.SIGTERM)
        process.terminate()
        while (ready := client.get("/ready")).status_code == 200:
            pass
        late = client.post("/v1/embeddings", json=body(embedder.model_name, "late"))  # of who has not looked yet
        answers = asked.result()
    log = stop(process)
    assert warm.status_code == 200 and ready.json() == {"status": "draining"} and late.status_code == 200
    for answer, vector in zip(answers, expected, strict=True):
        check(answer, vector[None])
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in log and "restarted" not in log
