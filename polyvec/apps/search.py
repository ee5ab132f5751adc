"""Search in files without an index: late-chunked passages, ranked by the retrieval pair of adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from polyvec.errors import InputError
from polyvec.files import TABLE_SUFFIXES, expand, read_records, read_text
from polyvec.inference.embedder import Embedder
from polyvec.streams import paired
from polyvec.text.chunking import passage_spans


@dataclass(frozen=True)
class Document:
    """A text and where it came from: a file, and the line or row on which it begins."""

    source: str
    line: int
    text: str


@dataclass(frozen=True)
class Hit:
    """A passage with its cosine to the query: characters ``start`` to ``end`` of a document, from ``line`` on."""

    score: float
    document: Document
    start: int
    end: int

    @property
    def text(self) -> str:
        return self.document.text[self.start : self.end]

    @property
    def line(self) -> int:
        return self.document.line + self.document.text.count("\n", 0, self.start)


def read_documents(paths: Iterable[Path], *, column: str = "text") -> Iterator[Document]:
    """Yield each text file as a document, and each row of a table (JSONL, CSV, Parquet) as one."""
    for path in expand(paths):
        if path.suffix.lower() in TABLE_SUFFIXES:
            for number, record in enumerate(read_records(path, column=column), start=1):
                yield Document(str(path), number, record[column])
        else:
            yield Document(str(path), 1, read_text(path))


def search(
    embedder: Embedder,
    query: str,
    documents: Iterable[Document],
    *,
    top: int = 5,
    dimensions: int | None = None,
    progress: bool = False,
) -> list[Hit]:
    """Return the ``top`` passages of ``documents`` nearest to ``query``, best first.

    Every passage is embedded with its document around it, so that "it" and "there" mean something.
    """
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    if not query.strip():
        raise InputError("query must hold text, got nothing; say what to look for")
    question = embedder.encode(query, task="retrieval.query", dimensions=dimensions)
    hits: list[Hit] = []
    encode = partial(
        embedder.encode_stream, task="retrieval.passage", dimensions=dimensions, late_chunking=passage_spans,
        progress=progress,
    )  # fmt: skip
    for document, embedding in paired(documents, lambda document: document.text, encode):
        assert embedding.chunks is not None
        scores = embedding.chunks.vectors @ question
        for i in np.argsort(-scores, kind="stable")[:top]:
            start, end = embedding.chunks.spans[i]
            hits.append(Hit(float(scores[i]), document, start, end))
        hits = sorted(hits, key=lambda hit: -hit.score)[:top]
    return hits


def highlights(query: str, text: str) -> list[tuple[int, int]]:
    """Return spans of ``text`` that share a word with ``query``: whole words of three letters or more, any case."""
    words = {w for w in re.findall(r"\w+", query.casefold()) if len(w) > 2}
    return [m.span() for m in re.finditer(r"\w+", text) if m[0].casefold() in words]
