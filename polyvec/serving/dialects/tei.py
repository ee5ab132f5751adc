"""``/embed``, ``/embed_all``, ``/similarity``, ``/tokenize``, ``/info``: Text Embeddings Inference.

``prompt_name`` is the task: in this model a prompt has its adapter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from polyvec import __version__
from polyvec.serving.answer import Json
from polyvec.serving.dialects.openai_jina import inputs_of
from polyvec.serving.dialects.schema import Body, Flag, Integer, Several, TokenIds
from polyvec.serving.errors import TeiError, responses
from polyvec.serving.service import MAX_INPUTS, Service
from polyvec.text.tokenizer import Encoding

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


Direction = Literal["right", "Right"]  # texts are cut at their end alone


class EmbedRequest(Body):
    inputs: str | Several[str] | TokenIds | Several[TokenIds]
    normalize: Flag | None = None
    truncate: Flag | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None
    dimensions: Integer | None = None


class EmbedAllRequest(Body):
    inputs: str | Several[str] | TokenIds | Several[TokenIds]
    truncate: Flag | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class Sentences(Body):
    source_sentence: str
    sentences: Several[str]


class SimilarityParameters(Body):
    truncate: Flag | None = None
    truncation_direction: Direction | None = None
    prompt_name: str | None = None


class SimilarityRequest(Body):
    inputs: Sentences
    parameters: SimilarityParameters | None = None


class TokenizeRequest(Body):
    inputs: str | Several[str]
    add_special_tokens: Flag = True
    prompt_name: None = None  # the tokens of the text alone


class Token(BaseModel):
    id: int
    text: str
    special: bool
    start: int | None  # characters; none of <s> and </s>
    stop: int | None


class Pooling(BaseModel):
    pooling: str


class ModelType(BaseModel):
    embedding: Pooling


class InfoAnswer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: ModelType
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    version: str
    tasks: list[str]
    dimensions: list[int]


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Text Embeddings Inference"], responses=responses(TeiError))
    embedder = service.embedder

    @routes.post("/", include_in_schema=False)  # where the huggingface_hub client sends feature_extraction
    @routes.post("/embed", response_model=list[list[float]], responses=responses(TeiError, body=True))
    async def embed(body: EmbedRequest) -> Json:
        result = await service.embed(
            inputs_of(body.inputs),
            task=body.prompt_name,
            dimensions=body.dimensions,
            truncate=bool(body.truncate),
            normalized=body.normalize is not False,
        )
        return Json(result.vectors)

    @routes.post("/embed_all", response_model=list[list[list[float]]], responses=responses(TeiError, body=True))
    async def embed_all(body: EmbedAllRequest) -> Json:
        states = await service.token_states(inputs_of(body.inputs), task=body.prompt_name, truncate=bool(body.truncate))
        return Json(states)

    @routes.post("/similarity", response_model=list[float], responses=responses(TeiError, body=True))
    async def similarity(body: SimilarityRequest) -> Json:
        asked = body.parameters or SimilarityParameters()
        texts = [body.inputs.source_sentence, *body.inputs.sentences]
        task = asked.prompt_name or "text-matching"
        vectors = (await service.embed(texts, task=task, truncate=bool(asked.truncate))).vectors
        return Json(vectors[1:] @ vectors[0])

    @routes.post("/tokenize", response_model=list[list[Token]], responses=responses(TeiError, body=True))
    async def tokenize(body: TokenizeRequest) -> Json:
        given = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        texts = [_LONE_SURROGATE.sub("\ufffd", text) for text in given]  # as the tokenizer reads them; JSON has none

        def described(encodings: Sequence[Encoding]) -> list[list[dict[str, Any]]]:
            rows = [_tokens_of(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
            return rows if body.add_special_tokens else [row[1:-1] for row in rows]

        return Json(await service.describe(texts, described))

    @routes.get("/info", response_model=InfoAnswer)
    def info() -> Any:  # in a thread: the first to ask waits for the hash of all weights, and nobody else
        return {
            "model_id": embedder.model_name, "model_sha": embedder.weights_hash, "model_dtype": embedder.engine.name,
            "model_type": {"embedding": {"pooling": "mean"}}, "max_input_length": embedder.max_tokens,
            "max_batch_tokens": embedder.engine.batch_tokens, "max_client_batch_size": MAX_INPUTS,
            "auto_truncate": False, "version": __version__, "tasks": list(embedder.tasks),
            "dimensions": list(embedder.dimensions),
        }  # fmt: skip

    return routes


def _tokens_of(text: str, encoding: Encoding) -> list[dict[str, Any]]:
    """Return each token as ``Token`` has it."""
    last = len(encoding) - 1
    return [
        {
            "id": int(token), "text": text[start:stop] if 0 < i < last else ("<s>" if i == 0 else "</s>"),
            "special": i in (0, last), "start": int(start) if 0 < i < last else None,
            "stop": int(stop) if 0 < i < last else None,
        }
        for i, (token, (start, stop)) in enumerate(zip(encoding.input_ids, encoding.offsets, strict=True))
    ]  # fmt: skip
