"""The ASGI application: dialects, health, metrics, the page, and errors in each dialect's form."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.routing import Route

from polyvec import __version__
from polyvec.errors import PolyvecError
from polyvec.serving.bodies import Post, posts_of
from polyvec.serving.dialects import cohere, ollama, openai_jina, tei
from polyvec.serving.errors import OpenAIError, Problem, envelope, problem_of, responses, server_fault
from polyvec.serving.guard import OPEN_PATHS, PRIORITY_HEADER, TIMEOUT_HEADER, Guard
from polyvec.serving.keys import Keys
from polyvec.serving.service import Service

_PAGE = Path(__file__).parent / "page" / "index.html"


class Health(BaseModel):
    status: Literal["ok"]


class Readiness(BaseModel):
    status: Literal["ready", "draining", "restarting"]


def make_app(service: Service, *, keys: Keys | None = None, max_body_bytes: int = 8_000_000) -> Guard:
    """Return the application that answers from ``service``. Without ``keys`` everyone is answered."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    # The usual pages of documentation load scripts from elsewhere; this server makes no one do that.
    app = FastAPI(title="polyvec", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    posts: dict[str, Post] = {}
    dialects = [dialect.router(service) for dialect in (openai_jina, cohere, tei, ollama)]
    for routes in dialects:
        app.include_router(routes)
        posts |= posts_of(routes)

    @app.get("/health", tags=["operation"], responses=responses(OpenAIError, body=True))
    async def health() -> Health:
        """A text went through the model just now."""
        await service.check()
        return Health(status="ok")

    @app.get(
        "/ready",
        tags=["operation"],
        response_model=Readiness,
        responses={400: {"model": OpenAIError}, 503: {"model": Readiness}},
    )
    async def ready() -> JSONResponse:
        """New requests are taken, and a worker is there to compute them."""
        status = (
            "ready" if service.ready else "draining" if service.leaving or service.scheduler.draining else "restarting"
        )
        return JSONResponse({"status": status}, 200 if service.ready else 503)

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse, responses=responses(OpenAIError))
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_PAGE)

    def answer(request: Request, problem: Problem) -> JSONResponse:
        return envelope(request.url.path, request.state.request_id, problem)

    async def ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, PolyvecError)
        return answer(request, problem_of(error))

    async def fault(request: Request, _: Exception) -> JSONResponse:
        return answer(request, server_fault())  # the guard, which meets the error too, logs it

    app.add_exception_handler(PolyvecError, ours)
    app.add_exception_handler(Exception, fault)
    _complete(app.openapi(), with_keys=keys is not None)
    methods: dict[str, set[str]] = {}  # no path has a part that varies, which the guard would not know
    for route in [*app.routes, *(route for dialect in dialects for route in dialect.routes)]:
        if isinstance(route, Route):
            own = route.methods or set()
            methods.setdefault(route.path, set()).update(own, {"HEAD"} if "GET" in own else ())
    return Guard(
        app,
        posts=posts,
        methods=methods,
        keys=keys,
        max_body_bytes=max_body_bytes,
        metrics=service.metrics,
        tracing=service.tracing,
    )


def _complete(schema: dict[str, Any], *, with_keys: bool) -> None:
    """Add what the guard reads to the documentation, and take out FastAPI's own answer to bad bodies, never given."""
    headers = [
        {
            "name": PRIORITY_HEADER, "in": "header", "schema": {"enum": ["interactive", "bulk"]},
            "description": "bulk gets what interactive work leaves and a little beside it",
        },
        {
            "name": TIMEOUT_HEADER, "in": "header",
            "schema": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e6},
            "description": "seconds within which the answer is needed; later it is 504",
        },
    ]  # fmt: skip
    for path in schema["paths"].values():
        for operation in path.values():
            answers = operation["responses"]
            if "HTTPValidationError" in str(answers.get("422")):
                del answers["422"]
            for status, answer in answers.items():  # an error is JSON, whatever the route's result
                if status >= "400" and "text/plain" in answer.get("content", {}):
                    answer["content"]["application/json"] = answer["content"].pop("text/plain")
            if "post" in path:
                operation["parameters"] = headers
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if with_keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        for path in OPEN_PATHS & schema["paths"].keys():
            schema["paths"][path]["get"]["security"] = []
