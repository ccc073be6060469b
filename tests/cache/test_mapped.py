"""Columns that are mapped into memory."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from support.helpers import manual, pixel_dataset, run, tiny_vit

from hf_freezecache import FeatureStore
from hf_freezecache.cache.lossless import pack_rows
from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.cache.mapped import PackedColumn


def test_opened_store_travels_to_another_process(tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(20), tmp_path, manual("1:3"))
    store = FeatureStore.open(trainer.freeze_status().store_path)
    before = store.read([19, 0])  # the mapped column ends in a shorter batch
    assert torch.equal(pickle.loads(pickle.dumps(store)).read([19, 0]), before)


@pytest.mark.parametrize("offset", [-5, 2**40])
def test_damaged_offsets_are_a_damaged_row(offset):
    frames = pack_rows(np.zeros((3, 50), np.uint8))
    ends = np.frombuffer(frames.buffers()[1], np.int64).copy()
    ends[2] = offset
    broken = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 3, [None, pa.py_buffer(ends), frames.buffers()[2]])
    column = PackedColumn(pa.chunked_array([broken]), 50, "column 'base'")
    assert not column.take(np.array([0])).any()
    for row in (1, 2):
        with pytest.raises(StoreError, match=f"row {row} of column 'base' is damaged"):
            column.take(np.array([row]))
