"""The paper's figures, where its weights are (``POLYVEC_JINA_V3=FOLDER``) and MTEB's data, by hub or cache."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # mteb and datasets warn of their own dependencies
    pytest.mark.skipif(
        "POLYVEC_JINA_V3" not in os.environ,
        reason="POLYVEC_JINA_V3 names no folder with the published jina-embeddings-v3 weights (CC-BY-NC-4.0)",
    ),
]
FIGURES = json.loads((Path(__file__).parents[1] / "golden/jina_v3_paper.json").read_text())
TOLERANCE = 0.5  # points: versions of mteb and of its data moved more than arithmetic does


@pytest.fixture(scope="module")
def model() -> Iterator[object]:
    from polyvec.evaluation.mteb import MtebModel

    yield MtebModel(os.environ["POLYVEC_JINA_V3"], engine="torch")


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "source"])
def test_a_task_scores_as_published(name: str, model: object) -> None:
    import mteb

    from polyvec.evaluation.mteb import find_tasks

    (task,) = find_tasks(name)
    task.filter_languages(["eng"])
    try:
        task.load_data()
    except Exception as error:  # whatever the hub's client raises without a network
        pytest.skip(f"the data of {name} is not at hand: {type(error).__name__}")
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)  # type: ignore[arg-type]
    assert 100 * result.task_results[0].get_score() == pytest.approx(FIGURES[name], abs=TOLERANCE)
