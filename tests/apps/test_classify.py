"""Labels from examples and from names, with probabilities that mean something."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyvec import Embedder
from polyvec.apps.classify import Classifier, calibration_error, decide, make_report, train, zero_shot
from polyvec.apps.cluster import cluster
from polyvec.errors import InputError, MissingExtraError

EXAMPLES = {
    "food": ["Bread needs flour.", "The soup is too salty.", "We cook rice.", "I like apples.", "Cheese and wine."],
    "travel": ["The train is late.", "Our flight was cancelled.", "Where is the bus stop?", "A ticket to Rome.",
               "The hotel by the station."],
    "pets": ["A cat sleeps.", "The dog barks.", "My hamster ran away.", "Feed the rabbit.", "Kittens play."],
}  # fmt: skip
TEXTS = [text for texts in EXAMPLES.values() for text in texts]
LABELS = [label for label, texts in EXAMPLES.items() for _ in texts]


def test_a_few_examples_teach_labels_across_languages(mini: Embedder, tmp_path: Path) -> None:
    classifier, report = train(mini, TEXTS, LABELS)
    vectors = mini.encode(["Der Zug nach Berlin", "Die Katze schläft", "Wir kochen Reis."], task="classification")
    probabilities = classifier.probabilities(vectors)
    assert [label for label, _ in decide(classifier.labels, probabilities, abstain=0)] == ["travel", "pets", "food"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert report.accuracy > 0.6 and np.sum(report.confusion) == 15
    path = str(tmp_path / "c.json")
    classifier.save(path)
    np.testing.assert_array_equal(Classifier.load(path, mini).probabilities(vectors), probabilities)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:-1], "labels must be one per text, got 14 for 15 texts"),
        ([*LABELS[:-1], None], r"labels\[14\] must be a str, got NoneType; convert it or drop its text"),
        ([0] * 8 + [1] * 7, r"labels\[0\] must be a str, got int"),
    ],
)
def test_labels_are_one_str_per_text(mini: Embedder, labels: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(mini, TEXTS, labels)


def test_vectors_of_another_shape_have_no_probabilities(mini: Embedder) -> None:
    classifier = zero_shot(mini, {"pets": "cats", "travel": "trains"})
    for vectors in (np.ones(384, np.float32), np.ones((1, 128), np.float32)):
        with pytest.raises(InputError, match="vectors must be rows of 384 numbers, got .*list of texts"):
            classifier.probabilities(vectors)


def test_two_labels_have_two_probabilities(mini: Embedder) -> None:
    classifier, _ = train(mini, TEXTS[:10], LABELS[:10])
    probabilities = classifier.probabilities(mini.encode(["The bus.", "A cake."], task="classification"))
    assert probabilities.argmax(axis=1).tolist() == [1, 0]


def test_names_alone_are_labels(mini: Embedder) -> None:
    classifier = zero_shot(mini, {"pets": "animals such as cats and dogs", "travel": "trains and flights"})
    vectors = mini.encode(["The dog barks.", "The train is late."], task="classification")
    assert classifier.probabilities(vectors).argmax(axis=1).tolist() == [0, 1]


def test_below_the_threshold_there_is_no_label() -> None:
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9]])
    assert decide(["a", "b"], probabilities, abstain=0.7) == [(None, 0.6), ("b", 0.9)]
    with pytest.raises(InputError, match="abstain must be a probability between 0 and 1, got 70"):
        decide(["a", "b"], probabilities, abstain=70)


def test_calibration_error_and_report_count_what_they_say() -> None:
    probabilities = np.array([[0.8, 0.2]] * 4 + [[0.35, 0.65]])
    truth = np.array([0, 0, 0, 1, 1])
    assert calibration_error(probabilities, truth) == pytest.approx(0.8 * 0.05 + 0.2 * 0.35)
    report = make_report(["a", "b"], probabilities, truth)
    assert report.confusion == [[3, 0], [1, 1]] and report.accuracy == 0.8
    assert "a          0.750   1.000         3" in str(report)


def test_what_cannot_be_learned_or_loaded_is_an_error(embedder: Embedder, mini: Embedder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels must be at least 2 different ones, got 1"):
        train(embedder, ["a", "b"], ["x", "x"])
    with pytest.raises(InputError, match="each label must have at least 2 examples, got 1 for 'y'"):
        train(embedder, ["a", "b", "c"], ["x", "x", "y"])
    with pytest.raises(InputError, match="labels must be at least 2"):
        zero_shot(embedder, {"a": "a"})
    with pytest.raises(InputError, match="description must hold text, got nothing for 'b'"):
        zero_shot(embedder, {"a": "a", "b": " "})
    listed: Any = ["a", "b"]
    with pytest.raises(InputError, match="descriptions must be a dict from labels to texts, got list; give each label"):
        zero_shot(embedder, listed)
    numbered: Any = {"a": "a", "b": 2}
    with pytest.raises(InputError, match="a label and its description must be str, got 'b' and 2"):
        zero_shot(embedder, numbered)
    path = tmp_path / "c.json"
    with pytest.raises(InputError, match="must be a classifier written by polyvec classify train, got FileNotFound"):
        Classifier.load(path, embedder)
    path.write_text(json.dumps({"labels": []}))
    with pytest.raises(InputError, match="must be a classifier written by polyvec classify train, got TypeError"):
        Classifier.load(path, embedder)
    classifier = zero_shot(embedder, {"a": "a", "b": "b"})
    good = asdict(classifier)
    for damage in (
        [], {**good, "weights": good["weights"][:1]}, {**good, "weights": [[1.0], [1.0, 2.0]]}, {**good, "bias": [0.0]},
        {**good, "weights": "ab"}, {**good, "labels": ["a", "a"]}, {**good, "labels": 2}, {**good, "temperature": 0.0},
        {**good, "bias": [0.0, float("nan")]}, {**good, "temperature": "1"}, {**good, "bias": None},
    ):  # fmt: skip
        path.write_text(json.dumps(damage))
        with pytest.raises(InputError, match="must be a classifier written by polyvec classify train, got"):
            Classifier.load(path, embedder)
    path.write_text(json.dumps(good)[:-9])
    with pytest.raises(InputError, match="must be a classifier written by polyvec classify train, got JSONDecodeError"):
        Classifier.load(path, embedder)
    path.write_text(json.dumps({**good, "weights": [[1.0], [2.0]]}))
    with pytest.raises(InputError, match="must hold 32 weights a label, got 1; train it anew"):
        Classifier.load(path, embedder)
    classifier.save(path)
    with pytest.raises(InputError, match="must meet the model that it was trained on, .*got polyvec-mini; use --model"):
        Classifier.load(path, mini)


def test_missing_scikit_learn_is_told_with_the_remedy(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sklearn", "sklearn.cluster", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match="classification needs the extra 'search'"):
        train(embedder, TEXTS, LABELS)
    with pytest.raises(MissingExtraError, match="clustering needs the extra 'search'"):
        cluster(np.eye(3, dtype=np.float32))
