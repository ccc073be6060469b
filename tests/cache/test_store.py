"""The store on disk: what it holds, what it refuses, and how it is removed."""

import json
import os
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from support import zoo
from support.builds import Rows, build, collate, flip, make_spec
from support.codec_cases import NAMES
from support.helpers import manual, pixel_dataset, run, tiny_vit

from hf_freezecache import FeatureStore
from hf_freezecache.build.materialize import materialize, open_matching
from hf_freezecache.cache.directories import create_aside, remove_store
from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.distributed import Group


def features_of(spec, indices):
    batch = spec.source.collate(indices)
    return spec.chain.prefix(batch, spec.cut)


# What it holds


def test_store_opens_with_datasets(built):
    dataset = datasets.load_from_disk(str(built.path))
    assert set(dataset.column_names) == {"sample_id", "labels", "base", "special"}
    assert dataset["sample_id"][:] == list(range(22))
    assert dataset["labels"][:] == [row % 5 for row in range(22)]
    assert dataset.features["base"] == datasets.List(datasets.Value("uint8"), length=16 * 16 // 2)
    assert dataset.features["special"].length == 16
    assert built.dataset[3] == dataset[3]
    assert len(built) == 22 and built.verify() is True
    assert built.bytes == sum(file.stat().st_size for file in built.path.glob("*.arrow"))


def test_store_directory_opens_as_a_dataset_with_the_users_labels(tmp_path):
    data = pixel_dataset(20)
    trainer = run(tiny_vit(), data, tmp_path, manual("1:3", codec="int4"))
    opened = datasets.load_from_disk(str(trainer.freeze_status().store_path))
    assert opened["sample_id"][:] == list(range(20))
    assert opened["labels"][:] == data["labels"][:].tolist()
    assert np.asarray(opened[0]["base"]).dtype.kind in "iu" and len(opened[0]["base"]) == 16 * 32 // 2
    assert len(opened[0]["special"]) == 32


@pytest.mark.parametrize("codec", NAMES)
def test_rows_are_the_encoded_features_of_their_samples(model, tmp_path, codec):
    """Indices repeat, jump and cross batches."""
    spec = make_spec(model, tmp_path, codec=codec)
    store = materialize(spec, Group())
    indices = [21, 0, 3, 3, 4, 17, 0, 20, 11]
    expected = torch.cat([features_of(spec, [index]) for index in indices])
    found = store.read(indices)
    # One sample's features are computed within its batch when the store is built: kernels may round otherwise.
    tolerance = {"fp32": 1e-5, "fp16": 2e-3, "int8": 0.05, "int4": 0.6, "int3": 1.2}.get(codec, 2.5)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-3)
    assert store.read_rows(indices)["labels"].tolist() == [index % 5 for index in indices]
    assert torch.equal(store.read(range(4, 8)), store.codec.decode(store.codec.encode(features_of(spec, range(4, 8)))))


def test_fp32_store_returns_the_prefix_bit_for_bit(model, tmp_path):
    spec = make_spec(model, tmp_path, codec="fp32")
    store = materialize(spec, Group())
    for number in range(spec.source.num_ranges):
        rows = spec.source.rows(number)
        assert torch.equal(store.read(rows), features_of(spec, rows))


def test_map_features_are_stored(tmp_path):
    spec = make_spec(zoo.make("resnet"), tmp_path, Rows(6, 32), cut=3, codec="fp32")
    store = materialize(spec, Group())
    assert set(store.dataset.column_names) == {"sample_id", "labels", "base"}
    assert torch.equal(store.read(range(4)), features_of(spec, range(4)))


@pytest.mark.parametrize("indices", [[22], [-1], [0, 1, 99]])
def test_reading_out_of_range_is_an_error(built, indices):
    with pytest.raises(IndexError, match="22"):
        built.read(indices)


def test_reading_no_rows_gives_an_empty_batch(built):
    assert built.read([]).shape == (0, 17, 16)


@pytest.mark.parametrize(
    ("label", "dtype", "value_type"),
    [
        (lambda row: row % 3, torch.int64, "int64"),
        (lambda row: row / 7, torch.float32, "float32"),
        (lambda row: torch.tensor(row / 7, dtype=torch.float64), torch.float64, "float64"),
        (lambda row: row % 2 == 0, torch.bool, "uint8"),
        (lambda row: torch.tensor([row, 1, -row], dtype=torch.int32), torch.int32, "int32"),
        (lambda row: torch.tensor([row % 2, 1.0, 0.0]), torch.float32, "float32"),
        (lambda row: torch.tensor([True, row % 2 == 0]), torch.bool, "uint8"),
        (lambda row: torch.tensor(row / 3, dtype=torch.bfloat16), torch.bfloat16, "float32"),
        (lambda row: torch.tensor(row / 3, dtype=torch.float16), torch.float16, "float16"),
        (lambda row: torch.full((4, 6), row, dtype=torch.uint8), torch.uint8, "uint8"),
        (lambda row: torch.full((2, 3, 2), row / 3), torch.float32, "float32"),
    ],
)
def test_label_column_of_any_kind_comes_back_as_it_was(model, tmp_path, label, dtype, value_type):
    dataset = Rows(10, label=label)
    store = build(model, tmp_path, dataset)
    indices = [9, 0, 5, 5]
    expected = collate([dataset[index] for index in indices])["labels"]
    found = store.read_rows(indices)["labels"]
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)
    feature = datasets.load_from_disk(str(store.path)).features["labels"]
    assert getattr(feature, "feature", feature).dtype == value_type


def test_strings_and_several_columns_and_constants_come_back(model, tmp_path):
    class Named(Rows):
        def __getitem__(self, row):
            return {**super().__getitem__(row), "name": f"käse-{row}", "mask": torch.full((3,), row % 2 == 0)}

    def with_constant(samples):
        return {**collate(samples), "return_loss": True, "nothing": None, "ids": list(range(len(samples)))}

    store = build(model, tmp_path, Named(10), collator=with_constant)
    rows = store.read_rows([7, 2, 2])
    assert rows["name"] == ["käse-7", "käse-2", "käse-2"]
    assert rows["mask"].tolist() == [[False] * 3, [True] * 3, [True] * 3]
    assert rows["return_loss"] is True and rows["nothing"] is None
    assert rows["ids"] == [3, 2, 2]


def test_no_file_is_a_pickle(built):
    names = {file.name for file in built.path.iterdir()}
    assert names == {"manifest.json", "codec.safetensors", "dataset_info.json", "state.json"} | {
        shard.name for shard in built.manifest.shards
    }
    for file in built.path.iterdir():
        content = file.read_bytes()
        if file.suffix == ".json":
            json.loads(content)
        elif file.suffix == ".arrow":
            assert pa.ipc.open_stream(content).read_all().num_rows == 22
        else:
            assert int.from_bytes(content[:8], "little") < len(content) and content[8:9] == b"{"


# What it refuses


def test_directory_without_manifest_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="not a feature store"):
            FeatureStore.open(path)


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "codec.safetensors", "dataset_info.json", "state.json"])
def test_missing_and_truncated_files_are_refused_at_opening(store, name):
    file = store.path / name
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(StoreError, match=f"{name} has .* bytes instead of"):
        FeatureStore.open(store.path)
    file.unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        FeatureStore.open(store.path)


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "codec.safetensors", "dataset_info.json", "state.json"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_is_found_by_verify(store, name, where):
    size = (store.path / name).stat().st_size
    flip(store.path / name, {"first": 0, "middle": size // 2, "last": size - 1}[where])
    with pytest.raises(StoreError, match=name):
        FeatureStore.open(store.path).verify()


# Removing a store


def test_removed_store_is_gone_while_its_readers_read_on(tmp_path):
    store = materialize(make_spec(tiny_vit().eval(), tmp_path), Group())
    expected = store.read(range(4))
    remove_store(store.path)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(store.read(range(4)), expected) and torch.isfinite(store.read(range(22))).all()
    remove_store(store.path)


@pytest.mark.parametrize("deleted", [0, 1])
def test_removal_that_is_killed_leaves_nothing_under_the_stores_name(deleted, tmp_path, monkeypatch):
    spec = make_spec(tiny_vit().eval(), tmp_path)
    store = materialize(spec, Group())

    def killed(path, **settings):
        for file in sorted(path.iterdir())[:deleted]:
            file.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_store(store.path)
    assert not store.path.exists() and open_matching(spec, Group()) is None
    (left,) = tmp_path.iterdir()
    assert ".tmp-" in left.name
    aside = create_aside(tmp_path / "another")
    assert list(tmp_path.iterdir()) == [aside]


def test_store_that_cannot_be_renamed_stays_whole(tmp_path, monkeypatch):
    store = materialize(make_spec(tiny_vit().eval(), tmp_path), Group())

    def refused(*paths):
        raise PermissionError("not yours")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refused)
        with pytest.raises(OSError, match="not yours"):
            remove_store(store.path)
    assert FeatureStore.open(store.path).verify()
