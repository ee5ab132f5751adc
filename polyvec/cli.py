"""The ``polyvec`` command. Each verb parses, calls one function, prints.

Results go to stdout, progress and errors to stderr. Exit code 0: done; 1: nothing found; 2: bad input or usage.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyvec import __version__
from polyvec.apps.search import highlights, read_documents, search
from polyvec.errors import InputError, MissingExtraError, PolyvecError, TruncationWarning, UntrainedDimensionWarning
from polyvec.files import (
    Stamp,
    check_same_model,
    is_vector_file,
    json_line,
    read_records,
    read_vectors,
    vector_writer,
)
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import as_unit
from polyvec.streams import paired

app = typer.Typer(
    help="Task-specific Matryoshka embeddings of text in many languages.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Result = TypeVar("Result")

Model = Annotated[str | None, typer.Option(help="Folder or hub name; the built-in polyvec-mini if left out.")]
EngineName = Annotated[str, typer.Option(help="auto, onnx, onnx-int8 or torch.")]
Dimensions = Annotated[int | None, typer.Option(help="Kept components; all if left out.")]
Column = Annotated[str, typer.Option(help="Field of JSONL, CSV or Parquet that holds the text.")]
TaskName = Annotated[str | None, typer.Option(help="Task: adapter and prompt; the base model if left out.")]


def plain_errors(verb: Callable[..., Result]) -> Callable[..., Result]:
    """Turn polyvec's errors into one line on stderr and exit code 2, and its warnings into one line each."""

    @wraps(verb)
    def run(*args: Any, **options: Any) -> Result:
        try:
            with warnings.catch_warnings():
                for kind in (TruncationWarning, UntrainedDimensionWarning):
                    warnings.simplefilter("always", kind)
                warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
                return verb(*args, **options)
        except PolyvecError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            sys.stderr.close()
            raise typer.Exit(0) from None

    return run


@app.command()
@plain_errors
def embed(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Text (one a line), JSONL, CSV, Parquet; - is stdin.")],
    output: Annotated[str, typer.Option("--output", "-o", help=".jsonl, .parquet or .npy; - for stdout.")] = "-",
    task: TaskName = None,
    dimensions: Dimensions = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, int8, binary or ubinary.")] = "float32",
    column: Column = "text",
    truncate: Annotated[bool, typer.Option(help="Cut texts beyond the context, with a warning.")] = True,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch; by default the fastest.")] = None,
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Embed every text of INPUT, in memory that does not grow with it."""
    embedder = Embedder(model, engine=engine)
    stamp = make_stamp(embedder, task=task, dimensions=dimensions, dtype=dtype)
    records = read_records(None if source == "-" else Path(source), column=column)
    encode = partial(
        embedder.encode_stream, task=task, dimensions=dimensions, dtype=dtype, batch_tokens=batch_tokens,
        truncate=truncate, progress=sys.stderr.isatty(),
    )  # fmt: skip
    rows = ((record, np.asarray(e.vector)) for record, e in paired(records, lambda record: record[column], encode))
    if output == "-":
        for record, vector in rows:
            sys.stdout.write(json_line(record, vector))
        sys.stdout.flush()
        return
    with vector_writer(Path(output), stamp) as writer:
        count = 0
        for record, vector in rows:
            writer.write(record, vector)
            count += 1
    typer.echo(f"{count} vectors of {stamp['dimensions']} {dtype} in {output}", err=True)


def make_stamp(embedder: Embedder, *, task: str | None, dimensions: int | None, dtype: str) -> Stamp:
    """Return what made the vectors of a file, to be compared when they are read again."""
    return {
        "polyvec": __version__,
        "model": embedder.model_name,
        "weights": embedder.weights_hash,
        "task": task,
        "dimensions": dimensions or embedder.config.hidden_size,
        "dtype": dtype,
        "fingerprint": embedder.fingerprint(task=task, dimensions=dimensions, dtype=dtype),
    }


@app.command(name="search")
@plain_errors
def search_files(
    query: str,
    files: Annotated[list[Path], typer.Argument(help="Text files, folders of them, JSONL, CSV or Parquet.")],
    top: Annotated[int, typer.Option(help="Passages to show.")] = 5,
    dimensions: Dimensions = None,
    column: Column = "text",
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Find the passages of FILES that answer QUERY, in any language. Piped, one tab-separated line a passage."""
    documents = read_documents(files, column=column)
    embedder = Embedder(model, engine=engine)
    hits = search(embedder, query, documents, top=top, dimensions=dimensions, progress=sys.stderr.isatty())
    if not hits:
        typer.echo("nothing to search: the files hold no text", err=True)
        raise typer.Exit(1)
    if not sys.stdout.isatty():
        for hit in hits:
            typer.echo(f"{hit.score:.4f}\t{hit.document.source}:{hit.line}\t{' '.join(hit.text.split())}")
        return
    table = Table("cosine", "where", "passage", show_lines=True)
    for hit in hits:
        passage = Text(hit.text)
        for start, end in highlights(query, hit.text):
            passage.stylize("bold yellow", start, end)
        table.add_row(f"{hit.score:.3f}", Text(f"{hit.document.source}:{hit.line}"), passage)
    Console().print(table)


@app.command()
@plain_errors
def match(
    first: Annotated[str, typer.Argument(metavar="A", help="A text, a file of texts, or a vector file.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The same; each of A meets all of B.")],
    top: Annotated[int, typer.Option(help="Best partners in B shown for each of A.")] = 1,
    task: TaskName = "text-matching",
    dimensions: Dimensions = None,
    column: Column = "text",
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Print the cosine of the best partners in B for each of A: cosine, A, B, separated by tabs."""
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    sides = [_side(text, column) for text in (first, second)]
    stamps = [side[2] for side in sides if side[2] is not None]
    if len(stamps) == 2:
        check_same_model(stamps[0], stamps[1], (first, second))
    embedder: Embedder | None = None
    vectors = []
    for name, (labels, stored, stamp) in zip((first, second), sides, strict=True):
        if stamp is None:
            embedder = embedder or Embedder(model, engine=engine)
            width = stamps[0]["dimensions"] if stamps else dimensions
            if stamps:
                made = make_stamp(embedder, task=task, dimensions=width, dtype=stamps[0]["dtype"])
                check_same_model(stamps[0], made, ("the vector file", name))
            dtype = stamps[0]["dtype"] if stamps else "float32"
            stored = embedder.encode(labels, task=task, dimensions=width, dtype=dtype)
        vectors.append(as_unit(stored, stamps[0]["dtype"] if stamps else "float32"))
    cosines = vectors[0] @ vectors[1].T
    for i, row in enumerate(cosines):
        for j in np.argsort(-row, kind="stable")[:top]:
            typer.echo(f"{row[j]:.4f}\t{_one_line(sides[0][0][i])}\t{_one_line(sides[1][0][j])}")


def _side(argument: str, column: str) -> tuple[list[str], Any, Stamp | None]:
    """Return texts, or labels with stored vectors and their stamp. What is no file and looks like none is a text."""
    path = Path(argument)
    try:
        is_file = path.is_file()
    except OSError:  # a long text is no file name
        is_file = False
    if not is_file:
        if path.suffix.lower() in (".jsonl", ".csv", ".tsv", ".parquet", ".npy", ".txt") and " " not in argument:
            raise InputError(f"{argument} must be a readable file, got none there")
        return [argument], None, None
    if is_vector_file(path):
        vectors, records, stamp = read_vectors(path)
        labels = [str(r.get(column, i)) for i, r in enumerate(records)] or [f"#{i}" for i in range(len(vectors))]
        return labels, vectors, stamp
    texts = [record[column] for record in read_records(path, column=column)]
    if not texts:
        raise InputError(f"{argument} must hold at least one text, got none")
    return texts, None, None


def _one_line(text: str) -> str:
    return " ".join(text.split())


@app.command()
@plain_errors
def info(model: Model = None, engine: EngineName = "auto") -> None:
    """Print what the model is, as JSON: tasks, dimensions, context, engine, fingerprints."""
    embedder = Embedder(model, engine=engine)
    config = embedder.config
    facts = {
        "polyvec": __version__,
        "model": embedder.model_name,
        "folder": str(embedder.folder),
        "engine": embedder.engine.name,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "max_tokens": embedder.max_tokens,
        "dimensions": list(embedder.dimensions),
        "weights": embedder.weights_hash,
        "tasks": {
            task: {"prompt": config.prompts[task], "fingerprint": embedder.fingerprint(task=task)}
            for task in embedder.tasks
        },
        "base_fingerprint": embedder.fingerprint(),
    }
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))


@app.command()
@plain_errors
def export(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or polyvec-mini.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder; left out for --onnx alone.")
    ] = None,
    layout: Annotated[str, typer.Option(help="polyvec, hf (transformers + PEFT) or original (jina hub).")] = "polyvec",
    onnx: Annotated[str | None, typer.Option(help="Also write an ONNX graph: fp32 or int8.")] = None,
) -> None:
    """Write MODEL in another layout, or an ONNX graph of it, checked against its weights."""
    from polyvec.inference.convert import convert

    for line in convert(model, output, layout=layout, onnx=onnx):
        typer.echo(line, err=True)


train_app = typer.Typer(help="Train on your own data.", no_args_is_help=True)
app.add_typer(train_app, name="train")


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


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Task-specific Matryoshka embeddings of text in many languages."""
    if version:
        typer.echo(__version__)
        raise typer.Exit(0)
