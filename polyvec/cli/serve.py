"""``polyvec serve``: one server for five dialects; ``polyvec key``: who may use it.

Every option is also an environment variable (``POLYVEC_MAX_SECONDS``) and an entry of a TOML file (``max_seconds``).
The command line goes before the environment, the environment before the file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from polyvec.cli.common import EngineName, Model, plain_errors
from polyvec.errors import MissingExtraError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Of the verb: typer then reads POLYVEC_PORT and so on.
SERVE_CONTEXT = {"auto_envvar_prefix": "POLYVEC"}


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the entries of the file the defaults of the other options."""
    if path is None:
        return None
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"must be a readable TOML file, got {path} ({type(error).__name__})") from error
    names = {str(option.name) for option in context.command.params} - {"config"}
    if unknown := sorted(set(entries) - names):
        raise typer.BadParameter(f"{path} must hold {', '.join(sorted(names))}, got {', '.join(unknown)}")
    if odd := [name for name, value in entries.items() if isinstance(value, (bool, dict))]:  # true would count as 1
        raise typer.BadParameter(f"{odd[0]} of {path} must be a number, a text or a list, got another entry")
    context.default_map = entries
    return path


@plain_errors
def serve(
    config: Annotated[
        Path | None, typer.Option(is_eager=True, callback=_read_config, help="TOML file of the options below.")
    ] = None,
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
    queue_tokens: Annotated[int, typer.Option(min=1, help="Tokens that may be read, wait or run, or 429.")] = 200_000,
    cache_rows: Annotated[int, typer.Option(min=0, help="Vectors kept for texts that come again; 0 keeps none.")] = 0,
    max_seconds: Annotated[float, typer.Option(min=0.001, help="Seconds within which a request is answered.")] = 60.0,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 8_000_000,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Web origin that may call; none if left out.")] = None,
) -> None:
    """Serve MODEL over HTTP: OpenAI, Jina, Cohere, TEI and Ollama dialects, and a page to try it on.

    Each option may also stand in the environment (POLYVEC_MAX_SECONDS) or in the file of --config (max_seconds = 30).
    """
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


@plain_errors
def key(
    name: Annotated[str, typer.Argument(help="Of its owner, for limits and logs: letters, digits, - and _.")],
    file: Annotated[Path, typer.Argument(help="TOML file of keys for polyvec serve --api-keys; made if new.")],
    requests_per_minute: Annotated[float | None, typer.Option(min=1e-6, help="No limit if left out.")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option(min=1e-6, help="No limit if left out.")] = None,
) -> None:
    """Make an API key, add its hash and limits to FILE, and print it: it is kept nowhere else."""
    from polyvec.serving.keys import add_key

    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    typer.echo(add_key(name, file, {limit: number for limit, number in limits.items() if number is not None}))
