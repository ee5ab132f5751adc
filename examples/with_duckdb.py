"""Vectors of polyvec in DuckDB: unit vectors, so the inner product is the cosine."""

import duckdb
import pyarrow as pa

from polyvec import Embedder


def main(texts: list[str], question: str) -> str:
    embedder = Embedder()
    vectors = embedder.encode(texts, task="retrieval.passage")
    width = vectors.shape[1]
    rows = pa.table({"text": texts, "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)})
    database = duckdb.connect()
    database.register("rows", rows)
    database.execute("CREATE TABLE texts AS SELECT * FROM rows")
    query = embedder.encode(question, task="retrieval.query").tolist()
    best = f"SELECT text FROM texts ORDER BY array_inner_product(vector, ?::FLOAT[{width}]) DESC LIMIT 1"
    return database.execute(best, [query]).fetchone()[0]


if __name__ == "__main__":
    print(main(["The train is late.", "A cat sleeps on the chair."], "Wo schläft die Katze?"))
