"""Search in files without an index: late-chunked passages, ranked by the retrieval pair of adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial

import numpy as np

from polyvec.apps.documents import Document
from polyvec.errors import InputError
from polyvec.inference.embedder import Embedder
from polyvec.search.store import Hit
from polyvec.streams import paired
from polyvec.text.chunking import passage_spans


def search(
    embedder: Embedder,
    query: str,
    documents: Iterable[Document],
    *,
    top: int = 5,
    dimensions: int | None = None,
    progress: bool = False,
) -> list[Hit]:
    """Return the ``top`` passages of ``documents`` nearest to ``query`` with their cosines, best first.

    Every passage is embedded with its document around it, so that "it" and "there" mean something.
    """
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    check_query(query)
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
            hits.append(Hit(float(scores[i]), document.passage(embedding.chunks.spans[i])))
        hits = sorted(hits, key=lambda hit: -hit.score)[:top]
    return hits


def check_query(query: str) -> None:
    """Raise ``InputError`` for a query that is no text, or holds none."""
    if not isinstance(query, str):
        raise InputError(f"query must be a str, got {type(query).__name__}; ask one question at a time")
    if not query.strip():
        raise InputError("query must hold text, got nothing; say what to look for")


def highlights(query: str, text: str) -> list[tuple[int, int]]:
    """Return spans of ``text`` that share a word with ``query``: whole words of three letters or more, any case."""
    words = {w for w in re.findall(r"\w+", query.casefold()) if len(w) > 2}
    return [m.span() for m in re.finditer(r"\w+", text) if m[0].casefold() in words]
