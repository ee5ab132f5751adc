"""``python -m polyvec.samples``: questions in several languages find texts in many others."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from polyvec.inference.embedder import Embedder
from polyvec.samples import corpus, questions


def main() -> None:
    """Embed the corpus once, every question once, and print the best text for each."""
    embedder = Embedder()
    texts, asked = corpus(), questions()
    passages = embedder.encode([row["text"] for row in texts], task="retrieval.passage")
    queries = embedder.encode([row["text"] for row in asked], task="retrieval.query")
    scores = queries @ passages.T  # (questions, texts) cosines
    languages = len({row["lang"] for row in texts})
    table = Table(title=f"{len(asked)} questions to {len(texts)} texts in {languages} languages", show_lines=True)
    for name in ("question", "best text", "cosine", "answer ranks"):
        table.add_column(name, overflow="fold")
    places = []
    for row, cosines in zip(asked, scores, strict=True):
        order = np.argsort(-cosines)
        place = [texts[i]["id"] for i in order].index(row["answer"]) + 1
        places.append(place)
        best = texts[order[0]]
        table.add_row(
            f"[{row['lang']}] {row['text']}".replace("[", r"\["),
            f"[{best['lang']}] {best['text']}".replace("[", r"\["),
            f"{cosines[order[0]]:.2f}",
            str(place),
        )
    console = Console()
    console.print(table)
    first = sum(place == 1 for place in places)
    console.print(
        f"The right text comes first for {first} of {len(places)} questions; no question shares its language."
    )


if __name__ == "__main__":
    main()
