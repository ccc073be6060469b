"""Columns that are read from the files of a store."""

import pickle
import timeit

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.arrow_streams import stream
from support.helpers import manual, pixel_dataset, run, tiny_vit

from hf_freezecache import FeatureStore
from hf_freezecache.cache.arrow_stream import read_stream
from hf_freezecache.cache.codec import make_codec
from hf_freezecache.cache.held_files import HeldFile, open_file
from hf_freezecache.cache.lossless import join_rows, pack_rows
from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.cache.names import shard_name
from hf_freezecache.cache.rows import InputColumn
from hf_freezecache.cache.shards import ShardWriter
from hf_freezecache.cache.stored_columns import BitColumn, FixedColumn, PackedColumn, TextColumn, TokenColumn
from hf_freezecache.cache.view_columns import ViewColumns, ViewSpec
from hf_freezecache.model.layout import FeatureLayout


def test_opened_store_travels_to_another_process(tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(20), tmp_path, manual("1:3"))
    store = FeatureStore.open(trainer.freeze_status().store_path)
    before = store.read([19, 0])  # the last batch is shorter
    assert torch.equal(pickle.loads(pickle.dumps(store)).read([19, 0]), before)


@pytest.mark.parametrize("offset", [-5, 2**40])
def test_damaged_offsets_are_a_damaged_row(offset):
    frames = pack_rows(np.zeros((3, 50), np.uint8))
    ends = np.frombuffer(frames.buffers()[1], np.int64).copy()
    ends[2] = offset
    broken = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 3, [None, pa.py_buffer(ends), frames.buffers()[2]])
    column = PackedColumn(*stream({"base": broken}), "base", "a store", 50)
    assert not column.take(np.array([0])).any()
    for row in (1, 2):
        with pytest.raises(StoreError, match=f"row {row} of column 'base' of a store is damaged"):
            column.take(np.array([row]))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [-1, 0, 3, 2**50])
def test_damaged_numbers_of_tokens_are_a_damaged_row(packed, length):
    tokens, lengths = np.arange(30, dtype=np.uint8).reshape(6, 5), np.array([2, 1, 3])
    rows = np.split(tokens, [2, 3])
    codes = pack_rows(rows) if packed else join_rows(tokens, lengths)

    def column(numbers):
        read = stream({"base": codes, "tokens": pa.array(numbers)})
        lengths_read = FixedColumn(*read, "tokens", "a store")
        return TokenColumn(*read, "base", "a store", (np.dtype(np.uint8), 5), lengths_read, packed)

    whole = column(lengths)
    assert np.array_equal(whole.take(np.array([2, 0])), np.concatenate([rows[2], rows[0]]))
    broken = column(np.array([2, length, 3]))
    assert np.array_equal(broken.take(np.array([0])), rows[0])
    with pytest.raises(StoreError, match="row 1 of column 'base' of a store is damaged"):
        broken.take(np.array([0, 1]))


def test_rows_are_read_into_the_memory_that_is_given():
    packed = pack_rows(np.arange(150, dtype=np.uint8).reshape(3, 50))
    plain = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(150, dtype=np.uint8)), 50)
    wide = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(600, dtype=np.int16)), 200)
    columns = [
        PackedColumn(*stream({"base": packed}), "base", "a store", 50),
        FixedColumn(*stream({"base": plain}), "base", "a store"),
        FixedColumn(*stream({"base": wide}), "base", "a store"),
    ]
    for column in columns:
        memory = np.zeros((2, column.width), column.dtype)
        assert column.take(np.array([2, 0]), memory) is memory
        assert np.array_equal(memory, column.take(np.array([2, 0]))) and memory.any()


ORDER = np.array([6, 0, 3, 3, 5, 2, 1, 4])


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
def test_rows_of_every_kind_come_back_from_several_batches_in_any_order(text):
    """Also from files of earlier releases, whose strings have small offsets."""
    numbers = np.arange(7.0)
    values = {
        "number": pa.array(numbers),
        "list": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(21, dtype=np.int16)), 3),
        "text": pa.array(["", "käse", "a", "", "bb" * 500, "c", "ünd"], text),
        "truth": pa.array([True, False, False, True, True, False, True]),
    }
    parts = [slice(0, 3), slice(3, 3), slice(3, 6), slice(6, 7)]
    batches = [{name: pa.concat_arrays([value[part]]) for name, value in values.items()} for part in parts]
    found, schema = stream(*batches)
    for name, kind in {"number": FixedColumn, "list": FixedColumn, "text": TextColumn, "truth": BitColumn}.items():
        column = kind(found, schema, name, "a store")
        taken = column.take(ORDER)
        expected = values[name].take(pa.array(ORDER)).to_pylist()
        assert len(column) == 7
        if kind is FixedColumn:
            assert taken.reshape(8, -1).tolist() == np.array(expected).reshape(8, -1).tolist()
        else:
            assert taken == expected
        with pytest.raises(IndexError, match="there are 7"):
            column.take(np.array([7]))


def test_text_that_is_none_is_a_damaged_row():
    text = pa.Array.from_buffers(
        pa.large_string(), 2, [None, pa.py_buffer(np.array([0, 1, 2])), pa.py_buffer(b"a\xff")]
    )
    column = TextColumn(*stream({"name": text}), "name", "a store")
    assert column.take(np.array([0])) == ["a"]
    with pytest.raises(StoreError, match="row 1 of column 'name' of a store is damaged"):
        column.take(np.array([1]))


def test_column_with_nulls_is_refused():
    with pytest.raises(StoreError, match="column 'number' of a store has nulls"):
        FixedColumn(*stream({"number": pa.array([1, None])}), "number", "a store")


def test_rows_beside_a_column_of_strings_are_read_as_fast_as_without(tmp_path):
    """One copy of a large column for each batch of a few rows would take a thousand times as long."""
    layout = FeatureLayout((4, 8), None, 0, torch.float32)
    codec = make_codec("int8", layout)
    codec.load_tensors({"scale": torch.ones(8), "offset": torch.zeros(8)})
    count, size = 60_000, 1000
    inputs = {"plain": {}, "named": {"name": InputColumn("str", is_list=True)}}
    stores, order = {}, np.random.default_rng(0).integers(0, count, 32)
    for kind, columns in inputs.items():
        path = tmp_path / kind
        path.mkdir()
        with ShardWriter(path / shard_name(0, 1), codec, ViewColumns(ViewSpec(), codec), columns) as writer:
            for first in range(0, count, size):
                names = {"name": [f"{row:0200d}" for row in range(first, first + size)]}
                codes = {"base": torch.full((size, 32), first // size, dtype=torch.uint8)}
                writer.write(first, codes, names if columns else {})
        shard = writer.shard()
        file = HeldFile(path / shard.name, open_file(path / shard.name), shard.bytes, shard.sha256)
        schema, batches = read_stream(file)
        stores[kind] = {"base": FixedColumn(batches, schema, "base", path)}
        if columns:
            assert schema.field("name").type == pa.large_string()
            stores[kind]["name"] = TextColumn(batches, schema, "name", path)
            assert stores[kind]["name"].take(order) == [f"{row:0200d}" for row in order]
    seconds = {
        kind: min(timeit.repeat(lambda columns=columns: [c.take(order) for c in columns.values()], number=5, repeat=9))
        for kind, columns in stores.items()
    }
    assert (
        seconds["named"] < 0.01
    )  # two more reads a row; through Arrow's `take` it took 0.03 s, and grew with the rows
