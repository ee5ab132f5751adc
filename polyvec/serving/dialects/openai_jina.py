"""``/v1/embeddings``, ``/v1/models`` and its one model: OpenAI's API with the fields that Jina's adds."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import BaseModel

from polyvec.errors import InputError
from polyvec.serving.answer import Json
from polyvec.serving.dialects.schema import Body, Flag, Integer, Several, TokenIds
from polyvec.serving.errors import OpenAIError, responses
from polyvec.serving.service import Input, Service

EmbeddingType = Literal["float", "base64", "binary", "ubinary", "int8"]
Vector = list[float] | str  # base64 is of little-endian float32


class TextInput(Body):
    text: str


class EmbeddingsRequest(Body):
    model: str
    input: str | TextInput | Several[str] | Several[TextInput] | TokenIds | Several[TokenIds]
    dimensions: Integer | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    task: str | None = None
    late_chunking: Flag | None = None
    embedding_type: EmbeddingType | Several[EmbeddingType] | None = None
    normalized: Flag | None = None
    truncate: Flag | None = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: Vector | dict[EmbeddingType, Vector]  # by name where embedding_type is a list


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class ModelFacts(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsAnswer(BaseModel):
    object: Literal["list"]
    data: list[ModelFacts]


def inputs_of(given: Any) -> list[Input]:
    """Return what was sent as a list of texts and token rows."""
    if not isinstance(given, list) or (given and isinstance(given[0], int)):
        given = [given]
    return [item if isinstance(item, (str, list)) else item.text for item in given]


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["OpenAI and Jina"], responses=responses(OpenAIError))

    @routes.post("/v1/embeddings", response_model=EmbeddingsAnswer, responses=responses(OpenAIError, body=True))
    async def embeddings(body: EmbeddingsRequest) -> Json:
        service.check_model(body.model)
        if body.encoding_format is not None and body.embedding_type is not None:
            raise InputError("encoding_format must not be set beside embedding_type, got both; keep one")
        if body.embedding_type == []:
            raise InputError("embedding_type must name a type, got an empty list; leave it out for float")
        asked = body.embedding_type or body.encoding_format or "float"
        result = await service.embed(
            inputs_of(body.input),
            task=body.task,
            dimensions=body.dimensions,
            truncate=bool(body.truncate),
            normalized=body.normalized is not False,
            late_chunking=bool(body.late_chunking),
        )
        kinds = dict.fromkeys(asked) if isinstance(asked, list) else [asked]
        columns: dict[str, Sequence[Any]] = {kind: _column(service, result.vectors, kind) for kind in kinds}
        usage = {"prompt_tokens": result.num_tokens, "total_tokens": result.num_tokens}
        data = [
            {"object": "embedding", "index": i, "embedding": _cell(columns, asked, i)}
            for i in range(len(result.vectors))
        ]
        return Json({"object": "list", "model": body.model, "data": data, "usage": usage})

    facts = {"id": service.embedder.model_name, "object": "model", "created": 0, "owned_by": "polyvec"}

    @routes.get("/v1/models", response_model=ModelsAnswer)
    async def models() -> Json:
        return Json({"object": "list", "data": [facts]})

    # Not in the documentation, which clients follow to the letter: a folder's name makes a path with two slashes.
    @routes.get(f"/v1/models/{service.embedder.model_name}", include_in_schema=False)
    async def model() -> Json:
        return Json(facts)

    return routes


def base64_rows(vectors: NDArray[np.float32]) -> list[str]:
    """Return each row (M,) as base64 of little-endian float32, as the openai package decodes it."""
    return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]


def _column(service: Service, vectors: NDArray[np.float32], kind: str) -> Sequence[Any]:
    if kind == "base64":
        return base64_rows(vectors)
    return list(service.quantize(vectors, "float32" if kind == "float" else kind))


def _cell(columns: dict[str, Sequence[Any]], asked: str | list[Any], i: int) -> Any:
    return {kind: column[i] for kind, column in columns.items()} if isinstance(asked, list) else columns[asked][i]
