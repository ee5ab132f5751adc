"""Anything at all gets a valid answer in the dialect's shape, no error repeats the input, and the next one is answered.

``POLYVEC_FUZZ=750 pytest -s tests/serving/test_fuzz.py`` makes that many requests of each kind to each route with a
body, ten thousand and some, and a plain one after each.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi import checks as openapi_checks

import polyvec
from polyvec import Embedder
from polyvec.serving.errors import CohereError, OllamaError, OpenAIError, TeiError
from polyvec.serving.guard import TIMEOUT_HEADER
from tests.serving.process import start, stop

EXAMPLES = int(os.environ.get("POLYVEC_FUZZ", "10"))
PATHS = {
    "/v1/embeddings": OpenAIError,
    "/v2/embed": CohereError,
    "/embed": TeiError,
    "/embed_all": TeiError,
    "/similarity": TeiError,
    "/tokenize": TeiError,
    "/api/embed": OllamaError,
    "/api/embeddings": OllamaError,
    "/api/show": OllamaError,
}
FIELDS = ["model", "input", "inputs", "texts", "task", "dimensions", "input_type", "truncate", "late_chunking"]
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of an example, not of an answer
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["clustering"])
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3))
bodies = st.dictionaries(st.sampled_from(FIELDS), values).map(lambda body: json.dumps(body).encode())


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    process, url = start("--model", model_folder)
    yield url
    log = stop(process)
    assert "Traceback" not in log and "failed with" not in log


@pytest.fixture(scope="module")
def live(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def documented(live: httpx.Client) -> str:
    """What an error may say: names of the documentation, words of the source, which hypothesis draws from too."""
    source = Path(polyvec.__file__).parent.rglob("*.py")
    return "".join([live.get("/openapi.json").text, *(path.read_text(encoding="utf-8") for path in source)])


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_of(inner)


def check_error(answer: str, sent: Any, documented: str) -> None:
    assert len(answer) < 1000 and "Traceback" not in answer and "site-packages" not in answer
    echoed = [text for text in strings_of(sent) if len(text) >= 8 and text not in documented and text in answer]
    assert not echoed


@pytest.fixture(scope="module", autouse=True)
def counted(live: httpx.Client) -> Iterator[None]:
    """Say how many requests the server has counted: of both kinds to each route, and a plain one after each."""
    yield
    lines = re.findall(r"^polyvec_requests_total\{.*\} (\S+)$", live.get("/metrics").text, re.M)
    number = int(sum(map(float, lines)))
    print(f"{number} requests, half of them generated")
    assert number >= 4 * EXAMPLES * len(PATHS)


def check_alive(client: httpx.Client, name: str) -> None:
    assert client.post("/v1/embeddings", json={"model": name, "input": "a"}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@FUZZ
@given(body=st.binary(max_size=50) | bodies)
def test_any_bytes_get_a_valid_answer(
    live: httpx.Client, embedder: Embedder, documented: str, path: str, body: bytes
) -> None:
    response = live.post(path, content=body, headers={"content-type": "application/json"})
    if response.status_code != 200:
        assert 400 <= response.status_code < 500
        PATHS[path].model_validate_json(response.text)
        try:
            sent = json.loads(body)
        except ValueError:
            sent = None
        check_error(response.text, sent, documented)
    check_alive(live, embedder.model_name)


#: What the schema cannot say (a task's name, a width of this model) is refused too, so a valid body may be.
CHECKS = [
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
]


@pytest.fixture(scope="module")
def schema(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_route_answers_as_documented(
    schema: Any, live: httpx.Client, embedder: Embedder, documented: str
) -> None:
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) >= 12
    for operation in operations:

        @FUZZ
        @given(case=operation.as_strategy() | operation.as_strategy(schemathesis.GenerationMode.NEGATIVE))
        def run(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(
                case.body.get("model"), str
            ):  # another type is the fault sent
                case.body["model"] = embedder.model_name
            response = case.call()
            case.validate_response(response, checks=CHECKS)
            # A caller may ask for an answer sooner than there can be one.
            assert response.status_code < 500 or (response.status_code == 504 and TIMEOUT_HEADER in case.headers)
            if response.status_code >= 400:
                check_error(response.text, case.body, documented)
            check_alive(live, embedder.model_name)

        run()
