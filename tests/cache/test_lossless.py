"""Packed stores: the same rows in fewer bytes."""

import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from support.arrow_streams import stream
from support.builds import Rows, collate
from support.codec_cases import NAMES
from support.helpers import tiny_vit
from support.packed_stores import FlatRows, assert_same_rows, build_plain_and_packed, flat_vit

from hf_freezecache import FeatureStore
from hf_freezecache.cache.lossless import blank_frames, largest_frame, pack_rows, packed_columns
from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.cache.stored_columns import PackedColumn

# Frames


def test_rows_are_packed_and_unpacked_one_by_one():
    rows = np.random.default_rng(0).integers(0, 4, (7, 300), dtype=np.uint8)
    frames = pack_rows(rows)
    assert [pa.Codec("zstd").decompress(frame.as_buffer(), 300).to_pybytes() for frame in frames] == [
        row.tobytes() for row in rows
    ]
    # Several batches, one of them a slice and one empty.
    column = pa.chunked_array([frames.slice(2, 3), frames.slice(0, 0), frames])
    packed = PackedColumn(*stream(*({"base": chunk} for chunk in column.chunks)), "base", "a store", 300)
    wanted = np.array([9, 0, 2, 3, 3, 8])
    assert np.array_equal(packed.take(wanted), np.concatenate([rows[2:5], rows])[wanted])
    assert len(packed) == 10 and packed.take(np.array([], dtype=np.int64)).shape == (0, 300)
    assert packed.frame_bytes == pytest.approx(sum(len(frame.as_py()) for frame in column) / 10)
    for outside in (10, -1):
        with pytest.raises(IndexError, match="there are 10"):
            packed.take(np.array([outside]))


@pytest.mark.parametrize("width", [1, 7, 128, 5000, 131072, 400000])
def test_no_frame_is_larger_than_the_largest(width):
    noise = np.random.default_rng(width).integers(0, 256, (3, width), dtype=np.uint8)
    assert max(len(frame.as_py()) for frame in pack_rows(noise)) <= largest_frame(width) <= width * 1.005 + 64


def test_blank_frames_take_their_mean():
    frames = blank_frames(6, 10.5)
    assert len(frames) == 6 and frames.buffers()[2].size == 63


def test_only_the_codes_of_rows_are_packed():
    columns = {name: (torch.uint8, 8) for name in ("base", "view_1", "view_12", "view_special_1", "geometry_1")}
    columns["special"] = (torch.float16, 8)
    assert packed_columns(columns, True) == {"base": 8, "view_1": 8, "view_12": 8}
    assert packed_columns(columns, False) == {}


# Stores


@pytest.mark.parametrize("codec", NAMES)
def test_packed_rows_are_those_of_a_plain_store(codec, tmp_path):
    plain, packed = build_plain_and_packed(tiny_vit(), tmp_path, codec=codec)
    assert_same_rows(plain, packed, 22)
    assert torch.equal(plain.read(range(22)), packed.read(range(22)))
    assert packed.manifest.lossless and not plain.manifest.lossless and packed.path != plain.path
    assert packed.bytes == sum(file.stat().st_size for file in packed.path.glob("*.arrow"))


def test_packed_store_is_smaller_and_reads_the_same_through_other_batches(tmp_path):
    plain, packed = build_plain_and_packed(flat_vit(), tmp_path, FlatRows(50), codec="fp32", batch_size=16)
    assert packed.bytes < 0.5 * plain.bytes
    assert_same_rows(plain, packed, 50)
    # Bits of a code are what they were; only the disk has fewer.
    assert packed.codec.bits_per_value == plain.codec.bits_per_value


def test_strings_and_other_inputs_come_back(tmp_path):
    class Named(Rows):
        def __getitem__(self, row):
            return {**super().__getitem__(row), "name": f"käse-{row}", "mask": torch.full((3,), row % 2 == 0)}

    plain, packed = build_plain_and_packed(
        tiny_vit(), tmp_path, Named(10), collator=lambda rows: {**collate(rows), "return_loss": True}
    )
    assert_same_rows(plain, packed, 10)
    assert packed.read_rows([7, 2])["name"] == ["käse-7", "käse-2"]


def test_packed_store_opens_with_datasets(tmp_path):
    plain, packed = build_plain_and_packed(tiny_vit(), tmp_path)
    dataset = datasets.load_from_disk(str(packed.path))
    assert dataset.features["base"] == datasets.Value("large_binary")
    assert dataset.features["special"] == plain.dataset.features["special"]
    frame, expected = dataset[5]["base"], plain.dataset[5]["base"]
    assert list(pa.Codec("zstd").decompress(frame, len(expected), asbytes=True)) == expected
    assert packed.verify() is True


def flip_in_frame(store, row):
    """Damages the first bytes of a row's frame, in the file."""
    frame = store.dataset[row]["base"]
    [path] = store.path.glob("*.arrow")
    content = bytearray(path.read_bytes())
    place = content.find(frame)
    assert place > 0 and content.find(frame, place + 1) < 0
    content[place : place + 4] = b"\0\0\0\0"
    path.write_bytes(content)


def test_damaged_frame_is_named_and_found_by_verify(tmp_path):
    [_, built] = build_plain_and_packed(tiny_vit(), tmp_path)
    store = FeatureStore.open(shutil.copytree(built.path, tmp_path / "copy"))
    flip_in_frame(store, 13)
    damaged = FeatureStore.open(store.path)
    with pytest.raises(StoreError, match=r"row 13 of column 'base' of .*copy is damaged"):
        damaged.read([3, 13])
    assert torch.equal(damaged.read([3, 12]), built.read([3, 12]))
    with pytest.raises(StoreError, match="arrow is damaged"):
        damaged.verify()
