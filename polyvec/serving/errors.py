"""Errors as answers: one sentence, a status, and the envelope of the dialect that was spoken.

No answer repeats input or tells of the inside: sentences name fields, rules and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from polyvec.errors import InputError, PolyvecError
from polyvec.serving.keys import RateLimitError
from polyvec.serving.scheduler import DeadlineError, DrainingError, OverloadedError

_TEI_PATHS = ("/", "/embed", "/embed_all", "/similarity", "/tokenize", "/info")
_TEI_TYPES = {429: "Overloaded", 500: "Backend", 503: "Unhealthy", 504: "Backend"}  # the rest is the caller's
_CODES = {
    400: "invalid_request", 401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "timeout",
    413: "request_too_large", 415: "unsupported_media_type", 422: "invalid_request", 429: "rate_limit_exceeded",
    500: "internal_error", 503: "service_unavailable", 504: "deadline_exceeded",
}  # fmt: skip


#: Status to what it means, of every route and of those that take a body besides.
_ANYWHERE = {
    400: "The request does not follow the rules that the sentence names",
    401: "No API key of this server",
    429: "A limit of the key is used up, or the queue is full; see Retry-After",
    500: "A fault of the server or of the model on this input",
}
_OF_BODIES = {
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The content type is not JSON",
    503: "The server is stopping; see Retry-After",
    504: "Not computed in time",
}


class TeiError(BaseModel):
    error: str
    error_type: str


class CohereError(BaseModel):
    message: str
    id: str


class OllamaError(BaseModel):
    error: str


class OpenAIErrorFacts(BaseModel):
    message: str
    type: str
    param: None
    code: str


class OpenAIError(BaseModel):
    """OpenAI's ``error`` and Jina's ``detail``, for clients of the same path."""

    error: OpenAIErrorFacts
    detail: str
    code: str
    request_id: str


def responses(model: type[BaseModel], *, body: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return what a route's documentation says of errors in the form of ``model``."""
    meanings = _ANYWHERE | (_OF_BODIES if body else {})
    if model is TeiError:
        meanings[422] = meanings.pop(400)
    return {status: {"model": model, "description": meaning} for status, meaning in sorted(meanings.items())}


class Problem(Exception):
    """An answer that is not a result."""

    def __init__(
        self, status: int, message: str, *, retry_after: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, retry_after))


def problem_of(error: PolyvecError) -> Problem:
    """Return the status of an error of ours, with its own sentence."""
    if isinstance(error, (OverloadedError, RateLimitError)):
        return Problem(429, str(error), retry_after=error.retry_after)
    if isinstance(error, DrainingError):
        return Problem(503, str(error), retry_after=1)
    if isinstance(error, DeadlineError):
        return Problem(504, str(error))
    return Problem(400 if isinstance(error, InputError) else 500, str(error))


def server_fault() -> Problem:
    return Problem(500, "the server must answer every request, got a fault of its own; retry once")


def cut_short() -> Problem:
    return Problem(
        503,
        "the server must finish a request before it stops, got no time for this one; retry elsewhere",
        retry_after=1,
    )


def invalid(errors: Sequence[Any]) -> Problem:
    """Return the first fault that pydantic found as a sentence without the input."""
    first = errors[0]
    if first["type"] == "extra_forbidden":  # its name is input too
        return Problem(400, "the body must hold fields of the API alone, got no such field; see /openapi.json")
    field = str(first["loc"][0]) if first["loc"] else "the body"
    # Of an object pydantic would tell the name that its class has here.
    said = "input should be an object" if first["type"] == "model_type" else first["msg"][0].lower() + first["msg"][1:]
    return Problem(400, f"{field} must follow the API, got a fault ({said}); see /openapi.json")


def envelope(path: str, request_id: str, problem: Problem) -> JSONResponse:
    """Return ``problem`` in the form that clients of ``path`` read."""
    status, message = problem.status, problem.message
    body: dict[str, Any]
    if path in _TEI_PATHS:
        status = 422 if status == 400 else status
        body = {"error": message, "error_type": _TEI_TYPES.get(status, "Validation")}
    elif path.startswith("/v2/"):
        body = {"message": message, "id": request_id}
    elif path.startswith("/api/"):
        body = {"error": message}
    else:
        code = _CODES.get(status, "error")
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {
            "error": {"message": message, "type": kind, "param": None, "code": code},
            "detail": message, "code": code, "request_id": request_id,
        }  # fmt: skip
    return JSONResponse(body, status, problem.headers)
