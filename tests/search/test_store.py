"""Vectors and texts in, the nearest out, one commit a source."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from polyvec.errors import InputError, MissingExtraError
from polyvec.search import store as module
from polyvec.search.store import Hit, Passage, Store

STAMP = {"model": "tiny", "weights": "abc", "dimensions": 8, "fingerprint": "f"}


def unit(index: int) -> NDArray[np.float32]:
    return np.eye(8, dtype=np.float32)[index]


def put(store: Store, source: str, texts: list[str], first: int = 0, **fields: object) -> None:
    passages = [Passage(source, 0, len(text), text, **fields) for text in texts]  # type: ignore[arg-type]
    store.write(passages, np.stack([unit(first + i) for i in range(len(texts))]), {source: f"digest of {texts}"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "db", STAMP)
    put(store, "it's.md", ["the red router", "a cat sleeps"], page=2, heading="100% of_it")
    put(store, "b.csv", ["你好世界，路由器"], 2, metadata={"lang": "zh", "by": "a=b'c"})
    return store


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
def test_rows_that_an_update_moves_in_the_middle_of_a_search_are_found(
    store: Store, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    take, updates = store._hits, []

    def take_after_an_update(scores: dict[int, float]) -> list[Hit]:
        if not updates:
            updates.append(put(store, "new.md", ["something else"], 3))
            store.optimize()
        return take(scores)

    monkeypatch.setattr(store, "_hits", take_after_an_update)
    (hit,) = store.search(unit(0), "router", mode=mode, top=1)
    assert hit.passage.text == "the red router"


def test_a_number_of_a_filter_is_as_good_as_its_text(store: Store) -> None:
    assert store.search(None, "router", mode="text", where={"page": 2})
    assert store.search(None, "router", mode="text", where={"page": 2}) == store.search(
        None, "router", mode="text", where={"page": "2"}
    )
    for value in (None, Path("it's.md")):
        with pytest.raises(InputError, match=r"where\['source'\] must be a str or a whole number, got"):
            store.search(None, "router", mode="text", where={"source": value})  # type: ignore[dict-item]


def test_each_mode_finds_its_passage(store: Store) -> None:
    nearest = store.search(unit(1), "router", mode="vector", top=1)[0]
    assert nearest.passage.text == "a cat sleeps" and nearest.score == pytest.approx(1)
    assert [hit.passage.text for hit in store.search(None, "ROUTER", mode="text")] == ["the red router"]
    assert [hit.passage.text for hit in store.search(None, "世界", mode="text")] == ["你好世界，路由器"]
    both = store.search(unit(0), "router")
    assert [hit.score for hit in both] == pytest.approx([1, 0, 0]) and both[0].passage.text == "the red router"


def test_a_hybrid_score_adds_meaning_and_words_by_weight(store: Store) -> None:
    put(store, "c.txt", ["router router"], 3)
    vector = 0.8 * unit(0) + 0.6 * unit(1)  # cosines 0.8 (the red router), 0.6 (a cat sleeps), 0, 0
    words = {hit.passage.text: hit.score for hit in store.search(None, "router", mode="text")}
    share = words["the red router"] / words["router router"]
    found = {hit.passage.text: hit.score for hit in store.search(vector, "router", weight=0.4)}
    expected = {"the red router": 0.4 + 0.6 * share, "router router": 0.6, "a cat sleeps": 0.4 * 0.75}
    assert {text: found[text] for text in expected} == pytest.approx(expected, abs=1e-5)
    for weight, mode in ((0, "text"), (1, "vector")):
        alone = store.search(vector, "router", mode=mode, top=1)[0].passage
        assert store.search(vector, "router", weight=weight, top=1)[0].passage == alone
    nothing = store.search(vector, "nowhere", top=2)
    assert [hit.passage.text for hit in nothing] == ["the red router", "a cat sleeps"]


def test_a_passage_comes_back_as_it_was(store: Store) -> None:
    hit = store.search(unit(2), "", mode="vector", top=1)[0]
    assert hit.passage == Passage("b.csv", 0, 8, "你好世界，路由器", metadata={"lang": "zh", "by": "a=b'c"})


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ({"source": "it's.md"}, 2),
        ({"source": "*.md"}, 2),
        ({"source": "_.csv"}, 0),
        ({"page": "2"}, 2),
        ({"page": "2", "source": "b*"}, 0),
        ({"heading": "100% of_it"}, 2),
        ({"heading": "100* of_it"}, 2),
        ({"heading": "% of it"}, 0),
        ({"lang": "zh"}, 1),
        ({"by": "a=b'c"}, 1),
        ({"lang": "de') OR true OR array_has(metadata, '"}, 0),
    ],
)
def test_filters_keep_what_has_the_value(store: Store, where: dict[str, str], count: int) -> None:
    assert len(store.search(unit(0), "", mode="vector", where=where)) == count


def test_a_source_is_replaced_moved_and_removed_whole(store: Store) -> None:
    put(store, "it's.md", ["only one now"])
    assert len(store) == 2
    store.move("it's.md", "c.md")
    assert set(store.sources()) == {"c.md", "b.csv"}
    store.remove(["c.md"])
    assert list(store.sources()) == ["b.csv"]


def test_many_passages_get_an_approximate_index_that_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EXACT_ROWS", 500)
    vectors = np.random.default_rng(0).normal(size=(600, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    store = Store(tmp_path / "db", {**STAMP, "dimensions": 64})
    store.write([Passage("a", i, i + 1, f"word{i}") for i in range(600)], vectors, {"a": "d"})
    exact = store.search(vectors[5], "word7", mode="vector")
    store.optimize()
    assert store._has_index("head")
    found = store.search(vectors[5], "", mode="vector")
    assert [hit.passage.text for hit in found[:2]] == [hit.passage.text for hit in exact[:2]]
    assert found[1].score == pytest.approx(exact[1].score, abs=1e-6)  # of the float32 vectors
    assert {hit.passage.text for hit in store.search(vectors[5], "word7", top=2)} == {"word5", "word7"}
    store.write([Passage("b", 0, 1, "later")], -vectors[5:6], {"b": "d"})
    later = store.search(-vectors[5], "", mode="vector", top=1)[0]  # not yet in the index, found all the same
    assert later.passage.text == "later"


def test_a_store_is_found_again_with_its_stamp(tmp_path: Path, store: Store) -> None:
    store.optimize()
    again = Store(tmp_path / "db")
    assert again.stamp == STAMP and len(again) == 3
    again.check_stamp(STAMP)
    with pytest.raises(InputError, match="the model that made it, tiny .*use --model tiny with 8 dimensions"):
        again.check_stamp({**STAMP, "model": "other", "fingerprint": "g"})
    with pytest.raises(InputError, match=r"got tiny \(abc, 8 dimensions\); index into a new database"):
        again.check_stamp({**STAMP, "fingerprint": "g"})  # of other weights by the same name


def test_a_store_of_other_columns_or_another_dtype_is_an_error(tmp_path: Path, store: Store) -> None:
    with pytest.raises(InputError, match="must keep its dtype, float32, got int8; leave --dtype out"):
        store.check_stamp({**STAMP, "dtype": "int8"})
    store._table.drop_columns(["page"])
    with pytest.raises(InputError, match="must have the columns of this version of polyvec"):
        Store(tmp_path / "db")


def test_what_is_no_store_is_an_error(tmp_path: Path, store: Store) -> None:
    with pytest.raises(InputError, match="database must be one that polyvec made, got none"):
        Store(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(InputError, match="database must be one that polyvec made"):
        Store(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="must be a folder or a URL"):
        Store(tmp_path / "file", STAMP)
    with pytest.raises(InputError, match="mode must be one of hybrid, vector, text, got 'both'"):
        store.search(unit(0), "x", mode="both")
    with pytest.raises(InputError, match="top must be at least 1"):
        store.search(unit(0), "x", top=0)
    with pytest.raises(InputError, match="weight must be between 0, words alone, and 1, meaning alone, got 2"):
        store.search(unit(0), "x", weight=2)
    with pytest.raises(InputError, match=r"page must be a whole number below 2\^31, got 'two'"):
        store.search(unit(0), "x", where={"page": "two"})


def test_stores_that_are_made_and_written_at_once_are_one(tmp_path: Path) -> None:
    def make(source: str) -> None:
        store = Store(tmp_path / "db", STAMP)
        put(store, source, ["a text"])
        put(store, "common", ["one", "two"])
        store.optimize()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make, "abcd"))
    store = Store(tmp_path / "db")
    assert set(store.sources()) == {*"abcd", "common"} and len(store) == 6


@pytest.mark.parametrize("kind", ["data", "_versions"])
def test_a_damaged_store_is_one_sentence(tmp_path: Path, store: Store, kind: str) -> None:
    for path in (tmp_path / "db" / "passages.lance" / kind).iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"must be whole.*, got: .*[^/\d]; if files .* index into a new database"):
        Store(tmp_path / "db").search(unit(0), "router")


def test_a_missing_database_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(MissingExtraError, match=r"an index needs the extra 'search'.*pip install 'polyvec\[search\]'"):
        Store(tmp_path / "db", STAMP)
