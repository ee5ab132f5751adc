"""The documentation is true: every block of code runs, the site builds, and every command and error is in it.

The blocks of a page run in order in one empty directory. A comment on the line before a block says what else it is:

    <!-- not run: REASON -->   one of the reasons below
    <!-- serves -->            a command that runs until the end of the page
    <!-- a run -->             what polyvec train reads
    <!-- output -->            what the block before it prints, figures apart
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from polyvec import Embedder
from polyvec.apps.documents import read_documents
from polyvec.apps.index import Index
from polyvec.errors import InputError
from polyvec.samples import corpus
from polyvec.training.run import read_run
from tests.conftest import free_port

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LANGUAGES = {"bash", "python", "toml", "json", "text"}
REASONS = {
    "installs",
    "other weights",
    "minutes",
    "a corpus and a cluster",
    "an hour, or many GPUs",
    "from the clone",
    "Slurm",
    "two machines",
    "a collector",
}
_BLOCK = re.compile(r"(?:^<!-- ([^\n]+) -->\n)?^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PIP = "pip() { :; }\n"  # what pip would install is here already


@dataclass(frozen=True)
class Block:
    note: str
    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(m[1] or "", m[2], m[3]) for m in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


PAGES_WITH_CODE = [page for page in PAGES if any(b.language in ("bash", "python") for b in blocks_of(page))]


class Page:
    """A page on its way: its directory, its names, the server it has started, what was printed last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, object] = {"__name__": "page"}
        self.printed = ""
        self.server: subprocess.Popen[str] | None = None
        self.port = str(free_port())
        self.environment = {
            **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "POLYVEC_PORT": self.port,
            "COLUMNS": "120",
        }  # fmt: skip

    def bash(self, code: str) -> None:
        command = ["bash", "-euo", "pipefail", "-c", _PIP + code.replace("localhost:8080", f"localhost:{self.port}")]
        result = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
        self.printed = result.stdout

    def python(self, code: str) -> None:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.chdir(self.folder)
            exec(compile(code, "a block of the page", "exec"), self.names)
        self.printed = printed.getvalue()

    def serve(self, code: str) -> None:
        self.server = subprocess.Popen(code.split(), cwd=self.folder, env=self.environment, stderr=subprocess.DEVNULL)
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{self.port}/ready").close()
                return
            time.sleep(0.1)
        raise AssertionError(f"{code} did not answer in 30 s")


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    page = Page(tmp_path)
    monkeypatch.setenv("POLYVEC_URL", f"http://localhost:{page.port}")
    yield page
    if page.server is not None:
        page.server.terminate()
        assert page.server.wait(30) in (0, -signal.SIGTERM)  # having answered what was in flight


@pytest.mark.filterwarnings("default")  # other packages' deprecations are not ours to raise
@pytest.mark.parametrize("path", PAGES_WITH_CODE, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs(path: Path, page: Page) -> None:
    if path.name == "README.md":
        write_files_of_a_reader(page.folder)
    for block in blocks_of(path):
        kind, _, value = block.note.partition(": ")
        if kind == "not run":
            assert value in REASONS
        elif kind == "output":
            assert without_figures(page.printed) == without_figures(block.code)
        elif kind == "serves":
            page.serve(block.code)
        elif kind == "a run":
            (page.folder / "run.toml").write_text(block.code)
            assert read_run(str(page.folder / "run.toml"), {}).steps
        elif block.language == "bash":
            page.bash(block.code)
        elif block.language == "python":
            page.python(block.code)


def without_figures(text: str) -> str:
    """Cosines differ in their last digits between the two graphs; which texts, and in which order, does not."""
    return re.sub(r"\d+\.\d*", "#", text).strip()


def write_files_of_a_reader(folder: Path) -> None:
    """The README speaks of files of the reader's own: these are some."""
    texts = [row["text"] for row in corpus()]
    (folder / "docs").mkdir()
    (folder / "docs" / "router.md").write_text(f"# Router\n\n{texts[0]}\n")
    (folder / "notes.csv").write_text("body\n" + "".join(f'"{t.replace(chr(34), "")}"\n' for t in texts[:5]))
    (folder / "english.txt").write_text("The train is late.\n")
    (folder / "german.txt").write_text("Der Zug hat Verspätung.\n")
    (folder / "all.csv").write_text("text\nThe train is late.\nThe train is late!\n")
    labelled = "text,label\n" + "".join(f"train number {i},train\nfresh bread number {i},bread\n" for i in range(6))
    for name in ("mine.csv", "new.csv", "tickets.csv"):
        (folder / name).write_text(labelled)
    pairs = [{"query": t.split()[0] + f" {i}", "passage": t} for i, t in enumerate(texts[:8])]
    for name in ("mine.jsonl", "pairs.jsonl"):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_block_says_what_it_is(path: Path) -> None:
    blocks = blocks_of(path)
    assert {block.language for block in blocks} <= LANGUAGES
    assert len(re.findall("^```", path.read_text(encoding="utf-8"), re.MULTILINE)) == 2 * len(blocks)


def test_every_extra_that_the_docs_name_exists() -> None:
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named = {extra for page in PAGES for extra in re.findall(r"'(?:\.|polyvec)\[(\w+)\]'", page.read_text())}
    assert {"search", "serve", "train"} <= named <= extras


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_builds_and_asks_no_other_server(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]+src="?(https?://[^">\s]+)', text)
        loaded += re.findall(r'<link[^>]+rel="?(?:stylesheet|preconnect|icon)[^>]*href="?(https?://[^">\s]+)', text)
        assert not loaded, page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?https?://", style.read_text(encoding="utf-8")), style


def test_every_command_and_option_is_in_the_site(site: Path) -> None:
    text = (site / "commands" / "index.html").read_text(encoding="utf-8")
    for sign in ("polyvec train adapter", "--abstain", "--max-megabytes", "--queue-tokens", "POLYVEC_", "--where"):
        assert sign in text


def test_an_error_is_found_in_the_site(site: Path, mini: Embedder, tmp_path: Path) -> None:
    """Real errors, provoked: their fixed words are on the page, in that order."""
    text = (site / "troubleshooting" / "index.html").read_text(encoding="utf-8")
    sentences = re.findall(r"<li>\s*<code>(.*?)</code>", text)
    assert len(sentences) > 150
    known = [".+".join(map(re.escape, re.split("<[^>]*>", html.unescape(sentence)))) for sentence in sentences]
    (tmp_path / "empty.txt").write_text("")
    for provoke in (
        lambda: mini.encode("x", task="retrieval"),
        lambda: mini.encode("x", dimensions=999),
        lambda: mini.encode("x", late_chunking=[(0, 9)]),
        lambda: mini.encode(["x"], task=["classification"] * 2),
        lambda: Embedder(engine="fast"),
        lambda: Index(tmp_path / "none", mini),
        lambda: list(read_documents(tmp_path / "empty.txt")),
        lambda: list(read_documents(tmp_path / "missing.txt")),
    ):
        with pytest.raises(InputError) as caught:
            provoke()
        assert any(re.fullmatch(pattern, str(caught.value)) for pattern in known), caught.value
