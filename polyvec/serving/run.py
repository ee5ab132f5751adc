"""The server process: workers, sockets, signals, and the order in which it stops."""

from __future__ import annotations

import gc
import logging
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from polyvec.errors import InputError
from polyvec.inference.embedder import Embedder
from polyvec.serving.app import make_app
from polyvec.serving.keys import Keys
from polyvec.serving.log import Lines
from polyvec.serving.protocol import PatientProtocol
from polyvec.serving.service import Service
from polyvec.serving.worker import WorkerSettings, cpu_shares, open_workers

_STOP_SECONDS = 25  # for what is in flight; with the rest it stays under the 30 s after which supervisors kill
_NOTICE_SECONDS = 1.0  # between "not ready" and the closed door, for balancers to look away
_KEEP_ALIVE_SECONDS = 75  # longer than balancers keep an idle connection, so that they close it and not we


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``polyvec serve`` is told; ``polyvec/cli/serve.py`` says what each field means."""

    model: str | None
    engine: str
    devices: Sequence[str]
    workers: int | None
    threads: int | None
    host: str
    port: int
    api_keys: Path | None
    queue_tokens: int
    cache_rows: int
    max_seconds: float
    max_body_bytes: int
    cors_origins: Sequence[str]


class _Server(uvicorn.Server):
    """Flips readiness before anything else stops, so that balancers look away first."""

    def __init__(self, config: uvicorn.Config, service: Service, lines: Lines) -> None:
        super().__init__(config)
        self._service, self._lines = service, lines

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again = self._service.leaving
        self._service.leaving = True
        if again:
            self._stop(sig, frame)
        else:
            threading.Timer(_NOTICE_SECONDS, self._stop, (sig, frame)).start()

    def _stop(self, sig: int, frame: FrameType | None) -> None:
        self._service.scheduler.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._lines.flush()  # after this, uvicorn ends the process by the signal that it was sent


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is in flight.

    Raises ``InputError`` for an address in use or keys that cannot be read, and what opening the model raises.
    """
    lines = Lines(sys.stderr)
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line has them
    keys = None if settings.api_keys is None else Keys(settings.api_keys)
    with _listen(settings.host, settings.port) as listener, open_workers(_worker_settings(settings)) as workers:
        embedder = Embedder(settings.model, engine=workers[0])
        service = Service(
            embedder,
            queue_tokens=settings.queue_tokens,
            max_seconds=settings.max_seconds,
            cache_rows=settings.cache_rows,
            workers=workers,
        )
        app: ASGIApp = make_app(service, keys=keys, max_body_bytes=settings.max_body_bytes)
        if settings.cors_origins:
            origins = list(settings.cors_origins)
            app = CORSMiddleware(
                app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )  # fmt: skip
        gc.collect()
        gc.freeze()  # a look through all that was imported takes 20 ms, and one comes every 2,000 requests
        config = uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            log_config=None,  # its lines are ours too
            access_log=False,  # the guard logs requests, with their ids
            log_level="warning",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_STOP_SECONDS,
            server_header=False,
            proxy_headers=False,  # nothing here asks where a request comes from
        )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        print(f"polyvec serves {embedder.model_name} at {address}", file=sys.stderr, flush=True)
        _Server(config, service, lines).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    if not host:  # for a socket it is every address of the machine, which is to be said in so many words
        raise InputError("host must be an address, got none; 0.0.0.0 is every address of this machine")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(
            f"host and port must be free to bind, got {host}:{port} ({error.strerror}); take another"
        ) from error


def _worker_settings(settings: Settings) -> list[WorkerSettings]:
    """One worker for each device, or for each share of the cores."""
    model, engine, threads = settings.model, settings.engine, settings.threads
    if settings.devices:
        return [WorkerSettings(model, engine, device=device, threads=threads) for device in settings.devices]
    shares = cpu_shares(settings.workers)
    return [
        WorkerSettings(model, engine, threads=threads or (len(share) if share else None), cpus=share)
        for share in shares
    ]
