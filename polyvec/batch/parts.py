"""The table of a part: one row a text, or one a chunk, in the order of the input.

Shape letters: C chunks in a text, M kept width.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from polyvec.batch.job import CHUNK_COLUMNS, Job
from polyvec.errors import InputError
from polyvec.files import Record, Stamp, storage_dtype, vector_table, vectors_of
from polyvec.inference.embedder import Embedding
from polyvec.text.chunking import Span

_FAULTS_KEY = b"faults"


@dataclass(frozen=True)
class Result:
    """What a text became: ``vectors`` (C, M), one row without late chunking, where ``spans`` is None."""

    vectors: NDArray[Any]
    num_tokens: int
    truncated: bool
    spans: list[Span] | None = None

    @classmethod
    def of(cls, embedding: Embedding) -> Result:
        cut = embedding.cut_characters > 0
        if embedding.chunks is not None:
            return cls(embedding.chunks.vectors, embedding.num_tokens, cut, embedding.chunks.spans)
        assert embedding.vector is not None
        return cls(embedding.vector[None], embedding.num_tokens, cut)


def record_schema(job: Job, kept: Any) -> Any:
    """Return the Arrow schema of a part's columns but ``embedding``; ``kept`` is that of the id and what passes."""
    import pyarrow as pa

    fields = [*kept, pa.field("num_tokens", pa.int32()), pa.field("truncated", pa.bool_())]
    if job.late_chunking is not None:
        fields += [pa.field(name, pa.int32()) for name in CHUNK_COLUMNS]
    return pa.schema(fields)


def part_table(rows: Sequence[tuple[Record, Result]], schema: Any, stamp: Stamp) -> Any:
    """Return the table of rows with their results; ``start`` and ``end`` are characters of the text."""
    records: list[Record] = []
    vectors: list[NDArray[Any]] = []
    for kept, result in rows:
        record = {**kept, "num_tokens": result.num_tokens, "truncated": result.truncated}
        if result.spans is None:
            records.append(record)
        else:
            spans = enumerate(result.spans)
            records += [{**record, "chunk": i, "start": start, "end": end} for i, (start, end) in spans]
        vectors += list(result.vectors)
    return vector_table(records, vectors, stamp, schema=schema)


def types_of(schema: Any) -> str:
    """Return 16 hex digits of the columns of a schema and their types."""
    words = schema.to_string(show_field_metadata=False, show_schema_metadata=False)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def retyped(table: Any, schema: Any, stamp: Stamp) -> Any:
    """Return the table of a part with its records in ``schema``, None where a value would change."""
    import pyarrow as pa

    try:
        return table.cast(part_table([], schema, stamp).schema).combine_chunks()
    except (pa.ArrowException, ValueError):
        return None


def table_bytes(table: Any) -> bytes:
    """Return a table as a Parquet file: the same bytes for the same rows."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    names = [name for name in table.schema.names if name != "embedding"]  # vectors have no words that repeat
    pq.write_table(table, buffer, compression="zstd", use_dictionary=names)
    return buffer.getvalue()


def lent_bytes(results: dict[int, Result | str], job: Job) -> bytes:
    """Return the results of texts that a slice lends to others, by the index of their row, or why there is none."""
    import pyarrow as pa

    schema = record_schema(job, pa.schema([("row", pa.int32())]))
    rows = [({"row": i}, r) for i, r in results.items() if isinstance(r, Result)]
    table = part_table(rows, schema, job.stamp)
    faults = {i: r for i, r in results.items() if isinstance(r, str)}
    metadata = {**(table.schema.metadata or {}), _FAULTS_KEY: json.dumps(faults).encode()}
    return table_bytes(table.replace_schema_metadata(metadata))


def read_lent(data: bytes, job: Job) -> dict[int, Result | str]:
    """Return what ``lent_bytes`` wrote."""
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    results: dict[int, Result | str] = {
        int(i): reason for i, reason in json.loads(table.schema.metadata[_FAULTS_KEY]).items()
    }
    vectors = vectors_of(table).astype(storage_dtype(job.stamp["dtype"]))
    rows = table.drop_columns(["embedding"]).to_pylist()
    edges = [i for i, row in enumerate(rows) if i == 0 or row["row"] != rows[i - 1]["row"]]
    for start, stop in itertools.pairwise([*edges, len(rows)]):
        first = rows[start]
        spans = None if job.late_chunking is None else [(r["start"], r["end"]) for r in rows[start:stop]]
        results[first["row"]] = Result(vectors[start:stop], first["num_tokens"], first["truncated"], spans)
    return results


def unified(schemas: Sequence[Any]) -> Any:
    """Return one schema for the kept columns of all slices. Raises ``InputError`` for types that do not meet."""
    import pyarrow as pa

    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"columns that are kept must each have one type, got: {error}; leave the column out of --keep and --id"
        ) from error
    if empty := [field.name for field in schema if _has_empty_struct(field.type)]:
        raise InputError(f"column {empty[0]!r} must have objects with a field to be kept, got empty ones; leave it out")
    # A column without a value anywhere has no type that every reader knows.
    return pa.schema([f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in schema])


def _has_empty_struct(kind: Any) -> bool:
    """Whether Parquet has no place for ``kind``: an object without fields, or one that holds it."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(_has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))


def kept_schema(records: Sequence[Record], names: Sequence[str], where: str) -> Any:
    """Return the Arrow schema of the kept columns of some rows."""
    import pyarrow as pa

    fields = []
    for name in names:
        try:
            fields.append(pa.field(name, pa.array([r[name] for r in records]).type))
        except (pa.ArrowException, OverflowError) as error:  # of whole numbers beyond 64 bits
            raise InputError(
                f"column {name!r} must have one type to be kept, got near {where}: {error}; leave it out"
            ) from error
    return pa.schema(fields)
