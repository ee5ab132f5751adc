"""``polyvec serve``: one server for five dialects; ``polyvec key``: who may use it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyvec.cli.common import EngineName, Model, plain_errors
from polyvec.errors import MissingExtraError


@plain_errors
def serve(
    model: Model = None,
    engine: EngineName = "auto",
    device: Annotated[
        list[str] | None, typer.Option(help="Such as cuda:0; one worker process for each one named.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes that share the cores; one a CPU socket if left out.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a worker.")] = None,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys (polyvec key); everyone is answered if left out.")
    ] = None,
    queue_tokens: Annotated[int, typer.Option(min=1, help="Tokens that may wait; beyond, 429.")] = 200_000,
    cache_rows: Annotated[int, typer.Option(min=0, help="Vectors kept for texts that come again; 0 keeps none.")] = 0,
    max_seconds: Annotated[float, typer.Option(min=0.001, help="Seconds within which a request is answered.")] = 60.0,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 8_000_000,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Web origin that may call; none if left out.")] = None,
) -> None:
    """Serve MODEL over HTTP: OpenAI, Jina, Cohere, TEI and Ollama dialects, and a page to try it on."""
    try:
        from polyvec.serving.run import Settings, run
    except ImportError as error:
        raise MissingExtraError.of("polyvec serve", "serve") from error
    run(
        Settings(
            model=model,
            engine=engine,
            devices=device or [],
            workers=workers,
            threads=threads,
            host=host,
            port=port,
            api_keys=api_keys,
            queue_tokens=queue_tokens,
            cache_rows=cache_rows,
            max_seconds=max_seconds,
            max_body_bytes=max_body_bytes,
            cors_origins=cors_origin or [],
        )
    )
