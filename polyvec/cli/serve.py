"""``polyvec serve``: one server for five dialects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyvec.cli.common import EngineName, Model, plain_errors
from polyvec.errors import InputError, MissingExtraError
from polyvec.inference.embedder import Embedder


@plain_errors
def serve(
    model: Model = None,
    engine: EngineName = "auto",
    host: Annotated[str, typer.Option(envvar="POLYVEC_HOST", help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="POLYVEC_PORT", min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_keys: Annotated[
        Path | None, typer.Option(envvar="POLYVEC_API_KEYS", help="File with one API key a line; everyone if left out.")
    ] = None,
    queue_tokens: Annotated[
        int, typer.Option(envvar="POLYVEC_QUEUE_TOKENS", min=1, help="Tokens that may wait; beyond, 429.")
    ] = 200_000,
    max_seconds: Annotated[
        float, typer.Option(envvar="POLYVEC_MAX_SECONDS", min=0.001, help="Seconds within which a request is answered.")
    ] = 60.0,
    max_body_bytes: Annotated[
        int, typer.Option(envvar="POLYVEC_MAX_BODY_BYTES", min=1, help="Bytes of a request's body.")
    ] = 8_000_000,
    cors_origin: Annotated[
        list[str] | None, typer.Option(envvar="POLYVEC_CORS_ORIGIN", help="Web origin that may call; none if left out.")
    ] = None,
    threads: Annotated[int | None, typer.Option(envvar="POLYVEC_THREADS", min=1, help="CPU threads.")] = None,
) -> None:
    """Serve MODEL over HTTP: OpenAI, Jina, Cohere, TEI and Ollama dialects, and a page to try it on."""
    try:
        from polyvec.serving.run import run
    except ImportError as error:
        raise MissingExtraError.of("polyvec serve", "serve") from error
    run(
        Embedder(model, engine=engine, threads=threads),
        host=host,
        port=port,
        keys=_read_keys(api_keys),
        queue_tokens=queue_tokens,
        max_seconds=max_seconds,
        max_body_bytes=max_body_bytes,
        cors_origins=cors_origin or [],
    )


def _read_keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"api-keys must be a readable file, got {path} ({error.strerror}); check the path") from error
    if not keys:  # an empty file must not open the server to everyone
        raise InputError(f"api-keys must hold one key a line, got none in {path}; leave the option out to ask for none")
    return keys
