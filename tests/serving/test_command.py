"""What ``polyvec serve`` refuses before it serves, and what it does when clients leave."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from polyvec import Embedder
from polyvec.serving.app import make_app
from polyvec.serving.guard import Guard
from polyvec.serving.service import Service


def refused(*arguments: object, before: str = "") -> str:
    code = f"{before}\nfrom polyvec.cli import app; app()"
    command = [sys.executable, "-W", "error", "-c", code, "serve", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    return result.stderr


def test_bad_settings_are_one_sentence(tmp_path: Path, model_folder: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n")
    model = ("--model", model_folder, "--engine", "onnx")
    assert "api-keys must hold a key, got none" in refused(*model, "--api-keys", empty)
    assert "api-keys must be a readable file" in refused(*model, "--api-keys", tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "must be free to bind" in refused(*model, "--port", taken.getsockname()[1])
    missing = refused(*model, before="import sys; sys.modules['uvicorn'] = None")
    assert "pip install 'polyvec[serve]'" in missing
    no_tracing = (
        "import os, sys; os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'x'; sys.modules['opentelemetry.exporter'] = None"
    )
    assert "pip install 'polyvec[otel]'" in refused(
        *model, "--port", 0, before=no_tracing
    )  # told when the worker is up already


SCOPE = {
    "type": "http", "method": "POST", "path": "/embed", "raw_path": b"/embed", "query_string": b"",
    "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
}  # fmt: skip
BODY = {"type": "http.request", "body": b'{"inputs": "a"}', "more_body": False}


@pytest.fixture
def hanging(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> tuple[Guard, list[bool]]:
    """An application whose answers take half a minute, and the ends of those that were not waited for."""
    service = Service(embedder, queue_tokens=1000)
    cancelled: list[bool] = []

    async def hang(*_: object, **__: object) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    monkeypatch.setattr(service, "embed", hang)
    return make_app(service), cancelled


def test_a_client_that_leaves_is_not_computed_for(hanging: tuple[Guard, list[bool]]) -> None:
    app, cancelled = hanging
    messages = [BODY, {"type": "http.disconnect"}]

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0.01)
        return messages.pop(0)

    async def send(_: object) -> None:
        raise AssertionError("nobody is there to be answered")

    asyncio.run(app(dict(SCOPE), receive, send))  # type: ignore[arg-type]
    assert cancelled == [True]


def test_what_takes_longer_than_the_stop_is_told_so(hanging: tuple[Guard, list[bool]]) -> None:
    """uvicorn cancels what is left, and would say 500 itself."""
    app, cancelled = hanging
    messages, sent = [BODY], list[Any]()

    async def receive() -> dict[str, object]:
        return messages.pop() if messages else await asyncio.sleep(30, {})

    async def send(message: object) -> None:
        sent.append(message)

    async def stop() -> None:
        answering = asyncio.create_task(app(dict(SCOPE), receive, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        answering.cancel()
        await answering

    asyncio.run(stop())
    start, content = sent
    assert start["status"] == 503 and (b"retry-after", b"1") in start["headers"] and cancelled == [True]
    assert json.loads(content["body"])["error_type"] == "Unhealthy"


def test_a_fault_of_ours_tells_nothing(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(embedder, queue_tokens=1000)

    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret text")

    with TestClient(make_app(service)) as client:
        monkeypatch.setattr(service.scheduler, "submit", fail)
        response = client.post("/embed", json={"inputs": "secret text"})
        health = client.get("/health")
        for answer in (response, health):
            assert answer.status_code == 500 and "secret" not in answer.text and answer.headers["x-request-id"]
        assert health.json()["error"]["code"] == "internal_error"


def test_health_is_a_pass_of_the_model_whatever_the_cache_holds(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(embedder, queue_tokens=1000, cache_rows=10)

    def fail(*_: object) -> None:
        raise RuntimeError("secret text")

    with TestClient(make_app(service)) as client:
        asked = {"inputs": "health"}
        before = client.post("/embed", json=asked).json()
        assert client.get("/health").status_code == 200
        monkeypatch.setattr(embedder.engine, "pool", fail)
        assert client.post("/embed", json=asked).json() == before  # of the cache
        assert client.get("/health").status_code == 500


def test_the_page_asks_no_one_else(embedder: Embedder) -> None:
    with TestClient(make_app(Service(embedder, queue_tokens=1000))) as client:
        page = client.get("/").text
    assert "<main>" in page and "http" not in page.replace("http-equiv", "")
