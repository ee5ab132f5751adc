"""A folder that `polyvec embed` made, in Qdrant, batch by batch."""

import pyarrow.dataset as ds
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, PointStruct, VectorParams

from polyvec import Embedder


def main(folder: str, question: str) -> str:
    parts = ds.dataset(folder, format="parquet")
    width = parts.schema.field("embedding").type.list_size
    client = QdrantClient(":memory:")
    client.create_collection("texts", vectors_config=VectorParams(size=width, distance=Distance.DOT))
    number = 0
    for batch in parts.to_batches(columns=["id", "embedding"]):
        rows = batch.to_pylist()
        points = [
            PointStruct(id=number + i, vector=r["embedding"], payload={"id": r["id"]}) for i, r in enumerate(rows)
        ]
        client.upsert("texts", points)
        number += len(rows)
    query = Embedder().encode(question, task="retrieval.query").tolist()
    return client.query_points("texts", query=query, limit=1).points[0].payload["id"]


if __name__ == "__main__":
    import sys

    print(main(sys.argv[1], sys.argv[2]))
