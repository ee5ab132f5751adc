"""Anything at all gets a short error in the dialect's shape, and the next request is answered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from polyvec import Embedder

PATHS = {
    "/v1/embeddings": "detail",
    "/v2/embed": "message",
    "/embed": "error",
    "/tokenize": "error",
    "/api/embed": "error",
}
FIELDS = ["model", "input", "inputs", "texts", "task", "dimensions", "input_type", "truncate", "late_chunking"]

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["clustering"])
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3))
bodies = st.dictionaries(st.sampled_from(FIELDS), values).map(lambda body: json.dumps(body).encode())


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=50) | bodies)
def test_anything_gets_a_valid_answer(client: TestClient, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    answer: Any = response.json()
    assert response.status_code == 200 or 400 <= response.status_code < 500
    if response.status_code != 200:
        assert PATHS[path] in answer and len(response.content) < 1000


def test_a_plain_request_after_them_succeeds(client: TestClient, embedder: Embedder) -> None:
    assert client.post("/v1/embeddings", json={"model": embedder.model_name, "input": "a"}).status_code == 200
