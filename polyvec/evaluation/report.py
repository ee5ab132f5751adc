"""Results as one HTML file that needs no other: tables, and plots as SVG inside it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np

from polyvec.errors import MissingExtraError
from polyvec.evaluation.run import Row, title

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } .scroll { overflow-x: auto } svg { max-width: 100%; height: auto }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap }
caption { font-size: 1.5em; font-weight: bold; text-align: left; margin: 1rem 0 .5rem }
"""


def html_report(results: Sequence[Row], tests: Sequence[Row]) -> str:
    """Return the page: every suite, languages as a heat map, quality against size, length and time, and all numbers."""
    with _readers_fonts():
        # A name between two dollars is no formula.
        plots = _plots(
            [{**r, **{key: r[key].replace("$", r"\$") for key in ("model", "suite", "group")}} for r in results]
        )
    score_rows = [
        [
            title(r, results), f"{r['suite']} {r['group']}", f"{r['kind']}, {r['metric']}", f"{100 * r['score']:.2f}",
            f"{100 * r['low']:.2f} to {100 * r['high']:.2f}", str(r["bytes_per_vector"] or ""),
            f"{r['texts_per_second']:.0f}" if r["texts_per_second"] else "", _tasks(r), r["engine"],
            r["stamp"]["weights"],
        ]
        for r in results
    ]  # fmt: skip
    test_rows = [
        [
            f"{t['second']} minus {t['first']}", f"{t['suite']} {t['group']}",
            f"{100 * t['difference']:+.2f}", f"{100 * t['low']:+.2f} to {100 * t['high']:+.2f}", f"{t['p']:.3f}",
        ]
        for t in tests
    ]  # fmt: skip
    head = [
        "model", "suite", "metric", "score", "95 % interval", "bytes", "texts/s", "adapters and prompts", "engine",
        "weights",
    ]  # fmt: skip
    parts = [
        "<h1>Evaluation</h1>",
        "<p>Scores times 100; intervals by bootstrap over queries, pairs or texts. A blank speed: vectors were made "
        "already for another row.</p>",
        *plots,
        _table("All scores", head, score_rows),
    ]
    if test_rows:
        parts.append(_table("Paired tests", ["difference", "suite", "points", "95 % interval", "p"], test_rows))
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _plots(results: Sequence[Row]) -> list[str]:
    return [
        _by_suite(results),
        _by_language(results),
        _curves(
            "Quality against dimensions", "kept components", results, lambda r: r["dimensions"],
            lambda r: f"{_system(r, results)}, {r['kind']}, {r['dtype']}",
        ),
        _curves(
            "Quality against bytes", "bytes of a text's vectors", results, lambda r: r["bytes_per_vector"],
            lambda r: f"{_system(r, results)}, {r['kind']}, {r['dtype']}",
        ),
        _curves(
            "Quality against length", "tokens of a document", results, lambda r: r["num_tokens"],
            lambda r: f"{title(r, results)}, {r['suite']} {r['group'].removesuffix(str(r['num_tokens'])).strip()}",
        ),
        _by_time(results),
    ]  # fmt: skip


@contextmanager
def _readers_fonts() -> Iterator[None]:
    """Leave the letters of plots to the fonts of who reads the page: matplotlib's have none of half the scripts."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError.of("the HTML report", "evaluate") from error
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _system(row: Row, results: Sequence[Row]) -> str:
    """Return ``title`` without the vectors."""
    return title({**row, "dimensions": 0}, results)


def _tasks(row: Row) -> str:
    tasks = row["stamp"]["tasks"]
    told = [f"{t['adapter'] or 'base'}{' with prompt' if t['prompt'] else ''}" for t in tasks]
    return " | ".join(dict.fromkeys(told))


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = f"<tr>{top}</tr>" + "".join(f"<tr>{row}</tr>" for row in cells)
    # The focus lets a keyboard scroll what is wider than the window.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        f"<table><caption>{caption}</caption>{body}</table></div>"
    )


def _by_suite(results: Sequence[Row]) -> str:
    """Bars of each suite's mean over its languages; the interval only where a suite is of one part."""
    suites = sorted({(r["kind"], r["suite"]) for r in results})
    systems = list(dict.fromkeys(title(r, results) for r in results))
    figure, axes = _figure(9, 1.2 + 0.28 * len(suites) * len(systems))
    height = 0.8 / len(systems)
    for j, system in enumerate(systems):
        label: str | None = system  # once, at the first bar that there is
        for i, suite in enumerate(suites):
            own = [r for r in results if title(r, results) == system and (r["kind"], r["suite"]) == suite]
            if not own:
                continue
            mean = float(np.mean([r["score"] for r in own]))
            arms = None
            if len(own) == 1:  # clipped: an interval of resamples can lie beside the score itself
                arms = 100 * np.maximum([[mean - own[0]["low"]], [own[0]["high"] - mean]], 0)
            axes.barh(
                i + j * height, 100 * mean, height, color=f"C{j % 10}", label=label, xerr=arms, capsize=2,
            )  # fmt: skip
            label = None
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(suites))], [f"{s}\n({k})" for k, s in suites])
    axes.invert_yaxis()
    axes.set_xlabel("score x 100")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.25 if len(suites) * len(systems) < 4 else -0.1), frameon=False)
    return _picture("By suite", figure)


def _by_language(results: Sequence[Row]) -> str:
    grouped = [r for r in results if r["group"]]
    columns = list(dict.fromkeys((r["suite"], r["group"]) for r in grouped))
    systems = list(dict.fromkeys(title(r, results) for r in grouped))
    if len(columns) < 2:
        return ""
    values = np.full((len(columns), len(systems)), np.nan)
    for r in grouped:
        values[columns.index((r["suite"], r["group"])), systems.index(title(r, results))] = 100 * r["score"]
    figure, axes = _figure(3 + 1.6 * len(systems), 1.5 + 0.26 * len(columns))
    axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="black" if value > 60 else "white")
    axes.set_yticks(range(len(columns)), [f"{s} {g}" for s, g in columns])
    axes.set_xticks(range(len(systems)), [s.replace(", ", "\n") for s in systems])
    axes.xaxis.tick_top()
    return _picture("By language", figure)


def _curves(
    heading: str,
    label: str,
    results: Sequence[Row],
    place: Callable[[Row], int],
    series: Callable[[Row], str],
) -> str:
    """Mean scores against a number of the rows, a line for each name that ``series`` gives; 0 is no number."""
    rows = [r for r in _comparable(results) if place(r)]
    if len({place(r) for r in rows}) < 2:
        return ""
    figure, axes = _figure(9, 4.5)
    for name in dict.fromkeys(map(series, rows)):
        own = [r for r in rows if series(r) == name]
        places = sorted(set(map(place, own)))
        means = [100 * float(np.mean([r["score"] for r in own if place(r) == at])) for at in places]
        axes.plot(places, means, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel(label)
    axes.set_ylabel("score x 100")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _picture(heading, figure)


def _by_time(results: Sequence[Row]) -> str:
    """Mean score of a kind against the time of a text; rows whose vectors were there already took none."""
    rows = [r for r in _comparable(results) if r["texts_per_second"]]
    names = list(dict.fromkeys(f"{_system(r, results)}, {r['kind']}" for r in rows))
    if len({_system(r, results) for r in rows}) < 2:
        return ""
    figure, axes = _figure(9, 4.5)
    for name in names:
        own = [r for r in rows if f"{_system(r, results)}, {r['kind']}" == name]
        milliseconds = float(np.mean([1000 / r["texts_per_second"] for r in own]))
        axes.plot(milliseconds, 100 * float(np.mean([r["score"] for r in own])), "o", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds a text")
    axes.set_ylabel("score x 100")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _picture("Quality against time", figure)


def _comparable(results: Sequence[Row]) -> list[Row]:
    """Return the rows of suites that every model has which has one of the kind: means over others do not compare."""
    models: dict[str, set[str]] = {}
    of_suite: dict[tuple[str, str, str], set[str]] = {}
    for r in results:
        models.setdefault(r["kind"], set()).add(r["model"])
        of_suite.setdefault((r["kind"], r["suite"], r["group"]), set()).add(r["model"])
    return [r for r in results if of_suite[r["kind"], r["suite"], r["group"]] == models[r["kind"]]]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))  # no pyplot: it would keep every figure and look for a screen
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _picture(heading: str, figure: Any) -> str:
    buffer = io.StringIO()
    # The metadata of matplotlib names its web site; a page with none of it asks for nothing outside.
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") + 4 :]
    return f'<h2>{heading}</h2><svg role="img" aria-label="{heading}; the numbers are in the tables below"{svg}'
