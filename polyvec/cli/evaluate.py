"""``polyvec evaluate``: scores of models on your own data, with their uncertainty."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from polyvec.atomic import whole_file
from polyvec.cli.common import EngineName, plain_errors


@plain_errors
def evaluate(
    data: Annotated[
        list[str],
        typer.Argument(help="Folder in BEIR's layout, or JSONL, CSV, Parquet; KIND=PATH where columns leave a choice."),
    ],
    model: Annotated[
        list[str] | None, typer.Option(help="Folder, hub name or st:FOLDER (sentence-transformers); repeat it.")
    ] = None,
    dimensions: Annotated[list[int] | None, typer.Option(help="Kept components; repeat it; all if left out.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, float16, int8, binary, ubinary; repeat it.")] = None,
    no_task: Annotated[bool, typer.Option("--no-task", help="Measure beside it without adapter and prompt.")] = False,
    limit: Annotated[int, typer.Option(help="First rows read of each language of a table; 0 reads all.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of results; a run goes on there.")] = Path(
        "evaluation"
    ),
    json_: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a report in one HTML file.")] = None,
    engine: EngineName = "auto",
) -> None:
    """Score models on DATA by MTEB's protocols, each text embedded for the task of its kind."""
    from polyvec.evaluation.readers import read_suites
    from polyvec.evaluation.run import comparisons, plan, run_cells
    from polyvec.evaluation.systems import open_system

    suites = []
    for text in data:
        kind, equals, path = text.partition("=")
        suites += read_suites(Path(path if equals else text), kind=kind if equals else None, limit=limit)
    systems = [open_system(name, engine=engine) for name in model or ["polyvec-mini"]]
    cells = plan(
        systems, suites, dimensions=dimensions or [None], dtypes=dtype or ["float32"],
        adapters=(True, False) if no_task else (True,),
    )  # fmt: skip
    results = run_cells(cells, output, report=lambda line: typer.echo(line, err=True))
    tests = list(comparisons(results))
    if html is not None:
        from polyvec.evaluation.report import html_report

        with whole_file(html) as partial:
            partial.write_text(html_report(results, tests), encoding="utf-8")
    if json_:
        shown = [{key: value for key, value in row.items() if key != "observations"} for row in results]
        typer.echo(json.dumps({"results": shown, "comparisons": tests}, indent=2, ensure_ascii=False))
        return
    table = Table("model", "suite", "metric", "vectors", "score (95 %)")
    for row in results:
        table.add_row(
            row["model"] + ("" if row["adapter"] else "\nno task"), f"{row['suite']} {row['group']}".strip(),
            f"{row['kind']}\n{row['metric']}", f"{row['dimensions']} {row['dtype']}",
            f"{100 * row['score']:.2f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for test in tests:
        suite = f"{test['suite']} {test['group']}".strip()
        span = f"{100 * test['low']:+.2f} to {100 * test['high']:+.2f}"
        vectors = f"{test['dimensions'][1]} {test['dtype']}"
        console.print(
            f"{test['second']} - {test['first']} on {suite}, {vectors}: {100 * test['difference']:+.2f} ({span}), "
            f"p = {test['p']:.3f}"
        )
