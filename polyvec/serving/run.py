"""The server process: sockets, signals, and the order in which it stops."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from polyvec.errors import InputError
from polyvec.inference.embedder import Embedder
from polyvec.serving.app import make_app
from polyvec.serving.service import Service

_STOP_SECONDS = 25  # for what is in flight; with the rest it stays under the 30 s after which supervisors kill


class _Server(uvicorn.Server):
    """Flips readiness before anything else stops, so that balancers look away first."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.scheduler.draining = True
        super().handle_exit(sig, frame)


def run(
    embedder: Embedder,
    *,
    host: str,
    port: int,
    keys: Sequence[str],
    queue_tokens: int,
    max_seconds: float,
    max_body_bytes: int,
    cors_origins: Sequence[str],
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is in flight. Raises ``InputError`` for an address in use."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    service = Service(embedder, queue_tokens=queue_tokens, max_seconds=max_seconds)
    app = make_app(service, keys=keys, max_body_bytes=max_body_bytes)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"host and port must be free to bind, got {host}:{port} ({error.strerror}); take another"
        ) from error
    config = uvicorn.Config(
        app,
        access_log=False,  # the guard logs requests, with their ids
        log_level="warning",
        timeout_graceful_shutdown=_STOP_SECONDS,
        server_header=False,
    )
    print(
        f"polyvec serves {embedder.model_name} at http://{host}:{listener.getsockname()[1]}",
        file=sys.stderr,
        flush=True,
    )
    _Server(config, service).run(sockets=[listener])
