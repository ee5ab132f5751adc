"""The application on the tiny model, inside the test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from polyvec import Embedder
from polyvec.serving.app import make_app
from polyvec.serving.service import Service


@pytest.fixture(scope="module")
def client(embedder: Embedder) -> Iterator[TestClient]:
    with TestClient(make_app(Service(embedder, queue_tokens=50_000), max_body_bytes=1_000_000)) as client:
        yield client
