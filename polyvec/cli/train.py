"""``polyvec train``: models from your own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyvec.cli.common import Model, plain_errors
from polyvec.errors import MissingExtraError

train_app = typer.Typer(help="Train on your own data.", no_args_is_help=True)


@train_app.command()
@plain_errors
def adapter(
    data: Annotated[Path, typer.Option(help="JSONL, CSV or Parquet of examples.")],
    kind: Annotated[
        str,
        typer.Option(
            help="retrieval (query, passage), matching (text_a, text_b, score), classification or separation "
            "(text, label)."
        ),
    ],
    name: Annotated[str, typer.Option(help="The new task; a retrieval pair is NAME.query and NAME.passage.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New model folder.")],
    model: Model = None,
    steps: Annotated[int, typer.Option(help="Batches to learn from.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 1e-3,
    max_tokens: Annotated[int, typer.Option(help="Texts are cut here while training.")] = 256,
) -> None:
    """Add a task of your own to MODEL: a new adapter, everything else bit for bit as it was."""
    try:
        from polyvec.training.own_adapter import train_adapter
    except ImportError as error:
        raise MissingExtraError.of("train", "train") from error
    names, losses = train_adapter(
        model, data, output, kind=kind, name=name, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
        max_tokens=max_tokens,
    )  # fmt: skip
    typer.echo(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps", err=True)
    typer.echo(f"{' and '.join(names)} in {output}; use it with --model {output} --task {names[0]}", err=True)
