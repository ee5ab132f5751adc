"""``/api/embed``, ``/api/embeddings``, ``/api/tags``, ``/api/show``: Ollama's API.

Its clients know no tasks, but a model's name has a tag there: ``polyvec-mini:retrieval.query`` is a task of the model,
``polyvec-mini`` and ``polyvec-mini:latest`` are the base without one.
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from polyvec.model.layouts import weight_files
from polyvec.serving.answer import Json
from polyvec.serving.dialects.schema import Body, Flag, Integer, Number, Several
from polyvec.serving.errors import OllamaError, responses
from polyvec.serving.service import Service


class _Model(Body):
    model: str
    keep_alive: str | Number | None = None  # the model always stays loaded
    options: dict[str, Any] | None = None  # of text generation; clients send {}


class EmbedRequest(_Model):
    input: str | Several[str]
    truncate: Flag | None = None
    dimensions: Integer | None = None


class EmbedAnswer(BaseModel):
    model: str
    embeddings: list[list[float]]
    prompt_eval_count: int
    total_duration: int  # nanoseconds
    load_duration: int


class EmbeddingsRequest(_Model):
    """Of the older route, which takes one text."""

    prompt: str


class EmbeddingsAnswer(BaseModel):
    embedding: list[float]


class Details(BaseModel):
    format: str
    family: str
    families: list[str]
    quantization_level: str


class TaggedModel(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int  # bytes of the weights
    digest: str
    details: Details


class TagsAnswer(BaseModel):
    models: list[TaggedModel]


class ShowRequest(Body):
    model: str
    verbose: Flag | None = None


class ShowAnswer(BaseModel):
    modified_at: str
    template: str  # the prompt, before the text
    details: Details
    model_info: dict[str, str | int]
    capabilities: list[str]


def router(service: Service) -> APIRouter:
    routes = APIRouter(tags=["Ollama"], responses=responses(OllamaError))
    embedder = service.embedder
    tasks: dict[str, str | None] = {f"{embedder.model_name}:latest": None}
    tasks |= {f"{embedder.model_name}:{task}": task for task in embedder.tasks}
    files = [path.stat() for path in weight_files(embedder.folder)]
    modified = datetime.fromtimestamp(max(file.st_mtime for file in files), timezone.utc).isoformat()
    details = {
        "format": "safetensors", "family": "xlm-roberta", "families": ["xlm-roberta"],
        "quantization_level": embedder.engine.name,
    }  # fmt: skip

    def task_of(model: str) -> str | None:
        service.check_model(model, *tasks)
        return tasks.get(model)

    @routes.post("/api/embed", response_model=EmbedAnswer, responses=responses(OllamaError, body=True))
    async def embed(body: EmbedRequest) -> Json:
        started = time.monotonic_ns()
        task = task_of(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        result = await service.embed(texts, task=task, dimensions=body.dimensions, truncate=body.truncate is not False)
        return Json(
            {
                "model": body.model,
                "embeddings": result.vectors,
                "prompt_eval_count": result.num_tokens,
                "total_duration": time.monotonic_ns() - started,
                "load_duration": 0,
            }
        )

    @routes.post("/api/embeddings", response_model=EmbeddingsAnswer, responses=responses(OllamaError, body=True))
    async def embeddings(body: EmbeddingsRequest) -> Json:
        result = await service.embed([body.prompt], task=task_of(body.model), dimensions=None, truncate=True)
        return Json({"embedding": result.vectors[0]})

    @routes.get("/api/tags", response_model=TagsAnswer)
    def tags() -> Any:  # in a thread: the first to ask waits for the hash of all weights, and nobody else
        shared = {
            "modified_at": modified, "size": sum(file.st_size for file in files), "digest": embedder.weights_hash,
            "details": details,
        }  # fmt: skip
        return {"models": [{"name": name, "model": name, **shared} for name in tasks]}

    @routes.post("/api/show", response_model=ShowAnswer, responses=responses(OllamaError, body=True))
    async def show(body: ShowRequest) -> Json:
        task = task_of(body.model)
        facts = {
            "general.architecture": "xlm-roberta", "xlm-roberta.context_length": embedder.max_tokens,
            "xlm-roberta.embedding_length": embedder.config.hidden_size,
            "xlm-roberta.block_count": embedder.config.num_hidden_layers,
        }  # fmt: skip
        prompt = embedder.config.prompts[task] if task else ""
        shown = {"modified_at": modified, "template": prompt, "details": details, "model_info": facts}
        return Json({**shown, "capabilities": ["embedding"]})

    return routes
