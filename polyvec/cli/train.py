"""``polyvec train``: models from your own data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from polyvec.cli.common import Model, plain_errors
from polyvec.errors import InputError, MissingExtraError
from polyvec.inference.embedder import Embedder

if TYPE_CHECKING:
    from polyvec.training.run import Run


class RunOrVerb(TyperGroup):
    """Lets ``polyvec train RUN.toml`` stand for ``polyvec train run RUN.toml``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # types of click, or of typer's copy of it
        known = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["run", *args])


#: Kind of adapter -> what its run has of its own. Labels teach best by the other classes of a batch alone, at a higher
#: rate; CoSENT teaches less in as many steps (docs/experiments.md).
_KINDS: dict[str, dict[str, Any]] = {
    "retrieval": {"stage": "retrieval", "learning_rate": 1e-3},
    "matching": {"stage": "text-matching", "learning_rate": 1e-3},
    "classification": {"stage": "classification", "learning_rate": 3e-3, "negatives": 0},
    "separation": {"stage": "separation", "learning_rate": 3e-3, "negatives": 0, "classmates": True},
}

train_app = typer.Typer(
    cls=RunOrVerb,
    help="Train on your own data. RUN.toml or a recipe's name may stand for a command.",
    no_args_is_help=True,
)


@train_app.command()
@plain_errors
def run(
    name: Annotated[str, typer.Argument(metavar="RUN", help="TOML file of a run, or a recipe's name.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE in place of the file's; repeat it.")
    ] = None,
) -> None:
    """Train one stage as RUN says; the same command again goes on where it stopped. Under torchrun, on many devices."""
    try:
        from polyvec.training.run import read_run
    except ImportError as error:
        raise MissingExtraError.of("train", "train") from error
    _train(read_run(name, dict(_change(text) for text in set_ or ())))


def _train(wanted: Run) -> None:
    try:
        from polyvec.training.distributed import is_first
        from polyvec.training.stages import run_stage
    except ImportError as error:
        raise MissingExtraError.of("train", "train") from error

    def report(row: dict[str, float]) -> None:
        speed = f"  {row['tokens_per_second']:,.0f} tokens/s  MFU {row['mfu']:.0%}"
        typer.echo(f"step {row['step']:.0f}/{wanted.steps}  loss {row['loss']:.4f}{speed}", err=True)

    losses = run_stage(wanted, report=report, notice=lambda sentence: typer.echo(sentence, err=True))
    if is_first():
        typer.echo(f"{wanted.stage}: loss {losses[0]:.3f} to {losses[-1]:.3f}, model in {wanted.output}", err=True)


def _change(text: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set must be FIELD=VALUE, got {text!r}")
    return field.strip(), value.strip()


@train_app.command()
@plain_errors
def adapter(
    data: Annotated[list[str], typer.Option(help="File, folder or URL of JSONL, CSV or Parquet; repeat it.")],
    kind: Annotated[
        str,
        typer.Option(
            help="retrieval (query, passage), matching (text_a, text_b, score; or premise, hypothesis, label), "
            "classification or separation (text, label)."
        ),
    ],
    name: Annotated[str, typer.Option(help="The new task; a retrieval pair is NAME.query and NAME.passage.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New model folder.")],
    model: Model = None,
    steps: Annotated[int, typer.Option(help="Batches to learn from.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.")] = 32,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest; if left out, 0.003 for labels and 0.001 for the others.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Texts are cut here while training.")] = 256,
) -> None:
    """Add a task of your own to MODEL: a new adapter, everything else bit for bit as it was.

    The same command again goes on where it stopped.
    """
    try:
        from polyvec.training.own_adapter import new_tasks
        from polyvec.training.run import Run
    except ImportError as error:
        raise MissingExtraError.of("train", "train") from error
    if kind not in _KINDS:
        raise InputError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if not name:  # to a run it says that the stage's own adapters learn
        raise InputError("name must be letters, digits, '.', '_' and '-', got none; name the new task")
    own = _KINDS[kind] if learning_rate is None else {**_KINDS[kind], "learning_rate": learning_rate}
    _train(
        Run(
            adapter=name, data=tuple(data), output=str(output), model=str(model or "polyvec-mini"), steps=steps,
            batch_size=batch_size, max_tokens=max_tokens, warmup_steps=max(1, steps // 10), **own,
        )
    )  # fmt: skip
    names = list(new_tasks(name, own["stage"]))
    typer.echo(f"{' and '.join(names)} in {output}; use it with --model {output} --task {names[0]}", err=True)


@train_app.command()
@plain_errors
def mine(
    data: Annotated[str, typer.Option(help="File, folder or URL with query and passage.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL to write: the same with negatives.")],
    count: Annotated[int, typer.Option(help="Most negatives of a query.")] = 7,
    margin: Annotated[float, typer.Option(help="A negative's cosine is at most this part of the answer's.")] = 0.95,
    model: Model = None,
) -> None:
    """Find hard negatives for pairs: passages that MODEL and BM25 take for the answer, likely answers left out."""
    try:
        from polyvec.training.mining import mine_file
    except ImportError as error:
        raise MissingExtraError.of("train", "train") from error
    pairs, negatives = mine_file(
        Embedder(model), data, output, count=count, margin=margin, progress=sys.stderr.isatty()
    )
    typer.echo(f"{negatives} negatives for {pairs} pairs in {output}", err=True)


@train_app.command()
@plain_errors
def cases(
    data: Annotated[str, typer.Option(help="File, folder or URL with the kind's columns.")],
    kind: Annotated[
        str,
        typer.Option(
            help="overlap or entities (query, passage), polar (premise, hypothesis, label, lang) or quality "
            "(query, answer, quality)."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL to write: query, passage, negatives.")],
    model: Model = None,
) -> None:
    """Build failure cases from DATA for stage retrieval: what a retriever gets wrong, with the right answer."""
    try:
        from polyvec.training.mining import cases_file
    except ImportError as error:
        raise MissingExtraError.of("train", "train") from error
    count, negatives = cases_file(Embedder(model), data, output, kind=kind)
    typer.echo(f"{count} cases with {negatives} negatives in {output}", err=True)


@train_app.command()
@plain_errors
def tokenizer(
    data: Annotated[list[str], typer.Option(help="File, folder or URL with text and lang; repeat it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="tokenizer.json to write.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces, special ones and bytes included.")] = 40_000,
    characters: Annotated[int, typer.Option(help="Text to learn from, all languages together.")] = 16_000_000,
    smoothing: Annotated[float, typer.Option(help="A language counts by its size to this power.")] = 0.5,
) -> None:
    """Train a Unigram vocabulary, languages balanced, and print how many tokens each language's words take."""
    from dataclasses import asdict

    from polyvec.atomic import check_output, whole_file
    from polyvec.training.vocabulary import balanced_sample, fertility, num_words, read_texts, train_unigram

    if vocab_size < 300 or characters < 1 or not 0 <= smoothing <= 1:
        raise InputError(
            "vocab_size must be at least 300, characters at least 1 and smoothing between 0 and 1, got "
            f"{vocab_size}, {characters} and {smoothing}"
        )
    check_output(output)
    texts = read_texts(data, notice=lambda sentence: typer.echo(sentence, err=True))
    trained = train_unigram(balanced_sample(texts, budget_chars=characters, smoothing=smoothing), vocab_size=vocab_size)
    with whole_file(output) as partial:
        trained.save(str(partial))
    shown = {lang: own[:1000] for lang, own in sorted(texts.items())}
    for lang in [lang for lang, own in shown.items() if not num_words(own)]:
        typer.echo(f"{lang}: left out of the report, got no word in {len(shown.pop(lang))} texts", err=True)
    for language in fertility(trained, shown):
        typer.echo(json.dumps(asdict(language), ensure_ascii=False))
