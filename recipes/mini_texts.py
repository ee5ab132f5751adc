"""What polyvec-mini learns from: texts, each with the text whose teacher's vector it is to have.

A text learns the vector of its English translation where it has one, else its own. Consecutive parts of a document
stand one after the other, so that any run of them is a longer text, which learns the mean of its parts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from polyvec.data.filters import overlaps
from polyvec.files import Record
from polyvec.text.chunking import passage_spans

#: Languages that the multilingual teacher reads (arXiv 1907.04307), by their names in the data.
TAUGHT_LANGUAGES = frozenset("ar de en es fr it ja ko nl pl pt pt-BR ru th tr zh zh-CN zh-TW".split())
#: How often a source is drawn against its size: interface strings are many, short and formulaic.
SOURCE_WEIGHTS = {
    "tatoeba": 2.0, "odoo": 0.6, "libreoffice-help": 0.7, "ms-edgeai-beginners": 0.5, "ms-iot-beginners": 0.5,
    "debian-descriptions": 0.5,
}  # fmt: skip
MAX_CHARACTERS = 300  # of a translated text; longer ones are nearly all of one source, courses translated by machine
PART_CHARACTERS = 500  # of a document's parts and of a passage: the teachers read 256 tokens
SMOOTHING = 0.6  # a language is drawn in proportion to its texts to this power
ENGLISH_SHARE = 0.25  # of the draws; at a tenth, English similarity fell by 3.5 points (docs/experiments.md)
SMALLEST_CLASS = 20  # texts; the smaller ones of the news are lines that were cut in the wrong place
#: What the labels of a source tell.
LABELS = {"clinc150": "intents", "banking77": "intents", "masakhanews": "topics", "wisesight": "opinions"}
_WORD = re.compile(r"[^\W\d_]{2}")


@dataclass
class _Texts:
    """Columns under way; ``place`` finds the number of a text that has a vector of its own."""

    text: list[str] = field(default_factory=list)
    lang: list[str] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    target: list[int] = field(default_factory=list)  # number of the text whose vector this one learns
    document: list[int] = field(default_factory=list)  # -1 outside documents
    place: dict[str, int] = field(default_factory=dict)

    def add(self, text: str, lang: str, source: str, *, target: int | None = None, document: int = -1) -> None:
        number = len(self.text)
        if target is None:
            target = self.place.setdefault(text, number)
            if target != number and document < 0:
                return  # there already
        self.text.append(text)
        self.lang.append(lang)
        self.source.append(source)
        self.target.append(target)
        self.document.append(document)


def choose(data: Path) -> pa.Table:
    """Return the table of texts: text, lang, target, document and weight, the odds of a draw."""
    texts = _Texts()
    for number, row in enumerate(_rows(data, "text")):
        if row["lang"] in TAUGHT_LANGUAGES and row["source"] != "common-voice":
            spans = passage_spans(row["text"], PART_CHARACTERS)
            parts = [row["text"][start:end][: 2 * PART_CHARACTERS] for start, end in spans]
            for part in parts:
                texts.add(part, row["lang"], row["source"], document=number)
        elif row["lang"] in TAUGHT_LANGUAGES and _WORD.search(row["text"]):
            texts.add(row["text"], row["lang"], row["source"])
    for row in _rows(data, "pairs"):
        if row["lang"] in TAUGHT_LANGUAGES:
            texts.add(row["query"], row["lang"], row["source"])
            texts.add(row["passage"][:PART_CHARACTERS], row["lang"], row["source"])
    for row in _rows(data, "sts"):
        for side in ("text_a", "text_b"):
            texts.add(row[side], row["lang"], row["source"])
    for row in _rows(data, "classification"):
        if row["lang"] in TAUGHT_LANGUAGES:
            texts.add(row["text"][:PART_CHARACTERS], row["lang"], row["source"])
    parallel = [r for r in _rows(data, "parallel") if len(r["en"]) <= MAX_CHARACTERS and _WORD.search(r["en"])]
    for row in parallel:
        texts.add(row["en"], "en", row["source"])
    for row in parallel:
        texts.add(row["text"], row["lang"], row["source"], target=texts.place[row["en"]])
    return pa.table(
        {
            "text": texts.text, "lang": texts.lang, "target": pa.array(texts.target, pa.int32()),
            "document": pa.array(texts.document, pa.int32()),
            "weight": pa.array(_weights(texts.lang, texts.source), pa.float32()),
        }
    )  # fmt: skip


def _weights(langs: list[str], sources: list[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the odds of each text: of its language by ``SMOOTHING``, of its source, and English apart."""
    sizes = Counter(langs)
    weights = np.array(
        [
            SOURCE_WEIGHTS.get(source, 1.0) * sizes[lang] ** (SMOOTHING - 1)
            for lang, source in zip(langs, sources, strict=True)
        ]
    )
    is_english = np.array(langs) == "en"
    weights[is_english] *= ENGLISH_SHARE / weights[is_english].sum()
    weights[~is_english] *= (1 - ENGLISH_SHARE) / weights[~is_english].sum()
    return weights


def search_pairs(data: Path) -> Iterator[Record]:
    """Yield pairs of groups that have 300, and a quarter of the package descriptions, which are formulaic."""
    rows = [
        r
        for i, r in enumerate(_rows(data, "pairs"))
        if not overlaps(r["query"], r["passage"]) and (r["source"] != "debian-descriptions" or i % 4 == 0)
    ]
    sizes = Counter((r["lang"], r["source"]) for r in rows)
    yield from (r for r in rows if sizes[r["lang"], r["source"]] >= 300)


def translations(data: Path) -> Iterator[Record]:
    """Yield English sentences with a translation, of languages that have 1,000: of each 2,000 at most."""
    rows = [r for r in _rows(data, "parallel") if 30 < len(r["en"]) <= MAX_CHARACTERS]
    seen: Counter[str] = Counter()
    sizes = Counter(r["lang"] for r in rows)
    for i in np.random.default_rng(0).permutation(len(rows)).tolist():
        lang = rows[i]["lang"]
        if sizes[lang] >= 1000 and seen[lang] < 2000:
            seen[lang] += 1
            yield {"text_a": rows[i]["en"], "text_b": rows[i]["text"], "lang": lang}


def labelled(data: Path) -> tuple[dict[str, list[Record]], list[Record]]:
    """Return labelled texts by what their labels tell, and those that stay out, to measure on: every fifth of the
    sources that have no development set."""
    rows = _rows(data, "classification")
    sizes = Counter((row["source"], row["lang"], row["label"]) for row in rows)
    seen: Counter[str] = Counter()
    kept: dict[str, list[Record]] = {kind: [] for kind in LABELS.values()}
    held_out: list[Record] = []
    for row in rows:
        if sizes[row["source"], row["lang"], row["label"]] < SMALLEST_CLASS:
            continue
        seen[row["source"]] += 1
        stays_out = row["source"] != "clinc150" and seen[row["source"]] % 5 == 0
        (held_out if stays_out else kept[LABELS[row["source"]]]).append(row)
    return kept, held_out


def _rows(data: Path, name: str) -> list[Record]:
    rows: list[Record] = pq.read_table(data / f"train/{name}.parquet").to_pylist()
    return rows
