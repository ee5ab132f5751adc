"""``/v1/embeddings`` and ``/v1/models``: OpenAI's API with the fields that Jina's adds."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray

from polyvec.errors import InputError
from polyvec.serving.dialects.schema import Body, Flag, Integer, TokenIds
from polyvec.serving.service import Input, Service

EmbeddingType = Literal["float", "base64", "binary", "ubinary", "int8"]


class TextInput(Body):
    text: str


class EmbeddingsRequest(Body):
    model: str
    input: str | TextInput | list[str] | list[TextInput] | TokenIds | list[TokenIds]
    dimensions: Integer | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    task: str | None = None
    late_chunking: Flag | None = None
    embedding_type: EmbeddingType | list[EmbeddingType] | None = None
    normalized: Flag | None = None
    truncate: Flag | None = None


def inputs_of(given: Any) -> list[Input]:
    """Return what was sent as a list of texts and token rows."""
    if isinstance(given, (str, TextInput)) or (given and isinstance(given[0], int)):
        given = [given]
    return [item.text if isinstance(item, TextInput) else item for item in given]


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["OpenAI and Jina"])

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsRequest) -> dict[str, Any]:
        service.check_model(body.model)
        if body.encoding_format is not None and body.embedding_type is not None:
            raise InputError("encoding_format must not be set beside embedding_type, got both; keep one")
        asked = body.embedding_type or body.encoding_format or "float"
        result = await service.embed(
            inputs_of(body.input),
            task=body.task,
            dimensions=body.dimensions,
            truncate=bool(body.truncate),
            normalized=body.normalized is not False,
            late_chunking=bool(body.late_chunking),
        )
        kinds = asked if isinstance(asked, list) else [asked]
        columns: dict[str, list[Any]] = {kind: _column(service, result.vectors, kind) for kind in kinds}
        usage = {"prompt_tokens": result.num_tokens, "total_tokens": result.num_tokens}
        data = [
            {"object": "embedding", "index": i, "embedding": _cell(columns, asked, i)}
            for i in range(len(result.vectors))
        ]
        return {"object": "list", "model": body.model, "data": data, "usage": usage}

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        facts = {"id": service.embedder.model_name, "object": "model", "created": 0, "owned_by": "polyvec"}
        return {"object": "list", "data": [facts]}

    return routes


def _column(service: Service, vectors: NDArray[np.float32], kind: str) -> list[Any]:
    if kind == "base64":  # little-endian float32, as the openai package decodes it
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    values: list[Any] = service.quantize(vectors, "float32" if kind == "float" else kind).tolist()
    return values


def _cell(columns: dict[str, list[Any]], asked: str | list[Any], i: int) -> Any:
    return {kind: column[i] for kind, column in columns.items()} if isinstance(asked, list) else columns[asked][i]
