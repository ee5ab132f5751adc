"""From the bytes of a body to a route's answer: JSON read and checked in one step.

FastAPI documents the routes and calls those without a body.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar, get_type_hints

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from polyvec.serving.errors import Problem, invalid

#: Answers a body.
Post: TypeAlias = Callable[[bytes], Awaitable[Response]]
Model = TypeVar("Model", bound=BaseModel)


def posts_of(routes: APIRouter) -> dict[str, Post]:
    """Return the POST routes by path. Each takes its body as ``body``."""
    found = [route for route in routes.routes if isinstance(route, APIRoute) and "POST" in (route.methods or ())]
    return {route.path: _post(route.endpoint) for route in found}


def _post(endpoint: Callable[..., Awaitable[Response]]) -> Post:
    model: type[BaseModel] = get_type_hints(endpoint)["body"]

    async def post(content: bytes) -> Response:
        return await endpoint(read(model, content))

    return post


def read(model: type[Model], content: bytes) -> Model:
    """Return the body as ``model``. Raises ``Problem`` with the first fault."""
    try:
        return model.model_validate_json(content)
    except ValidationError:
        pass  # pydantic's own reader takes no lone surrogate, which is text here; Python's does, and has the last word
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError):
        raise Problem(
            400, "the body must be JSON with numbers of ordinary size, got something else; check quotes and commas"
        ) from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False, include_input=False)) from None
