"""Texts in groups: the separation adapter, k-means or HDBSCAN, and names from the groups' own words.

Shape letters: B texts, D width, C clusters.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.atomic import whole_file
from polyvec.errors import InputError, MissingExtraError

Vectors = NDArray[np.float32]
Clusters = NDArray[np.int64]

TASK = "separation"

#: The cluster of a text that belongs to none.
NOISE = -1

_DENSITY_WIDTH = 15  # components for HDBSCAN, which finds no dense places in hundreds
_MAP_TEXTS = 5000  # drawn at most: t-SNE takes seconds for these, and a screen shows no more
_LABEL_WORDS = 3
_WORD = re.compile(r"[^\W\d_]{3,}")
_ANY_WORD = re.compile(r"[^\W\d_]+")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]+")  # Thai to Han


def cluster(vectors: Vectors, *, num_clusters: int | None = None, min_size: int = 5) -> Clusters:
    """Return the cluster of each of the unit vectors (B, D), numbered from the largest.

    With ``num_clusters``, k-means: every text is in one. Without, HDBSCAN finds their number: clusters have at least
    ``min_size`` texts, and what is near no other is ``NOISE``. The same input gives the same clusters.
    """
    try:
        from sklearn.cluster import HDBSCAN, KMeans
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise MissingExtraError.of("clustering", "search") from error
    if num_clusters is not None:
        if not 1 <= num_clusters <= len(vectors):
            raise InputError(f"clusters must be between 1 and the number of texts, {len(vectors)}, got {num_clusters}")
        found = KMeans(num_clusters, n_init=4, random_state=0).fit_predict(vectors)
    else:
        if not 2 <= min_size <= len(vectors):
            raise InputError(f"min_size must be between 2 and the number of texts, {len(vectors)}, got {min_size}")
        width = min(_DENSITY_WIDTH, *vectors.shape)
        reduced = PCA(width, random_state=0).fit_transform(vectors)
        found = HDBSCAN(min_cluster_size=min_size, copy=True).fit_predict(reduced)
    sizes = Counter(found[found != NOISE].tolist())
    number = {old: new for new, (old, _) in enumerate(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))}
    return np.array([number.get(int(old), NOISE) for old in found], dtype=np.int64)


def name_clusters(texts: Sequence[str], clusters: Clusters) -> list[str]:
    """Return a name for each of the C clusters: the words that are frequent in it and rare in the others.

    Class-based TF-IDF (Grootendorst, arXiv 2203.05794, section 3.3), counting a word once a text, without the stop
    words of the text's language. Raises ``InputError`` unless there is one cluster per text.
    """
    clusters = np.asarray(clusters)
    if clusters.shape != (len(texts),) or clusters.dtype.kind != "i":
        raise InputError(
            f"clusters must be one whole number per text, got {clusters.dtype} {clusters.shape} for "
            f"{len(texts)} texts; pass what cluster gives for their vectors"
        )
    counts = [Counter[str]() for _ in range(int(clusters.max(initial=NOISE)) + 1)]
    everywhere = Counter[str]()
    for text, number in zip(texts, clusters, strict=True):
        words = _content_words(text)
        everywhere.update(words)
        if number != NOISE:
            counts[number].update(words)
    average = sum(everywhere.values()) / max(len(counts), 1)

    def weight(word: str, count: int) -> float:
        return count * math.log(1 + average / everywhere[word])

    names = []
    for number, own in enumerate(counts):
        best = sorted(own, key=lambda word: (-weight(word, own[word]), word))[:_LABEL_WORDS]
        names.append(", ".join(best) or f"cluster {number}")
    return names


def _words(text: str) -> set[str]:
    text = text.casefold()
    spaced = _WORD.findall(_UNSPACED.sub(" ", text))
    # Scripts without spaces: every two neighbours, which finds most words without a dictionary.
    pairs = (run[i : i + 2] for run in _UNSPACED.findall(text) for i in range(len(run) - 1))
    return {*spaced, *pairs}


def _content_words(text: str) -> set[str]:
    """Return the words of ``text`` without the stop words of its language: the one with most of them in it."""
    own = _words(text)
    every = set(_ANY_WORD.findall(text.casefold()))  # two letters tell a language too
    stop = max(_stop_words(), key=lambda words: len(every & words))
    # One stop word alone may be a word of another language. Where all are stop words, they are what there is.
    return own - stop or own if len(every & stop) >= 2 else own


@cache
def _stop_words() -> list[frozenset[str]]:
    """Return the stop words of each language with spaces between words (recipes/stop_words.py)."""
    text = (files("polyvec") / "apps" / "stop_words.json").read_text(encoding="utf-8")
    return [frozenset(words) for words in json.loads(text).values()]


def project(vectors: Vectors) -> NDArray[np.float32]:
    """Return (B, 2) places on a map where near texts are near: t-SNE from principal components, in -1 to 1."""
    from sklearn.manifold import TSNE

    if len(vectors) < 4:  # too few for a neighbourhood
        return np.stack((np.linspace(-1, 1, len(vectors)), np.zeros(len(vectors))), axis=1).astype(np.float32)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)
    places -= (places.max(axis=0) + places.min(axis=0)) / 2
    return np.asarray(places / max(float(np.abs(places).max()), 1e-9), dtype=np.float32)


def write_map(
    path: str | Path, texts: Sequence[str], vectors: Vectors, clusters: Clusters, names: Sequence[str]
) -> None:
    """Write a page that needs no other file: the texts as points, coloured by cluster, to read under the pointer.

    Beyond 5000 texts it shows as many, drawn at random. Raises ``InputError`` unless each has a vector and a cluster.
    """
    if not len(texts) == len(vectors) == len(clusters):
        raise InputError(
            f"texts, vectors and clusters must be as many, got {len(texts)}, {len(vectors)} and {len(clusters)}"
        )
    shown = np.arange(len(texts))
    if len(shown) > _MAP_TEXTS:
        shown = np.sort(np.random.default_rng(0).choice(shown, _MAP_TEXTS, replace=False))
    places = project(vectors[shown])
    points: list[list[Any]] = [
        [round(float(x), 4), round(float(y), 4), int(clusters[i]), texts[i][:300]]
        for i, (x, y) in zip(shown.tolist(), places, strict=True)
    ]
    data = json.dumps({"points": points, "names": list(names)}, ensure_ascii=False)
    data = data.replace("<", "\\u003c")  # no text can close the script that holds it
    page = (files("polyvec") / "apps" / "map.html").read_text(encoding="utf-8")
    with whole_file(Path(path)) as partial:
        partial.write_text(page.replace("__DATA__", data), encoding="utf-8")
