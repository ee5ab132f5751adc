"""Spans reach a collector of OpenTelemetry's protocol, and hold no text."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from polyvec.serving.tracing import Tracing
from tests.serving.process import start, stop

TRACE = "0af7651916cd43dd8448eb211c80319c"
SECRET = "a sentence that nobody else may read"


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_is_followed_to_the_batch_that_computed_it(received: list[bytes]) -> None:
    process, address = start()
    try:
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        body = {"model": "polyvec-mini", "input": [SECRET, "another"], "task": "separation"}
        assert httpx.post(f"{address}/v1/embeddings", json=body, headers=headers).status_code == 200
        assert httpx.post(f"{address}/v1/embeddings", json={**body, "model": "x"}).status_code == 400
    finally:
        stop(process)
    requests = [ExportTraceServiceRequest.FromString(data) for data in received]
    resources = [one for request in requests for one in request.resource_spans]
    attributes = {a.key: a.value.string_value for one in resources for a in one.resource.attributes}
    assert attributes["service.name"] == "polyvec"
    spans = [span for one in resources for scope in one.scope_spans for span in scope.spans]
    (own,) = [s for s in spans if s.trace_id.hex() == TRACE and s.name == "POST /v1/embeddings"]
    assert {a.key: a.value.int_value for a in own.attributes}["http.response.status_code"] == 200
    children = {s.name: s for s in spans if s.parent_span_id == own.span_id}
    assert children.keys() == {"tokenise", "vectors"}
    (batch,) = [s for s in spans if s.name == "batch" and any(link.trace_id.hex() == TRACE for link in s.links)]
    assert batch.trace_id.hex() != TRACE and {link.span_id for link in batch.links} == {children["vectors"].span_id}
    assert {a.key: a.value.int_value for a in batch.attributes}["rows"] == 2
    refused = [s for s in spans if s.name == "POST /v1/embeddings" and s.trace_id.hex() != TRACE]
    assert [{a.key: a.value.int_value for a in s.attributes}["http.response.status_code"] for s in refused] == [400]
    assert not any(b"sentence" in data for data in received)


def test_a_collector_that_does_not_answer_keeps_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its time-out of ten seconds comes on top of those for requests, and supervisors kill what stops too late."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        process, address = start()
        assert httpx.get(f"{address}/ready").status_code == 200
        began = time.monotonic()
        said = stop(process)
        assert time.monotonic() - began < 8
    assert "the collector must take the last spans within 2 s, got no answer; they are lost" in said


def test_without_an_endpoint_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    tracing = Tracing()
    with tracing.request("GET", {}) as span, tracing.span("tokenise"):
        assert span == {} and tracing.link() is None
    tracing.close()


def test_what_fails_says_so_without_its_message(received: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "polyvec")  # which it would set itself, and leave
    tracing = Tracing()
    with pytest.raises(ValueError, match=SECRET), tracing.span("tokenise"):
        raise ValueError(SECRET)
    with pytest.raises(ValueError, match=SECRET), tracing.batch([], rows=1):
        raise ValueError(SECRET)
    tracing.close()
    requests = [ExportTraceServiceRequest.FromString(data) for data in received]
    spans = [
        s for request in requests for one in request.resource_spans for scope in one.scope_spans for s in scope.spans
    ]
    assert [(span.name, span.status.code, span.status.message) for span in spans] == [
        ("tokenise", Status.STATUS_CODE_ERROR, ""),
        ("batch", Status.STATUS_CODE_ERROR, ""),
    ]
    assert not any(b"sentence" in data for data in received)
