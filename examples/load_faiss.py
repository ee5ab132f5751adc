"""A folder that `polyvec embed` made, in FAISS: unit vectors, so the inner product is the cosine."""

import faiss
import numpy as np
import pyarrow.dataset as ds

from polyvec import Embedder


def main(folder: str, question: str) -> str:
    parts = ds.dataset(folder, format="parquet")  # files whose names begin with _ are no data
    width = parts.schema.field("embedding").type.list_size
    index = faiss.IndexFlatIP(width)
    ids = []
    for batch in parts.to_batches(columns=["id", "embedding"]):
        vectors = batch["embedding"].flatten().to_numpy().reshape(-1, width)
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        ids += batch["id"].to_pylist()
    query = Embedder().encode([question], task="retrieval.query")
    return ids[index.search(query, 1)[1][0, 0]]


if __name__ == "__main__":
    import sys

    print(main(sys.argv[1], sys.argv[2]))
