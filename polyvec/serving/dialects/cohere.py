"""``/v2/embed``: Cohere's API; its ``input_type`` is a task."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel

from polyvec.errors import InputError
from polyvec.serving.answer import Json
from polyvec.serving.dialects.openai_jina import base64_rows
from polyvec.serving.dialects.schema import Body, Integer, Several
from polyvec.serving.errors import CohereError, responses
from polyvec.serving.service import Service

TASKS = {
    "search_query": "retrieval.query",
    "search_document": "retrieval.passage",
    "classification": "classification",
    "clustering": "separation",
}
EmbeddingType = Literal["float", "int8", "binary", "ubinary", "base64"]


class EmbedRequest(Body):
    model: str
    input_type: Literal["search_query", "search_document", "classification", "clustering"]
    texts: Several[str]
    output_dimension: Integer | None = None
    embedding_types: Several[EmbeddingType] | None = None
    truncate: Literal["NONE", "END"] | None = None  # texts are cut at their end if left out
    # What a client may say nothing of in so many words: the model reads texts, and all have one price and turn.
    images: None = None
    inputs: None = None
    max_tokens: None = None
    priority: None = None


class BilledUnits(BaseModel):
    input_tokens: int


class ApiVersion(BaseModel):
    version: str


class Meta(BaseModel):
    api_version: ApiVersion
    billed_units: BilledUnits


class EmbedAnswer(BaseModel):
    id: str
    response_type: Literal["embeddings_by_type"]
    embeddings: dict[EmbeddingType, list[list[float]] | list[str]]
    meta: Meta


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Cohere"], responses=responses(CohereError))

    @routes.post("/v2/embed", response_model=EmbedAnswer, responses=responses(CohereError, body=True))
    async def embed(body: EmbedRequest) -> Json:
        service.check_model(body.model)
        kinds = ["float"] if body.embedding_types is None else body.embedding_types
        if not kinds:
            raise InputError("embedding_types must name a type, got an empty list; leave it out for float")
        result = await service.embed(
            body.texts, task=TASKS[body.input_type], dimensions=body.output_dimension, truncate=body.truncate != "NONE"
        )
        embeddings: dict[str, Any] = {
            kind: base64_rows(result.vectors)
            if kind == "base64"
            else service.quantize(result.vectors, "float32" if kind == "float" else kind)
            for kind in dict.fromkeys(kinds)
        }
        meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": result.num_tokens}}
        return Json(
            {"id": uuid.uuid4().hex, "response_type": "embeddings_by_type", "embeddings": embeddings, "meta": meta}
        )

    return routes
