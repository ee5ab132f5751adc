"""Vectors of polyvec in Qdrant, in its local mode."""

from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

from polyvec import Embedder


def main(texts: list[str], question: str) -> str:
    embedder = Embedder()
    vectors = embedder.encode(texts, task="retrieval.passage", dimensions=128)
    client = QdrantClient(":memory:")
    client.create_collection("texts", vectors_config=VectorParams(size=128, distance=Distance.DOT))
    points = [PointStruct(id=i, vector=v.tolist(), payload={"text": texts[i]}) for i, v in enumerate(vectors)]
    client.upsert("texts", points)
    query = embedder.encode(question, task="retrieval.query", dimensions=128)
    return client.query_points("texts", query=query.tolist(), limit=1).points[0].payload["text"]


if __name__ == "__main__":
    print(main(["The train is late.", "A cat sleeps on the chair."], "Wo schläft die Katze?"))
