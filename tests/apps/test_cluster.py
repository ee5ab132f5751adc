"""Groups that are there by construction are found, named and drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyvec.apps.cluster import NOISE, cluster, name_clusters, project, write_map
from polyvec.errors import InputError
from polyvec.inference.quantize import unit

RNG = np.random.default_rng(0)
CENTRES = np.eye(16, dtype=np.float32)[:3]
TRUTH = np.repeat([0, 1, 2], [12, 9, 6])
VECTORS = unit((CENTRES[TRUTH] + 0.02 * RNG.normal(size=(27, 16))).astype(np.float32))


@pytest.mark.parametrize("num_clusters", [3, None])
def test_planted_groups_are_found_largest_first(num_clusters: int | None) -> None:
    order = RNG.permutation(27)
    np.testing.assert_array_equal(cluster(VECTORS[order], num_clusters=num_clusters), TRUTH[order])


def test_what_is_near_no_other_is_noise() -> None:
    found = cluster(np.concatenate((VECTORS, np.eye(16, dtype=np.float32)[10:12])))
    assert found[-2:].tolist() == [NOISE, NOISE]


def test_a_name_is_made_of_words_that_the_others_lack() -> None:
    texts = ["the router is slow", "the router is red", "the cat is slow", "the cat is red", "今天天气", "天气很好"]
    names = name_clusters(texts, np.array([0, 0, 1, 1, 2, 2]))
    assert [name.split(", ")[0] for name in names] == ["router", "cat", "天气"]
    assert name_clusters(["1 2", "3"], np.array([0, NOISE])) == ["cluster 0"]
    listed: Any = [0, 0, 1, 1, 2, 2]
    assert name_clusters(texts, listed) == names
    for other in (np.array([0, 0, 1]), np.zeros(6), np.zeros((6, 1), int)):
        with pytest.raises(InputError, match="clusters must be one whole number per text, got .* for 6 texts; pass"):
            name_clusters(texts, other)


def test_a_name_has_no_stop_words_of_any_language() -> None:
    texts = [
        "Where is the order that I have made?", "I have not got the order", "The order is not there, is it?",
        "Der Zug ist nicht da und wir warten", "Wo ist der Zug und wann kommt er?",
        "Der Zug ist weg, und das ist nicht gut",
        "les pommes sont dans le panier", "il y a des pommes dans la cuisine", "le gâteau est avec des pommes",
    ]  # fmt: skip
    assert [name.split(", ")[0] for name in name_clusters(texts, np.repeat([0, 1, 2], 3))] == ["order", "zug", "pommes"]
    words = {word for name in name_clusters(texts, np.repeat([0, 1, 2], 3)) for word in name.split(", ")}
    assert not words & {"the", "have", "not", "der", "ist", "und", "nicht", "les", "dans", "des"}
    assert name_clusters(["this is the and", "this is the and"], np.array([0, 0])) != ["cluster 0"]


def test_a_map_keeps_neighbours_and_holds_any_text(tmp_path: Path) -> None:
    places = project(VECTORS)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (TRUTH[distances.argmin(axis=1)] == TRUTH).all() and np.abs(places).max() == pytest.approx(1)
    path = tmp_path / "map.html"
    texts = ["</script><b>oops", *["x" * 1000] * 2]
    write_map(str(path), texts, VECTORS[:3], TRUTH[:3], ["a & b"])
    with pytest.raises(InputError, match="must be as many, got 2, 3 and 3"):
        write_map(path, texts[:2], VECTORS[:3], TRUTH[:3], ["a"])
    page = path.read_text(encoding="utf-8")
    assert page.count("</script>") == 1 and "http" not in page
    match = re.search(r"= (\{.*\});\n", page)
    assert match is not None
    data = json.loads(match[1])
    assert data["points"][0][2:] == [0, "</script><b>oops"] and len(data["points"][1][3]) == 300


def test_numbers_that_cannot_be_are_errors() -> None:
    with pytest.raises(InputError, match="clusters must be between 1 and the number of texts, 27, got 28"):
        cluster(VECTORS, num_clusters=28)
    with pytest.raises(InputError, match="min_size must be between 2 and the number of texts, 27, got 1"):
        cluster(VECTORS, min_size=1)
