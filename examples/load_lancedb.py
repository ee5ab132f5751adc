"""A folder that `polyvec embed` made, in LanceDB, batch by batch."""

import tempfile

import lancedb
import pyarrow.dataset as ds

from polyvec import Embedder


def main(folder: str, question: str) -> str:
    parts = ds.dataset(folder, format="parquet")
    query = Embedder().encode(question, task="retrieval.query")
    with tempfile.TemporaryDirectory() as database:
        table = lancedb.connect(database).create_table("texts", schema=parts.schema)
        for batch in parts.to_batches():
            table.add(batch)
        found = table.search(query, vector_column_name="embedding").distance_type("dot").limit(1).to_list()
    return found[0]["id"]


if __name__ == "__main__":
    import sys

    print(main(sys.argv[1], sys.argv[2]))
