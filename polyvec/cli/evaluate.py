"""``polyvec evaluate``: scores of models on your own data, with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from polyvec.atomic import check_output, whole_file
from polyvec.cli.common import plain_errors
from polyvec.errors import InputError
from polyvec.files import json_text
from polyvec.inference.engines.opening import ENGINES

if TYPE_CHECKING:
    from polyvec.evaluation.run import Row
    from polyvec.evaluation.systems import System


@plain_errors
def evaluate(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folder in BEIR's layout, or JSONL, CSV, Parquet; KIND=PATH where columns leave a choice; "
            "failure-cases=PATH, needle=PATH, articles=PATH, passkey."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder, hub name, or a peer: st:FOLDER, model2vec:FOLDER, use16, bm25, http://HOST/v1#MODEL; repeat."
        ),
    ] = None,
    dimensions: Annotated[list[int] | None, typer.Option(help="Kept components; repeat it; all if left out.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, float16, int8, binary, ubinary; repeat it.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help=f"{', '.join(ENGINES)}; repeat it.")] = None,
    rope_theta: Annotated[list[float] | None, typer.Option(help="Another base of the positions; repeat it.")] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(help="Measure beside it: task, adapter, prompt, one-adapter, chunking, rescoring, width; repeat."),
    ] = None,
    lang: Annotated[list[str] | None, typer.Option(help="Languages (or sources) of tables; all if left out.")] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="First rows of a language, or queries of a folder; all if 0, or classification.")
    ] = 0,
    mteb: Annotated[list[str] | None, typer.Option(help="Benchmark or task of MTEB, from the hub; repeat it.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of results; a run goes on there.")] = Path(
        "evaluation"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a report in one HTML file.")] = None,
) -> None:
    """Score models on DATA by MTEB's protocols, each text embedded for the task of its kind."""
    from polyvec.evaluation.readers import open_suites
    from polyvec.evaluation.run import comparisons, plan, run_cells
    from polyvec.evaluation.systems import open_system
    from polyvec.evaluation.variants import variants_of

    if not data and not mteb:
        raise InputError("evaluate needs DATA or --mteb, got neither")
    if html is not None:
        check_output(html)
    variants = variants_of(name for name in ablate or () if name != "width")
    suites = [suite for name in data or () for suite in open_suites(name, limit=limit, langs=lang or ())]
    systems: list[System] = []
    for name in model or ["polyvec-mini"]:
        opened = [open_system(name, engine=e) for e in engine or ["auto"]]
        systems += {(s.name, s.engine): s for s in opened}.values()  # a peer has one engine, whatever is asked for
        systems += [open_system(name, rope_theta=theta) for theta in rope_theta or ()]
    if mteb:
        from polyvec.evaluation.mteb import find_tasks, run_mteb

        tasks = [task for name in mteb for task in find_tasks(name)]
        folder = output / "mteb"
        for line in run_mteb(tasks, systems, folder, dimensions=dimensions or [None], dtypes=dtype or ["float32"]):
            typer.echo(line)
    if not suites:
        return
    cells = plan(
        systems, suites, dimensions=dimensions or [None], every_width="width" in (ablate or ()),
        dtypes=dtype or ["float32"], variants=variants,
    )  # fmt: skip
    results = run_cells(cells, output, report=lambda line: typer.echo(line, err=True))
    tests = list(comparisons(results))
    if html is not None:
        from polyvec.evaluation.report import html_report

        with whole_file(html) as partial:
            partial.write_text(html_report(results, tests), encoding="utf-8")
    if json_:
        shown = [{key: value for key, value in row.items() if key != "observations"} for row in results]
        typer.echo(json_text({"results": shown, "comparisons": tests}, indent=2))
        return
    _print(results, tests)


def _print(results: Sequence[Row], tests: Sequence[Row]) -> None:
    from polyvec.evaluation.run import title

    table = Table()
    for heading in ("model", "suite", "metric", "score (95 %)"):
        table.add_column(heading, overflow="fold")  # a name that is cut is no name
    for row in results:
        table.add_row(
            title(row, results).replace(", ", "\n"), f"{row['suite']} {row['group']}".strip(),
            f"{row['kind']}\n{row['metric']}",
            f"{100 * row['score']:.2f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})",
        )  # fmt: skip
    # Names may hold [brackets] and :colons:, which are no markup.
    Console(markup=False, highlight=False, emoji=False).print(table)
    for test in tests:
        suite = f"{test['suite']} {test['group']}".strip()
        span = f"{100 * test['low']:+.2f} to {100 * test['high']:+.2f}"
        typer.echo(
            f"{suite}: {test['second']} minus {test['first']}: {100 * test['difference']:+.2f} ({span}), "
            f"p = {test['p']:.3f}"
        )
