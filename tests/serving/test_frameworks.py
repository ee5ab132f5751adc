"""The frameworks' OpenAI components against a running server; a field beside theirs says the task."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polyvec import Embedder
from tests.serving.process import start, stop

TEXTS = ["The train is late.", "Wo ist der Bahnhof?", "a"]
QUERY = {"extra_body": {"task": "retrieval.query"}}
pytestmark = pytest.mark.filterwarnings("default")  # other packages' deprecations are not ours to raise


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[str]:
    process, url = start("--model", model_folder)
    yield f"{url}/v1"
    log = stop(process)
    assert "Traceback" not in log


@pytest.fixture(autouse=True)
def leave_no_client_behind() -> Iterator[None]:
    """The frameworks never close their clients; here that is a warning, in a later test it would be an error."""
    yield
    gc.collect()


def test_langchain(server: str, embedder: Embedder) -> None:
    from langchain_openai import OpenAIEmbeddings

    # It would count tokens with OpenAI's tokenizer, which it downloads.
    options = {"base_url": server, "api_key": "none", "check_embedding_ctx_length": False, "dimensions": 16}
    base = OpenAIEmbeddings(model=embedder.model_name, **options)
    query = OpenAIEmbeddings(model=embedder.model_name, model_kwargs=QUERY, **options)
    np.testing.assert_allclose(base.embed_documents(TEXTS), embedder.encode(TEXTS, dimensions=16), atol=1e-6)
    expected = embedder.encode(TEXTS[0], task="retrieval.query", dimensions=16)
    np.testing.assert_allclose(query.embed_query(TEXTS[0]), expected, atol=1e-6)


def test_llama_index(server: str, embedder: Embedder) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    model = OpenAILikeEmbedding(
        model_name=embedder.model_name, api_base=server, api_key="none", additional_kwargs=QUERY
    )
    expected = embedder.encode(TEXTS, task="retrieval.query")
    np.testing.assert_allclose(model.get_text_embedding_batch(TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(model.get_query_embedding(TEXTS[1]), expected[1], atol=1e-6)


def test_haystack(server: str, embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    options = {"api_key": Secret.from_token("none"), "api_base_url": server, "model": embedder.model_name}
    documents = OpenAIDocumentEmbedder(**options).run([Document(content=text) for text in TEXTS])["documents"]
    np.testing.assert_allclose([d.embedding for d in documents], embedder.encode(TEXTS), atol=1e-6)
    text = OpenAITextEmbedder(**options, dimensions=16).run(TEXTS[0])
    np.testing.assert_allclose(text["embedding"], embedder.encode(TEXTS[0], dimensions=16), atol=1e-6)
