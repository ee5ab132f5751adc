"""A small corpus of our own, one text in each of many languages, and questions in other languages (CC0)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from polyvec.files import Record, read_records

FOLDER = Path(str(files("polyvec") / "samples"))


def corpus() -> list[Record]:
    """Return the texts: ``id``, ``lang``, ``text``."""
    return list(read_records(FOLDER / "corpus.jsonl"))


def questions() -> list[Record]:
    """Return the questions: ``lang``, ``text``, and ``answer``, the id of the text that answers it."""
    return list(read_records(FOLDER / "questions.jsonl"))
