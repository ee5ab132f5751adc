"""Files of many formats as documents: their text, and where in it pages and headings begin.

A file that cannot be read whole is one ``InputError`` that says why.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import warnings
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from polyvec.errors import InputError, MissingExtraError, PolyvecError
from polyvec.files import JSON_SUFFIX, TABLE_SUFFIXES, TEXT_SUFFIXES, as_text, decode_text, read_records
from polyvec.search.store import Passage
from polyvec.text.chunking import Span

MAX_MEGABYTES = 100  # of a file, and of what a compressed one unfolds to

_BLOCKS = (
    "address", "article", "aside", "blockquote", "body", "caption", "dd", "div", "dl", "dt", "fieldset", "figcaption",
    "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p",
    "pre", "section", "table", "td", "th", "tr", "title", "ul",
)  # fmt: skip
_BETWEEN = "\n\n"  # passages never cross an empty line
_OLE_MAGIC = b"\xd0\xcf\x11\xe0"  # of an encrypted office file, which hides its zip in one


@dataclass(frozen=True)
class Document:
    """A text and where it came from: a file, and the line or row on which it begins.

    ``pages`` are the characters at which the pages begin, ``headings`` the headings with theirs, both in order. With
    ``is_row`` it is a row of a table, and the number of the row is the line of all its passages.
    """

    source: str
    line: int
    text: str
    pages: Sequence[int] = ()
    headings: Sequence[tuple[int, str]] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    is_row: bool = False

    def passage(self, span: Span) -> Passage:
        """Return the characters of ``span`` with their line, page and heading."""
        start, end = span
        before = bisect_right(self.headings, start, key=lambda heading: heading[0])
        return Passage(
            source=self.source,
            start=start,
            end=end,
            text=self.text[start:end],
            line=self.line if self.is_row else self.line + self.text.count("\n", 0, start),
            page=bisect_right(self.pages, start) or None,
            heading=self.headings[before - 1][1] if before else None,
            metadata=self.metadata or None,
        )


def read_documents(
    path: Path, *, column: str = "text", max_megabytes: float = MAX_MEGABYTES, source: str | None = None
) -> Iterator[Document]:
    """Yield the documents of a file: each row of a table (JSONL, CSV, Parquet) is one, any other file is one.

    ``source`` is the name they carry, the path if left out. Raises ``InputError`` for a file that is missing,
    encrypted, empty, binary, not UTF-8, damaged, or larger than ``max_megabytes``.
    """
    name = source or str(path)
    suffix = path.suffix.lower()
    try:
        found_file = path.stat()
    except OSError as error:
        raise InputError(f"{path} must be a readable file, got: {error.strerror or error}") from error
    size = found_file.st_size
    if size > max_megabytes * 1e6:
        raise InputError(f"{path} must be at most {max_megabytes:g} MB, got {size / 1e6:.0f}; see --max-megabytes")
    if size == 0 and stat.S_ISREG(found_file.st_mode):  # the size of a pipe says nothing
        raise InputError(f"{path} must hold text, got an empty file")
    found = False
    if suffix in (*TABLE_SUFFIXES, JSON_SUFFIX):
        for number, record in enumerate(read_records(path, column=column), start=1):
            if _has_words(record[column]):
                found = True
                rest = {key: as_text(value) for key, value in record.items() if key != column and value is not None}
                yield Document(name, number, record[column], metadata=rest, is_row=True)
    else:
        reader = _READERS.get(suffix, _read_plain)
        try:
            text, pages, headings = reader(path, max_megabytes)
        except (PolyvecError, MemoryError):
            raise
        except Exception as error:  # what parsers raise on damaged files has no common base
            raise InputError(
                f"{path} must be a whole {suffix[1:]} file, got {type(error).__name__}: {error}"
            ) from error
        if _has_words(text):
            found = True
            yield Document(name, 1, text, pages, headings)
    if not found:
        hint = " (a scan?)" if suffix == ".pdf" else ""
        raise InputError(f"{path} must hold text, got none{hint}")


def expand(paths: Iterable[Path], failed: list[str]) -> list[Path]:
    """Return the files of ``paths``, folders replaced by the files in them that polyvec reads, in order of name.

    Hidden files and folders inside a folder are left out. A folder that cannot be listed adds a sentence to ``failed``.
    Raises ``InputError`` for a folder that has no such file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            errors: list[OSError] = []  # rglob would keep them to itself
            found = sorted(p for p in _visible(path, errors) if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found and not errors:
                raise InputError(f"folder must hold files ending in {', '.join(SUFFIXES)}, got none in {path}")
            files += found
            failed += [f"{e.filename} must be a readable folder, got: {e.strerror or e}" for e in errors]
        else:
            files.append(path)
    return files


def _has_words(text: str) -> bool:
    return any(map(str.isalnum, text))


def _visible(folder: Path, errors: list[OSError]) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


#: A text, the characters at which its pages begin, and its headings with theirs.
_Parsed = tuple[str, Sequence[int], Sequence[tuple[int, str]]]


def _read_plain(path: Path, max_megabytes: float) -> _Parsed:
    return decode_text(_bytes_of_text(path, max_megabytes), str(path)), (), ()


def _bytes_of_text(path: Path, max_megabytes: float) -> bytes:
    """Return the bytes of a file, which are read once: it may be a pipe."""
    with path.open("rb") as file:
        data = file.read(int(max_megabytes * 1e6) + 1)
    if len(data) > max_megabytes * 1e6:
        raise InputError(f"{path} must be at most {max_megabytes:g} MB, got more; see --max-megabytes")
    if b"\0" in data:
        raise InputError(f"{path} must be text, got a binary file")
    return data


def _read_markdown(path: Path, max_megabytes: float) -> _Parsed:
    text = _read_plain(path, max_megabytes)[0]
    headings = []
    is_code = False
    position = 0
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith(("```", "~~~")):
            is_code = not is_code
        elif not is_code and (match := re.match(r" {0,3}#{1,6}[ \t]+(.*?)[ \t#]*$", line.rstrip("\r\n"))):
            headings.append((position, match[1]))
        position += len(line)
    return text, (), headings


def _read_html(path: Path, max_megabytes: float) -> _Parsed:
    try:
        from bs4 import BeautifulSoup
        from bs4.element import NavigableString
    except ImportError as error:
        raise MissingExtraError.of("HTML", "search") from error
    data = _bytes_of_text(path, max_megabytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its guesses at what else the file could be
        soup = BeautifulSoup(data, "html.parser")
    for line_break in soup.find_all("br"):
        line_break.replace_with("\n")
    # Comments and the content of scripts and styles are strings of other types.
    strings = [s for s in soup.find_all(string=True) if type(s) is NavigableString and not s.find_parent("template")]
    builder = _TextBuilder()
    for _, group in groupby(strings, key=lambda string: id(string.find_parent(_BLOCKS))):
        run = list(group)
        block = run[0].find_parent(_BLOCKS)
        text = "".join(run)
        if run[0].find_parent("pre") is None:
            text = re.sub(r"\s+", " ", text).strip()
        builder.add(text, is_heading=block is not None and bool(re.fullmatch("h[1-6]", block.name)))
    return builder.parsed()


def _read_docx(path: Path, max_megabytes: float) -> _Parsed:
    try:
        import docx
    except ImportError as error:
        raise MissingExtraError.of("DOCX", "search") from error
    with path.open("rb") as file:
        if file.read(4) == _OLE_MAGIC:
            raise InputError(f"{path} must be readable without a password, got an encrypted file")
    with zipfile.ZipFile(path) as archive:
        unfolded = sum(entry.file_size for entry in archive.infolist())
    if unfolded > max_megabytes * 1e6:
        raise InputError(f"{path} must unfold to at most {max_megabytes:g} MB, got {unfolded / 1e6:.0f}")
    builder = _TextBuilder()
    for item in docx.Document(str(path)).iter_inner_content():
        if isinstance(item, docx.table.Table):
            for row in item.rows:
                builder.add("\t".join(cell.text for cell in row.cells))
        else:
            style = item.style.name if item.style is not None else ""
            builder.add(item.text, is_heading=bool(re.match(r"Heading \d|Title$", style or "")))
    return builder.parsed()


def _read_pdf(path: Path, max_megabytes: float) -> _Parsed:
    try:
        import pypdf
    except ImportError as error:
        raise MissingExtraError.of("PDF", "search") from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it repairs is no news to the user
    with path.open("rb") as file:
        reader = pypdf.PdfReader(file)
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(f"{path} must be readable without a password, got an encrypted file")
        text = ""
        pages = []
        for page in reader.pages:
            pages.append(len(text))
            text += page.extract_text() + _BETWEEN
            if len(text) > max_megabytes * 1e6:
                raise InputError(f"{path} must unfold to at most {max_megabytes:g} MB, got more")
    return text, pages, ()


class _TextBuilder:
    """A text that grows block by block, with an empty line between two, and knows where its headings begin."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._length = 0
        self._headings: list[tuple[int, str]] = []

    def add(self, text: str, *, is_heading: bool = False) -> None:
        """Append a block, unless it is blank."""
        if not text.strip():
            return
        if is_heading:
            self._headings.append((self._length, " ".join(text.split())))
        self._blocks.append(text)
        self._length += len(text) + len(_BETWEEN)

    def parsed(self) -> _Parsed:
        return _BETWEEN.join(self._blocks), (), self._headings


_READERS: dict[str, Callable[[Path, float], Any]] = {
    ".md": _read_markdown,
    ".markdown": _read_markdown,
    ".html": _read_html,
    ".htm": _read_html,
    ".docx": _read_docx,
    ".pdf": _read_pdf,
}

#: Ends of the names that are read in folders.
SUFFIXES = tuple(dict.fromkeys((*TEXT_SUFFIXES, *_READERS, *TABLE_SUFFIXES)))
