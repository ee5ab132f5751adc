"""polyvec as an embedding function of Chroma: queries and passages each get their own task."""

import chromadb
from chromadb.api.types import Documents, EmbeddingFunction, Embeddings

from polyvec import Embedder

EMBEDDER = Embedder()


class PolyvecFunction(EmbeddingFunction[Documents]):
    def __init__(self) -> None:
        pass

    @staticmethod
    def name() -> str:
        return "polyvec"

    def get_config(self) -> dict[str, object]:
        return {}

    @staticmethod
    def build_from_config(config: dict[str, object]) -> "PolyvecFunction":
        return PolyvecFunction()

    def __call__(self, input: Documents) -> Embeddings:
        return list(EMBEDDER.encode(input, task="retrieval.passage"))

    def embed_query(self, input: Documents) -> Embeddings:
        return list(EMBEDDER.encode(input, task="retrieval.query"))


def main(texts: list[str], question: str) -> str:
    client = chromadb.EphemeralClient(chromadb.Settings(anonymized_telemetry=False))
    collection = client.create_collection("texts", embedding_function=PolyvecFunction())
    collection.add(ids=[str(i) for i in range(len(texts))], documents=texts)
    return collection.query(query_texts=[question], n_results=1)["documents"][0][0]


if __name__ == "__main__":
    print(main(["The train is late.", "A cat sleeps on the chair."], "Wo schläft die Katze?"))
