"""Files of every format become texts with pages and headings, or one sentence that says why not."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polyvec.apps.documents import Document, expand, read_documents
from polyvec.errors import InputError, MissingExtraError
from polyvec.text.chunking import passage_spans


def pdf(path: Path, pages: list[str], password: str | None = None) -> None:
    """Write a PDF of one line a page."""
    import pypdf
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = pypdf.PdfWriter()
    for line in pages:
        page = writer.add_blank_page(300, 300)
        font = DictionaryObject(
            {NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1")}
        )
        font[NameObject("/BaseFont")] = NameObject("/Helvetica")
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 200 Td ({line}) Tj ET".encode())
        page[NameObject("/Contents")] = writer._add_object(content)
    if password is not None:
        writer.encrypt(password, algorithm="AES-256")
    writer.write(path)


def places(document: Document) -> list[tuple[str, int | None, str | None]]:
    passages = [document.passage(span) for span in passage_spans(document.text)]
    assert all(document.text[p.start : p.end] == p.text for p in passages)
    return [(p.text, p.page, p.heading) for p in passages]


def test_markdown_has_headings_but_not_in_code(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("First words.\n\n# One ##\n\nText.\n\n```\n# code;\n```\n\n## Two\n\nMore.\n")
    (document,) = read_documents(path)
    assert document.headings == [(14, "One"), (48, "Two")]
    assert [heading for _, _, heading in places(document)] == [None, "One", "One", "Two"]
    assert document.passage((21, 26)).line == 3


def test_html_is_its_visible_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_text(
        "<title>Trains</title><style>p{}</style><script>x()</script><!-- no --><h1>The <b>late</b> train</h1>"
        "<p>To\nBerlin.<br>Sorry.</p><pre>code  here</pre><ul><li>one<li>two</ul>",
    )
    (document,) = read_documents(path)
    assert document.text == "Trains\n\nThe late train\n\nTo Berlin. Sorry.\n\ncode  here\n\none\n\ntwo"
    assert document.headings == [(8, "The late train")]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(b"\xef\xbb\xbf# One\n")
    (document,) = read_documents(path)
    assert (document.text, document.headings) == ("# One\n", [(0, "One")])


def test_html_is_read_in_the_encoding_it_declares(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_bytes('<meta charset="iso-8859-1"><p>Käse</p>'.encode("latin-1"))
    assert next(read_documents(path)).text == "Käse"


def test_docx_has_headings_and_tables(tmp_path: Path) -> None:
    import docx

    file = docx.Document()
    file.add_heading("Router", 1)
    file.add_paragraph("A small box.")
    table = file.add_table(rows=1, cols=2)
    table.cell(0, 0).text, table.cell(0, 1).text = "height", "3 cm"
    file.save(str(tmp_path / "a.docx"))
    (document,) = read_documents(tmp_path / "a.docx")
    assert document.text == "Router\n\nA small box.\n\nheight\t3 cm"
    assert document.headings == [(0, "Router")]


def test_pdf_has_pages(tmp_path: Path) -> None:
    pdf(tmp_path / "a.pdf", ["The train is late.", "A cat sleeps."])
    (document,) = read_documents(tmp_path / "a.pdf")
    assert places(document) == [("The train is late.", 1, None), ("A cat sleeps.", 2, None)]
    pdf(tmp_path / "open.pdf", ["For all eyes."], password="")  # encrypted, but without a password to read
    assert next(read_documents(tmp_path / "open.pdf")).text.strip() == "For all eyes."


def test_rows_of_a_table_are_documents_with_the_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('body,lang\nBread.,en\n ,en\n"Brot.\n\nMehl.",de\n')
    documents = list(read_documents(path, column="body", source="name"))
    assert [(d.text, d.line, d.source, d.metadata) for d in documents] == [
        ("Bread.", 1, "name", {"lang": "en"}),
        ("Brot.\n\nMehl.", 3, "name", {"lang": "de"}),
    ]
    assert documents[1].passage((7, 12)).line == 3  # the row, wherever in its text


def test_bytes_that_are_no_text_are_found_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a " * 100_000 + b"\0")
    with pytest.raises(InputError, match="must be text, got a binary file"):
        list(read_documents(tmp_path / "a.txt"))


def test_a_pipe_is_read_once_and_to_its_limit(tmp_path: Path) -> None:
    def piped(data: bytes, **options: float) -> list[str]:
        os.mkfifo(tmp_path / "pipe")
        with ThreadPoolExecutor(1) as pool:
            pool.submit((tmp_path / "pipe").write_bytes, data)
            try:
                return [document.text for document in read_documents(tmp_path / "pipe", **options)]
            finally:
                (tmp_path / "pipe").unlink()

    assert piped(b"one\r\ntwo") == ["one\ntwo"]
    with pytest.raises(InputError, match="must hold text, got none"):
        piped(b"")
    with pytest.raises(InputError, match=r"must be at most 0\.001 MB, got more"):
        piped(b"one " * 300, max_megabytes=0.001)


def test_the_other_columns_are_texts_in_the_words_of_json(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "Bread.", "old": true, "by": {"a": [1, null]}, "tags": ["ä"], "n": 1.5, "none": null}')
    (document,) = read_documents(path)
    assert document.metadata == {"old": "true", "by": '{"a": [1, null]}', "tags": '["ä"]', "n": "1.5"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "must be a readable file, got: No such file"),
        ("a.txt", b"", "must hold text, got an empty file"),
        ("a.txt", b" \n--\n", "must hold text, got none"),
        ("a.md", b"a\0b", "must be text, got a binary file"),
        ("a.txt", b"a\r\n\ncaf\xe9", r"a\.txt:3 must be UTF-8 text, got byte 0xe9"),
        ("a.txt", b"x" * 2000, r"must be at most 0\.001 MB, got 0"),
        ("a.pdf", b"%PDF-1.4 oops", "must be a whole pdf file, got PdfStreamError"),
        ("a.docx", b"PK oops", "must be a whole docx file, got BadZipFile"),
        ("a.docx", b"\xd0\xcf\x11\xe0 oops", "must be readable without a password, got an encrypted file"),
        ("a.html", b"<p>a\0b</p>", "must be text, got a binary file"),
        ("a.json", b'[{"text": "x"}]', "must be JSON Lines, an object or a text a line"),
        ("a.csv", b"body\nx\n", "must have the column 'text'"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents(path, max_megabytes=0.001))


def test_an_encrypted_pdf_a_scan_and_a_zip_bomb_are_one_sentence(tmp_path: Path) -> None:
    import zipfile

    pdf(tmp_path / "locked.pdf", ["secret"], password="x")
    with pytest.raises(InputError, match="locked.pdf must be readable without a password, got an encrypted file"):
        list(read_documents(tmp_path / "locked.pdf"))
    pdf(tmp_path / "scan.pdf", [""])
    with pytest.raises(InputError, match=r"must hold text, got none \(a scan\?\)"):
        list(read_documents(tmp_path / "scan.pdf"))
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * 3_000_000)
    with pytest.raises(InputError, match="must unfold to at most 1 MB, got 3"):
        list(read_documents(tmp_path / "bomb.docx", max_megabytes=1))


@pytest.mark.parametrize(
    ("module", "name", "what"), [("bs4", "a.html", "HTML"), ("docx", "a.docx", "DOCX"), ("pypdf", "a.pdf", "PDF")]
)
def test_a_missing_parser_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, what: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_text("x")
    with pytest.raises(MissingExtraError, match=rf"^{what} needs the extra 'search'.*pip install 'polyvec\[search\]'"):
        list(read_documents(tmp_path / name))


def test_folders_stand_for_the_readable_files_in_them(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "sub/c.HTML", "photo.png", ".git/d.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [p.name for p in expand([tmp_path], [])] == ["a.txt", "b.md", "c.HTML"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="folder must hold files ending in .txt.*got none"):
        expand([tmp_path / "empty"], [])
