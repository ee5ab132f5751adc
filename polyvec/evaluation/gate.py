"""The gate of a graph: it may lose half a percent of a score on a suite, or is not written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from polyvec.errors import WeightsError
from polyvec.evaluation.suites import Suite, score
from polyvec.evaluation.systems import System, of_embedder
from polyvec.inference.embedder import Embedder
from polyvec.inference.engines import Engine

#: Part of the float32 score that may be lost.
MOST_LOST = 0.005
_CLUSTERINGS = 50  # the mean of ten moves by half a percent when vectors change in their fourth digit


def graph_gate(folder: Path, suites: Sequence[Suite]) -> Callable[[Engine], None]:
    """Return a check that takes the engine of a new graph and scores it beside the float32 weights in ``folder``.

    It raises ``WeightsError`` naming every suite on which the graph loses more than ``MOST_LOST``.
    """

    def check(engine: Engine) -> None:
        embedder = Embedder(folder, engine="torch", device="cpu")
        exact = [_score(of_embedder(embedder, "weights"), suite) for suite in suites]
        embedder.engine = engine
        graph = of_embedder(embedder, "graph")
        lost = {suite.label: (one, _score(graph, suite)) for suite, one in zip(suites, exact, strict=True)}
        told = [f"{name} {a:.4f} to {b:.4f}" for name, (a, b) in lost.items() if a - b > MOST_LOST * abs(a)]
        if told:
            raise WeightsError(
                f"the graph must keep {1 - MOST_LOST:.1%} of every score, got {', '.join(told)}; it was not "
                "written, use fp32"
            )

    return check


def _score(system: System, suite: Suite) -> float:
    assert system.encode is not None
    encode = system.encode
    return score(suite, lambda texts, task: encode(texts, task, system.prompts[task]), clusterings=_CLUSTERINGS).value
