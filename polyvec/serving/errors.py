"""Errors as answers: one sentence, a status, and the envelope of the dialect that was spoken.

No answer repeats input or tells of the inside: sentences name fields, rules and numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

from polyvec.errors import InputError, PolyvecError
from polyvec.serving.keys import RateLimitError
from polyvec.serving.scheduler import DeadlineError, DrainingError, OverloadedError

_TEI_PATHS = ("/", "/embed", "/embed_all", "/similarity", "/tokenize", "/info")
_TEI_TYPES = {400: "Empty", 413: "Validation", 422: "Validation", 429: "Overloaded", 503: "Unhealthy"}
_CODES = {
    400: "invalid_request", 401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "timeout",
    413: "request_too_large", 415: "unsupported_media_type", 422: "invalid_request", 429: "rate_limit_exceeded",
    500: "internal_error", 503: "service_unavailable", 504: "deadline_exceeded",
}  # fmt: skip


class Problem(Exception):
    """An answer that is not a result."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


def problem_of(error: PolyvecError) -> Problem:
    """Return the status of an error of ours, with its own sentence."""
    if isinstance(error, (OverloadedError, RateLimitError)):
        return Problem(429, str(error), retry_after=error.retry_after)
    if isinstance(error, DrainingError):
        return Problem(503, str(error), retry_after=1)
    if isinstance(error, DeadlineError):
        return Problem(504, str(error))
    return Problem(400 if isinstance(error, InputError) else 500, str(error))


def invalid(errors: Sequence[Any]) -> Problem:
    """Return the first fault that pydantic found as a sentence without the input."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return Problem(400, "the body must be JSON, got something else; check quotes and commas")
    if first["type"] == "extra_forbidden":  # its name is input too
        return Problem(400, "the body must hold fields of the API alone, got no such field; see /openapi.json")
    field = str(first["loc"][1]) if len(first["loc"]) > 1 else "the body"
    return Problem(400, f"{field} must follow the API, got a fault ({first['msg'].lower()}); see /openapi.json")


def envelope(path: str, request_id: str, problem: Problem) -> JSONResponse:
    """Return ``problem`` in the form that clients of ``path`` read."""
    status, message = problem.status, problem.message
    body: dict[str, Any]
    if path in _TEI_PATHS:
        status = 422 if status == 400 else status
        body = {"error": message, "error_type": _TEI_TYPES.get(status, "Backend")}
    elif path.startswith("/v2/"):
        body = {"message": message, "id": request_id}
    elif path.startswith("/api/"):
        body = {"error": message}
    else:  # OpenAI's "error" and Jina's "detail" are read by clients of the same path
        code = _CODES.get(status, "error")
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {
            "error": {"message": message, "type": kind, "param": None, "code": code},
            "detail": message, "code": code, "request_id": request_id,
        }  # fmt: skip
    headers = {} if problem.retry_after is None else {"retry-after": str(max(1, problem.retry_after))}
    return JSONResponse(body, status, headers)
