"""A folder that `polyvec embed` made, in DuckDB: it reads the parts where they lie."""

import duckdb

from polyvec import Embedder


def main(folder: str, question: str) -> str:
    query = Embedder().encode(question, task="retrieval.query")
    best = f"""
        SELECT id FROM read_parquet('{folder}/part-*.parquet')
        ORDER BY array_inner_product(embedding::FLOAT[{len(query)}], ?::FLOAT[{len(query)}]) DESC LIMIT 1
    """
    return duckdb.connect().execute(best, [query.tolist()]).fetchone()[0]


if __name__ == "__main__":
    import sys

    print(main(sys.argv[1], sys.argv[2]))
