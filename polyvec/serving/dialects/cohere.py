"""``/v2/embed``: Cohere's API; its ``input_type`` is a task."""

from __future__ import annotations

import base64
import uuid
from typing import Any, Literal

from fastapi import APIRouter

from polyvec.errors import InputError
from polyvec.serving.dialects.schema import Body, Integer
from polyvec.serving.service import Service

TASKS = {
    "search_query": "retrieval.query",
    "search_document": "retrieval.passage",
    "classification": "classification",
    "clustering": "separation",
}
_TYPES = {"float": "float32", "int8": "int8", "binary": "binary", "ubinary": "ubinary"}


class EmbedRequest(Body):
    model: str
    input_type: Literal["search_query", "search_document", "classification", "clustering"]
    texts: list[str]
    output_dimension: Integer | None = None
    embedding_types: list[Literal["float", "int8", "binary", "ubinary", "base64"]] | None = None
    truncate: Literal["NONE", "END"] = "END"


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Cohere"])

    @routes.post("/v2/embed")
    async def embed(body: EmbedRequest) -> dict[str, Any]:
        service.check_model(body.model)
        kinds = ["float"] if body.embedding_types is None else body.embedding_types
        if not kinds:
            raise InputError("embedding_types must name a type, got an empty list; leave it out for float")
        result = await service.embed(
            body.texts, task=TASKS[body.input_type], dimensions=body.output_dimension, truncate=body.truncate == "END"
        )
        embeddings: dict[str, Any] = {
            kind: service.quantize(result.vectors, _TYPES[kind]).tolist() for kind in kinds if kind != "base64"
        }
        if "base64" in kinds:
            embeddings["base64"] = [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in result.vectors]
        meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": result.num_tokens}}
        return {
            "id": uuid.uuid4().hex, "response_type": "embeddings_by_type",
            "embeddings": embeddings, "meta": meta,
        }  # fmt: skip

    return routes
