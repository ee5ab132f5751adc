"""Folders of files as a database of passages that follows them: new, changed, moved and deleted files.

A file is the unit: it is in the database whole, as it was read last, or not at all.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.apps.documents import MAX_MEGABYTES, Document, expand, read_documents
from polyvec.apps.search import check_query
from polyvec.errors import InputError
from polyvec.files import are_unicode
from polyvec.inference.embedder import Embedder
from polyvec.search.parts import check_dtype
from polyvec.search.store import WEIGHT, Hit, Passage, Store
from polyvec.text.chunking import passage_spans

_READER = b"4"  # a new number when files are read or cut in a new way: then all of them are read again
_GROUP_CHARACTERS = 500_000  # files that are embedded and committed together; a crash loses at most one such group


@dataclass
class Report:
    """What an update did, in files. ``failed`` has one sentence for each file or folder that could not be read."""

    added: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ("added", "changed", "moved", "removed", "unchanged")
        parts = [f"{getattr(self, name)} {name}" for name in counts if getattr(self, name)]
        return ", ".join([*parts, *([f"{len(self.failed)} not read"] if self.failed else [])]) or "nothing"


@dataclass(frozen=True)
class _File:
    """A file that is new or has new content."""

    path: Path
    source: str
    digest: str
    documents: list[Document]


class Index:
    """A database of passages with the model that made it.

    ``location`` is a folder or the URL of object storage. ``create=True`` makes an empty database where there is none,
    with vectors of ``dimensions``, all if left out, stored as ``dtype``: float32, float16, int8 or binary. Raises
    ``InputError`` for a database of another model, width or dtype.
    """

    def __init__(
        self,
        location: str | Path,
        embedder: Embedder,
        *,
        dimensions: int | None = None,
        dtype: str | None = None,
        create: bool = False,
    ) -> None:
        if dtype is not None:
            check_dtype(dtype)
        self.embedder = embedder
        self.store = Store(location, _stamp(embedder, dimensions, dtype or "float32") if create else None)
        self.store.check_stamp(_stamp(embedder, dimensions or self.store.dimensions, dtype or self.store.dtype))

    def __repr__(self) -> str:
        return f"<Index {self.store.location}: {len(self.store)} passages of {self.embedder.model_name}>"

    def update(
        self,
        paths: Iterable[str | Path],
        *,
        column: str = "text",
        max_megabytes: float = MAX_MEGABYTES,
        progress: bool = False,
    ) -> Report:
        """Bring the database up to date with ``paths``, files and folders, and say what changed.

        Files are told apart by the hash of their content. One that cannot be read is reported; what the database holds
        of it from before stays. Passages of files that ``paths`` name, or that lay in folders they name, and that are
        gone are removed.
        """
        if isinstance(paths, (str, os.PathLike)):  # whose letters would be paths too, and "/" is one of them
            raise InputError(f"paths must be a list of files and folders, got {paths!r} alone; put it into a list")
        report = Report()
        roots = [Path(path) for path in paths]
        names = tuple(source_name(root) for root in roots)
        known = self.store.sources()
        found: dict[str, Path] = {}
        for root in roots:
            try:
                if root.exists() or not any(_is_below(source, (source_name(root),)) for source in known):
                    found.update({source_name(path): path for path in expand([root], report.failed)})
            except InputError as error:  # a folder without files, which may be news
                if not any(_is_below(source, (source_name(root),)) for source in known):
                    report.failed.append(str(error))
        for source in [source for source in found if not are_unicode([source])]:
            report.failed.append(f"{ascii(str(found.pop(source)))} must be a name in UTF-8, got other bytes; rename it")
        gone = {s for s in known if s not in found and _is_below(s, names) and _is_gone(s)}
        pending: list[tuple[str, Path, str]] = []
        moves: list[tuple[str, str]] = []
        by_digest = {known[source]: source for source in gone}
        for source, path in found.items():
            if path.exists() and not path.is_file():
                report.failed.append(f"{path} must be a file that can be read again, got a pipe; save it in a file")
                continue
            try:
                digest = _digest(path, column)
            except OSError as error:
                report.failed.append(f"{path} must be a readable file, got: {error.strerror or error}")
                continue
            if known.get(source) == digest:
                report.unchanged += 1
            elif source not in known and digest in by_digest:
                old = by_digest.pop(digest)
                gone.discard(old)
                moves.append((old, source))
            else:
                pending.append((source, path, digest))
        for old, new in moves:
            self.store.move(old, new)
        self.store.remove(gone)
        report.moved, report.removed = len(moves), len(gone)
        with _Bar(progress, len(pending)) as bar:
            for group in self._groups(pending, column, max_megabytes, report):
                self._add(group, known, report)
                bar.reach(report.added + report.changed + len(report.failed))
        self.store.optimize()
        return report

    def search(
        self,
        query: str,
        *,
        mode: str = "hybrid",
        top: int = 10,
        where: Mapping[str, str | int] | None = None,
        weight: float = WEIGHT,
    ) -> list[Hit]:
        """Return the ``top`` passages that answer ``query``, best first.

        ``mode`` is ``vector`` (meaning, across languages), ``text`` (words, BM25) or ``hybrid`` (both, ``weight`` parts
        of meaning to 1 - ``weight`` of words). ``where`` keeps passages of one ``source`` or ``heading`` (``*`` stands
        for anything), ``page``, or value of another column of a table.
        """
        check_query(query)
        vector = None
        if mode != "text":
            vector = self.embedder.encode(query, task="retrieval.query", dimensions=self.store.dimensions)
        return self.store.search(vector, query, mode=mode, top=top, where=where, weight=weight)

    def _groups(
        self, pending: Iterable[tuple[str, Path, str]], column: str, max_megabytes: float, report: Report
    ) -> Iterator[list[_File]]:
        group: list[_File] = []
        characters = 0
        for source, path, digest in pending:
            try:
                documents = list(read_documents(path, column=column, max_megabytes=max_megabytes, source=source))
            except InputError as error:
                report.failed.append(str(error))
                continue
            group.append(_File(path, source, digest, documents))
            characters += sum(len(document.text) for document in documents)
            if characters > _GROUP_CHARACTERS:
                yield group
                group, characters = [], 0
        if group:
            yield group

    def _add(self, group: list[_File], known: Mapping[str, str], report: Report) -> None:
        try:
            passages, vectors = self._embed(group)
        except InputError as error:
            if len(group) == 1:
                report.failed.append(f"{group[0].path} must be text that can be embedded, got: {error}")
            else:  # the others of the group are fine: each alone
                for file in group:
                    self._add([file], known, report)
            return
        self.store.write(passages, vectors, {file.source: file.digest for file in group})
        for file in group:
            if file.source in known:
                report.changed += 1
            else:
                report.added += 1

    def _embed(self, group: list[_File]) -> tuple[list[Passage], NDArray[np.float32]]:
        documents = [document for file in group for document in file.documents]
        width = self.store.dimensions
        chunked = self.embedder.encode(
            [document.text for document in documents], task="retrieval.passage", dimensions=width,
            late_chunking=passage_spans,
        )  # fmt: skip
        passages = [d.passage(span) for d, chunks in zip(documents, chunked, strict=True) for span in chunks.spans]
        vectors = np.concatenate([np.empty((0, width), np.float32), *(chunks.vectors for chunks in chunked)])
        return passages, vectors


def _stamp(embedder: Embedder, dimensions: int | None, dtype: str) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "model": embedder.model_name,
        "weights": embedder.weights_hash,
        "dimensions": dimensions or embedder.config.hidden_size,
        "fingerprint": embedder.fingerprint(task="retrieval.passage", dimensions=dimensions),
    }


def source_name(path: Path) -> str:
    """Return the name of a file in the database: absolute, so that it is one from wherever the command runs."""
    return Path(os.path.abspath(path)).as_posix()


def _is_below(source: str, roots: tuple[str, ...]) -> bool:
    return any(source == root or source.startswith(root.rstrip("/") + "/") for root in roots)


def _is_gone(source: str) -> bool:
    """Whether there is no such file any longer. One that is not found may lie in a folder that cannot be read, or have
    a name that is read only where it is asked for; one that is found under a name of other case is another source."""
    folder, name = os.path.split(source)
    try:
        return not stat.S_ISREG(os.stat(source).st_mode) or name not in os.listdir(folder)
    except OSError as error:
        return isinstance(error, (FileNotFoundError, NotADirectoryError))


def _digest(path: Path, column: str) -> str:
    digest = hashlib.sha256(_READER + path.suffix.lower().encode() + b"\0" + column.encode() + b"\0")
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Bar:
    """Files done, on stderr, or nothing."""

    def __init__(self, is_shown: bool, total: int) -> None:
        self._progress: Any = None
        if is_shown and total:
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True))
            self._task = self._progress.add_task("indexing", total=total)

    def __enter__(self) -> _Bar:
        if self._progress:
            self._progress.start()
        return self

    def reach(self, count: int) -> None:
        if self._progress:
            self._progress.update(self._task, completed=count)

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
