"""``polyvec classify``: texts to labels, learned from examples or from the labels' names alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from polyvec.apps.classify import TASK, Classifier, check_abstain, decide, make_report, train, zero_shot
from polyvec.atomic import check_output
from polyvec.cli.common import Column, EngineName, Model, check_columns, plain_errors
from polyvec.errors import InputError
from polyvec.files import as_text, json_text, read_records
from polyvec.inference.embedder import Embedder
from polyvec.streams import paired

classify_app = typer.Typer(help="Give texts labels.", no_args_is_help=True)


@classify_app.command(name="train")
@plain_errors
def train_command(
    data: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet of examples.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The classifier, a .json file.")],
    column: Column = "text",
    label_column: Annotated[str, typer.Option(help="Field that holds the label.")] = "label",
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Learn labels from examples, a few of each are enough, and print how well held-out examples are classified."""
    check_output(output)
    texts, labels = [], []
    for number, record in enumerate(read_records(data, column=column), start=1):
        if record.get(label_column) is None:
            raise InputError(f"{data}:{number} must have the column {label_column!r}; see --label-column")
        for name in (column, label_column):
            if not as_text(record[name]).strip():
                raise InputError(
                    f"{data}:{number} must hold text under {name!r}, got nothing; fill it in or drop the row"
                )
        texts.append(record[column])
        labels.append(as_text(record[label_column]))
    classifier, report = train(Embedder(model, engine=engine), texts, labels)
    classifier.save(output)
    typer.echo(report)
    typer.echo(f"{len(labels)} examples of {len(classifier.labels)} labels; classifier in {output}", err=True)


@classify_app.command()
@plain_errors
def predict(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Text (one a line), JSONL, CSV, Parquet; - is stdin.")],
    classifier: Annotated[
        Path | None, typer.Option("--classifier", "-c", help="File that polyvec classify train wrote.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Without examples: NAME or NAME=DESCRIPTION, once for each label.")
    ] = None,
    abstain: Annotated[float, typer.Option(help="Below this probability the label is null.")] = 0.0,
    column: Column = "text",
    truth: Annotated[str | None, typer.Option(help="Field of right labels: print a report to stderr.")] = None,
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Print each record of INPUT with its predicted label and probability, as a line of JSON."""
    check_abstain(abstain)
    if (classifier is None) == (not label):
        got = "neither" if classifier is None else "both"
        raise InputError(f"predict needs --classifier or --label, one of the two, got {got}")
    descriptions = _descriptions(label or [])
    embedder = Embedder(model, engine=engine)
    if classifier is not None:
        found = Classifier.load(classifier, embedder)
    else:
        found = zero_shot(embedder, descriptions)
    records = read_records(None if source == "-" else Path(source), column=column)
    records = check_columns(records, ("predicted", "probability"))
    compared, columns = [], []
    for record, embedding in paired(records, lambda record: record[column], partial(embedder.encode_stream, task=TASK)):
        probabilities = found.probabilities(np.asarray(embedding.vector)[None])
        ((name, probability),) = decide(found.labels, probabilities, abstain=abstain)
        answer = {**record, "predicted": name, "probability": round(probability, 4)}
        typer.echo(json_text(answer))
        if truth is not None:
            right = as_text(record.get(truth))
            if right not in found.labels:
                raise InputError(
                    f"{truth!r} must be one of the labels {', '.join(found.labels)}, got {record.get(truth)!r}"
                )
            compared.append(probabilities[0])
            columns.append(found.labels.index(right))
    if compared:
        typer.echo(make_report(found.labels, np.stack(compared), np.array(columns)), err=True)


def _descriptions(labels: list[str]) -> dict[str, str]:
    descriptions: dict[str, str] = {}
    for pair in labels:
        name, sign, description = pair.partition("=")
        if not name.strip():
            raise InputError(f"--label must be NAME or NAME=DESCRIPTION, got {pair!r}")
        if name in descriptions:
            raise InputError(f"--label must name a label once, got {name!r} again; describe it in one sentence")
        descriptions[name] = description if sign else name
    return descriptions
