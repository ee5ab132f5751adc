"""``polyvec info`` and ``polyvec export``: what a model is, and the same in another layout."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from polyvec import __version__
from polyvec.cli.common import EngineName, Model, plain_errors
from polyvec.errors import InputError
from polyvec.inference.embedder import Embedder
from polyvec.inference.engines import Engine


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


@plain_errors
def export(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or polyvec-mini.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder; left out for --onnx alone.")
    ] = None,
    layout: Annotated[str, typer.Option(help="polyvec, hf (transformers + PEFT) or original (jina hub).")] = "polyvec",
    onnx: Annotated[str | None, typer.Option(help="Also write an ONNX graph: fp32 or int8.")] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help="Suite, as of polyvec evaluate, of which the graph must keep 99.5 % of the score; repeat it."
        ),
    ] = None,
) -> None:
    """Write MODEL in another layout, or an ONNX graph of it, checked against its weights."""
    from polyvec.inference.convert import convert

    check: Callable[[Path], Callable[[Engine], None]] | None = None
    if gate:
        if onnx is None:
            raise InputError("--gate checks a graph, got no --onnx; add it, or leave --gate out")
        from polyvec.evaluation.gate import graph_gate
        from polyvec.evaluation.readers import open_suites

        suites = [suite for name in gate for suite in open_suites(name)]
        check = functools.partial(graph_gate, suites=suites)

    for line in convert(model, output, layout=layout, onnx=onnx, gate=check):
        typer.echo(line, err=True)
