"""What stands before every route: request ids, API keys, bodies of bounded size, depth and duration. Pure ASGI."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
import traceback
from collections.abc import Awaitable, Collection, Mapping
from types import TracebackType
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyvec.errors import PolyvecError
from polyvec.serving.bodies import Post
from polyvec.serving.caller import CALLER, Caller
from polyvec.serving.errors import Problem, cut_short, envelope, problem_of, server_fault
from polyvec.serving.keys import ApiKey, Keys
from polyvec.serving.metrics import Metrics
from polyvec.serving.tracing import Tracing

_log = logging.getLogger(__name__)
MAX_DEPTH = 32  # of nested JSON; no dialect needs more than 4
MAX_PARTS = 10_000  # fields, lists and objects, each of which costs to read, known or not; 2048 inputs have twice that
_READ_SECONDS = 60.0  # for a whole body
_LEFT = 499  # nginx's number for a client that left; in the log and the metrics alone, for nobody is there to see it
OPEN_PATHS = frozenset({"/", "/health", "/ready"})  # to all but what embeds: POST / does
#: ``bulk`` work gets what interactive work leaves, and a little beside it.
PRIORITY_HEADER = "x-polyvec-priority"
#: Seconds within which the caller needs the answer; never more than the server's own limit.
TIMEOUT_HEADER = "x-polyvec-timeout"
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """Wraps ``app``, and answers the ``posts`` itself. Without ``keys`` everyone is answered.

    A body goes straight to its route: what FastAPI would do on the way there is done here already or not needed, and
    took as long as all the rest of a request (measured 2026-11-26). ``app`` is asked only what ``methods`` names, path
    by path to the letter: its own idea of a path is wider (a line break may follow), and none of a body's limits hold
    there.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        posts: Mapping[str, Post],
        methods: Mapping[str, Collection[str]],
        keys: Keys | None,
        max_body_bytes: int,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self.app, self.posts, self.methods = app, posts, methods
        self.keys, self.max_body_bytes = keys, max_body_bytes
        self.metrics, self.tracing = metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Of two headers of one name the first counts.
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else f"{random.getrandbits(128):032x}"
        id_header = (b"x-request-id", request_id.encode())
        scope.setdefault("state", {})["request_id"] = request_id
        method, path = scope["method"], scope["path"]
        started, status = time.monotonic(), _LEFT
        post = self.posts.get(path) if method == "POST" else None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], id_header]
            await send(message)

        with self.tracing.request(method, headers) as span:
            try:
                key = None if post is None and path in OPEN_PATHS else self._authorise(headers)
                CALLER.set(Caller(key, _is_bulk(headers), _timeout(headers)))
                if post is None:
                    self._check(method, path)
                    # What a GET answers has no body where HEAD asks: uvicorn, which keeps the scope, leaves it out.
                    await self.app({**scope, "method": "GET"}, receive, send_with_id)
                else:
                    body = await self._read(headers, receive)
                    if (response := await _while_waited_for(post(body), receive)) is not None:
                        await response(scope, receive, send_with_id)
            except Problem as problem:
                await envelope(path, request_id, problem)(scope, receive, send_with_id)
            except PolyvecError as error:
                await envelope(path, request_id, problem_of(error))(scope, receive, send_with_id)
            except asyncio.CancelledError:  # uvicorn ends what takes longer than it waits for when it stops
                if status != _LEFT:  # half an answer is out
                    raise
                await envelope(path, request_id, cut_short())(scope, receive, send_with_id)
            except Exception as error:  # the place is for the log; the message may hold a text, so it is for no one
                place = "".join(traceback.format_tb(error.__traceback__)[-1:])
                _log.error("%s failed with %s at %s", request_id, type(error).__name__, place)
                if status == _LEFT:  # nothing has been said yet
                    await envelope(path, request_id, server_fault())(scope, receive, send_with_id)
            finally:
                route = path if path in self.methods else "other"
                seconds = time.monotonic() - started
                span |= {"http.route": route, "http.response.status_code": status, "polyvec.request_id": request_id}
                self.metrics.answered(route, status, seconds)
                facts = {"request": request_id, "method": method, "route": route, "status": status}
                _log.info("request", extra={"facts": {**facts, "ms": round(seconds * 1000, 1)}})

    def _check(self, method: str, path: str) -> None:
        """Raise ``Problem`` for what is neither one of ``posts`` nor a page to get."""
        if path not in self.methods:
            raise Problem(404, "the path must be one of this server's, got another; see /openapi.json")
        if method not in self.methods[path]:
            sentence = "the method must fit the path, got another; see /openapi.json"
            raise Problem(405, sentence, headers={"allow": ", ".join(sorted(self.methods[path]))})

    def _authorise(self, headers: Mapping[str, str]) -> ApiKey | None:
        if self.keys is None:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        key = self.keys.find(secret.strip())
        if scheme.lower() != "bearer" or key is None:
            sentence = "authorization must be 'Bearer KEY' with a key of this server, got none or another"
            raise Problem(401, sentence, headers={"www-authenticate": "Bearer"})
        key.spend("requests_per_minute", 1)
        return key

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            raise self._too_large()
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Problem(415, "content-type must be application/json, got another or none; set the header")
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Problem(415, "content-encoding must be identity, got another; send the JSON as it is")
        try:
            with _Limit(_READ_SECONDS):
                body = await self._collect(receive)
        except asyncio.TimeoutError:
            raise Problem(
                408, f"the body must arrive within {_READ_SECONDS:g} s, got a part of it; send it again"
            ) from None
        check_shape(body)
        return body

    async def _collect(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Problem(400, "the body must be whole, got a part of it; send it again")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> Problem:
        return Problem(413, f"the body must be at most {self.max_body_bytes} bytes, got more; send several requests")


async def _while_waited_for(work: Awaitable[Response], receive: Receive) -> Response | None:
    """Return what ``work`` gives; None once the client leaves, and ``work`` is cancelled: nobody waits for it."""
    own = asyncio.current_task()
    assert own is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        own.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not has_left:
            raise
        return None
    finally:
        watching.cancel()


class _Limit:
    """Raises ``asyncio.TimeoutError`` where what runs inside takes longer than ``seconds``.

    ``asyncio.wait_for`` would run it as another task, which for a body that is there costs more than the body.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._is_over = seconds, False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end, task)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._is_over = True
        task.cancel()

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._timer.cancel()
        if self._is_over and kind is asyncio.CancelledError:
            raise asyncio.TimeoutError


def _is_bulk(headers: Mapping[str, str]) -> bool:
    priority = headers.get(PRIORITY_HEADER, "interactive")
    if priority not in ("interactive", "bulk"):
        raise Problem(400, f"{PRIORITY_HEADER} must be interactive or bulk, got another word; leave it out")
    return priority == "bulk"


def _timeout(headers: Mapping[str, str]) -> float | None:
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    if not _SECONDS.fullmatch(given) or float(given) == 0:
        raise Problem(400, f"{TIMEOUT_HEADER} must be seconds above 0, such as 2.5, got something else; leave it out")
    return float(given)


def check_shape(body: bytes) -> None:
    """Raise ``Problem`` for JSON of more than ``MAX_PARTS`` or deeper than ``MAX_DEPTH``, in time linear in it."""
    if b"\0" in body:  # Python would read UTF-16 and UTF-32 too, whose bytes are not those that are counted here
        raise Problem(400, "the body must be JSON in UTF-8, got bytes of value 0; encode it as UTF-8")
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH and body.count(b":") <= MAX_PARTS - MAX_DEPTH:
        return  # no more even if none of them is in a string
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = re.sub(rb'"[^"]*"?', b"", unescaped)  # a string without end too, or each quote of it would be looked from
    if outside.count(b"[") + outside.count(b"{") + outside.count(b":") > MAX_PARTS:
        raise Problem(
            400, f"the body must hold at most {MAX_PARTS} fields, lists and objects, got more; send several requests"
        )
    depth = 0
    for bracket in re.finditer(rb"[\[\]{}]", outside):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise Problem(400, f"the body must nest at most {MAX_DEPTH} levels of JSON, got more; send flat inputs")
        if depth < 0:
            return  # no JSON, as whoever reads it will say, and there may be millions more of these
