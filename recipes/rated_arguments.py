"""Answers rated by people, for the failure case of quality: from a corpus of compared arguments.

    git clone https://github.com/UKPLab/acl2016-convincing-arguments CORPUS
    python -m recipes.rated_arguments CORPUS rated.jsonl
    polyvec train cases --kind quality --data rated.jsonl -o quality.jsonl

UKPConvArg1 (Habernal and Gurevych, ACL 2016, https://aclanthology.org/P16-1150; CC BY 4.0) holds arguments to both
sides of 16 debates, and for 11,650 pairs of one side the one that people found more convincing. An argument's quality
is the part of its pairs that it won.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import typer

from polyvec.atomic import whole_file
from polyvec.errors import InputError
from polyvec.files import Record

_PAIRS = "data/UKPConvArg1Strict-XML"


def main(
    corpus: Annotated[Path, typer.Argument(help="The corpus, as cloned.")],
    output: Annotated[Path, typer.Argument(help="JSONL with query, answer and quality.")],
) -> None:
    """Write the arguments with their question and quality."""
    files = sorted((corpus / _PAIRS).glob("*.xml"))
    if not files:
        raise InputError(f"{corpus} must hold {_PAIRS}/*.xml, got none; clone the corpus whole")
    rows = [row for file in files for row in rated(file)]
    with whole_file(output) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    typer.echo(f"{len(rows)} answers to {len({row['query'] for row in rows})} questions")


def rated(file: Path) -> Iterator[Record]:
    """Yield the arguments to one side of a debate, which together are one question."""
    won, seen, texts = Counter[str](), Counter[str](), dict[str, str]()
    pairs = ElementTree.parse(file).getroot()
    query = f"{pairs.findtext('*/debateMetaData/title', '')} {pairs.findtext('*/arg1/stance', '')}".strip()
    for pair in pairs:
        names = {place: pair.findtext(f"{place}/id", "") for place in ("arg1", "arg2")}
        seen.update(names.values())
        won[names["arg1" if pair.findtext("goldLabel") == "a1" else "arg2"]] += 1
        texts |= {name: " ".join(pair.findtext(f"{place}/text", "").split()) for place, name in names.items()}
    for name, text in texts.items():
        yield {"query": query, "answer": text, "quality": won[name] / seen[name]}


if __name__ == "__main__":
    typer.run(main)
