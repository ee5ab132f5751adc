"""Every example runs, with the package that it is about, and finds the answer across languages."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("with_*.py"))


@pytest.mark.filterwarnings("default")  # other packages' deprecations are not ours to raise
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_finds_the_answer(path: Path) -> None:
    main = runpy.run_path(str(path))["main"]
    texts = ["The train is late.", "A cat sleeps on the chair.", "Bread needs flour."]
    assert main(texts, "Wo schläft die Katze?") == texts[1]
