"""Arrow streams in memory, found as a store's files are."""

import pyarrow as pa

from hf_freezecache.cache.arrow_stream import read_stream
from hf_freezecache.cache.held_files import MemoryFile


def stream(*batches: dict[str, pa.Array]):
    """An Arrow stream of record batches: its batches as they are found, and its schema."""
    sink = pa.BufferOutputStream()
    tables = [pa.RecordBatch.from_pydict(batch) for batch in batches]
    with pa.ipc.new_stream(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_batch(table)
    schema, found = read_stream(MemoryFile(memoryview(sink.getvalue())))
    return found, schema
