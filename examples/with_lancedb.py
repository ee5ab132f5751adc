"""polyvec as an embedding function of LanceDB: the table embeds what is added and what is asked."""

import tempfile

import lancedb
import numpy as np
from lancedb.embeddings import TextEmbeddingFunction, register
from lancedb.pydantic import LanceModel, Vector

from polyvec import Embedder

EMBEDDER = Embedder()


@register("polyvec")
class PolyvecFunction(TextEmbeddingFunction):
    def ndims(self) -> int:
        return EMBEDDER.config.hidden_size

    def generate_embeddings(self, texts: list[str] | np.ndarray) -> list[np.ndarray]:
        return list(EMBEDDER.encode(list(texts), task="retrieval.passage"))

    def compute_query_embeddings(self, query: str, *args: object, **kwargs: object) -> list[np.ndarray]:
        return [EMBEDDER.encode(query, task="retrieval.query")]


def main(texts: list[str], question: str) -> str:
    function = PolyvecFunction.create()

    class Row(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    with tempfile.TemporaryDirectory() as folder:
        table = lancedb.connect(folder).create_table("texts", schema=Row)
        table.add([{"text": text} for text in texts])
        return table.search(question).limit(1).to_list()[0]["text"]


if __name__ == "__main__":
    print(main(["The train is late.", "A cat sleeps on the chair."], "Wo schläft die Katze?"))
