"""``/api/embed``: Ollama's API, of the base model without a task, for its clients know none."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from polyvec.serving.answer import Json
from polyvec.serving.dialects.schema import Body, Flag, Integer, Number, Several
from polyvec.serving.errors import OllamaError, responses
from polyvec.serving.service import Service


class EmbedRequest(Body):
    model: str
    input: str | Several[str]
    truncate: Flag | None = None
    dimensions: Integer | None = None
    keep_alive: str | Number | None = None  # the model always stays loaded
    options: dict[str, Any] | None = None  # of text generation; clients send {}


class EmbedAnswer(BaseModel):
    model: str
    embeddings: list[list[float]]
    prompt_eval_count: int
    total_duration: int  # nanoseconds
    load_duration: int


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Ollama"], responses=responses(OllamaError))

    @routes.post("/api/embed", response_model=EmbedAnswer, responses=responses(OllamaError, body=True))
    async def embed(body: EmbedRequest) -> Json:
        started = time.monotonic_ns()
        service.check_model(body.model, f"{service.embedder.model_name}:latest")
        texts = [body.input] if isinstance(body.input, str) else body.input
        result = await service.embed(texts, task=None, dimensions=body.dimensions, truncate=body.truncate is not False)
        return Json(
            {
                "model": body.model,
                "embeddings": result.vectors,
                "prompt_eval_count": result.num_tokens,
                "total_duration": time.monotonic_ns() - started,
                "load_duration": 0,
            }
        )

    return routes
