"""The store on disk: what it holds, what it refuses, and what a broken build leaves."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from support import zoo
from support.builds import Rows, build, collate, make_spec, on_every_process
from support.codec_cases import NAMES

from hf_freezecache import FeatureStore
from hf_freezecache.build.materialize import BuildFailed, OverLimit, materialize, open_matching
from hf_freezecache.build.sizing import estimate_bytes
from hf_freezecache.cache import manifest as manifest_module
from hf_freezecache.cache import store as store_module
from hf_freezecache.cache.shards import ShardWriter
from hf_freezecache.cache.store import StoreError
from hf_freezecache.distributed import Group

CODECS = NAMES


@pytest.fixture(scope="module")
def model():
    return zoo.make("vit")


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    return build(model, tmp_path_factory.mktemp("stores"))


@pytest.fixture
def store(built, tmp_path):
    """A copy that a test may damage."""
    return FeatureStore.open(shutil.copytree(built.path, tmp_path / built.path.name))


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


@pytest.mark.parametrize("codec", CODECS)
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


@pytest.mark.parametrize(("rows", "batch_size"), [(200, 64), (64, 64), (3, 4)])
def test_estimate_is_the_written_bytes(rows, batch_size, model, tmp_path):
    spec = make_spec(model, tmp_path, Rows(rows), codec="int8", batch_size=batch_size)
    assert estimate_bytes(spec) == materialize(spec, Group()).bytes


@pytest.mark.parametrize("rows", [22, 6])
def test_estimate_for_several_processes_is_the_written_bytes(rows, model, tmp_path):
    spec = make_spec(model, tmp_path, Rows(rows))
    stores = on_every_process(3, lambda group: materialize(spec, group))
    assert estimate_bytes(spec, 3) == stores[0].bytes


def test_limit_is_kept_to_the_byte(model, tmp_path):
    spec = make_spec(model, tmp_path / "free")
    needed = sum(file.stat().st_size for file in materialize(spec, Group()).path.iterdir())
    limited = replace(spec, directory=tmp_path / "limited", limit=needed)
    store = materialize(limited, Group())
    assert sum(file.stat().st_size for file in store.path.iterdir()) == needed
    with pytest.raises(OverLimit, match=f"{needed:,} bytes; {needed - 1:,} are left"):
        materialize(replace(limited, directory=tmp_path / "less", limit=needed - 1), Group())
    assert not (tmp_path / "less").exists()


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


@pytest.mark.parametrize("name", ["base", "special", "sample_id", "geometry"])
def test_column_named_as_one_of_the_stores_is_refused(model, tmp_path, name):
    def renamed(samples):
        batch = collate(samples)
        return {"pixel_values": batch["pixel_values"], name: batch["labels"]}

    with pytest.raises(ValueError, match=f"{name}.*clash"):
        build(model, tmp_path, collator=renamed)
    assert list(tmp_path.iterdir()) == []


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


def edit(store, change):
    file = store.path / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_manifest_lists_the_sha256_of_every_file(built):
    content = json.loads((built.path / "manifest.json").read_text())
    assert list(content)[-1] == "checksum"
    listed = {shard["name"] for shard in content["shards"]} | set(content["files"])
    assert listed == {file.name for file in built.path.iterdir()} - {"manifest.json"}
    assert content["fingerprint"] == built.path.name and content["rows"] == 22 and content["codec"] == "int4"
    assert content["views"] == 0 and content["cut"] == 2 and content["made_from"]["cut"] == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(cut=3),
        lambda content: content["layout"].update(special_tokens=0),
        lambda content: content["shards"][0].update(sha256="0" * 64),
        lambda content: content.update(extra=1),
        lambda content: content.update(checksum="0" * 64),
        lambda content: content.pop("rows"),
    ],
)
def test_edited_manifest_is_refused(store, change):
    edit(store, change)
    with pytest.raises(StoreError, match="manifest.json.*edited or damaged.*built again"):
        FeatureStore.open(store.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"format_version": 1}', '"text"'])
def test_manifest_that_is_none_is_refused(store, text):
    (store.path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="manifest"):
        FeatureStore.open(store.path)


def test_manifest_that_is_not_text_is_refused(store):
    (store.path / "manifest.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(StoreError, match="manifest"):
        FeatureStore.open(store.path)


def test_store_of_another_version_is_refused(store):
    def other(content):
        content["format_version"] = 99
        content.pop("checksum")
        content["checksum"] = manifest_module._content_checksum(content)

    edit(store, other)
    with pytest.raises(StoreError, match="format version 99.*version 2"):
        FeatureStore.open(store.path)


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


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "codec.safetensors", "dataset_info.json", "state.json"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_is_found_by_verify(store, name, where):
    size = (store.path / name).stat().st_size
    flip(store.path / name, {"first": 0, "middle": size // 2, "last": size - 1}[where])
    with pytest.raises(StoreError, match=name):
        FeatureStore.open(store.path).verify()


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "codec.safetensors", "manifest.json"])
@pytest.mark.parametrize("where", ["first", "middle"])
def test_damaged_store_is_not_reused_but_built_again(model, tmp_path, name, where):
    spec = make_spec(model, tmp_path)
    assert open_matching(spec, Group()) is None
    store = materialize(spec, Group())
    expected = store.read(range(22))
    assert open_matching(spec, Group()).path == store.path
    flip(store.path / name, 0 if where == "first" else (store.path / name).stat().st_size // 2)
    assert open_matching(spec, Group()) is None
    assert torch.equal(materialize(spec, Group()).read(range(22)), expected)
    assert open_matching(spec, Group()) is not None


def test_store_under_a_foreign_name_is_not_taken_for_a_match(model, tmp_path):
    """Somebody renames a store: its manifest says what it was made from."""
    other = build(model, tmp_path / "other", cut=3)
    spec = make_spec(model, tmp_path)
    shutil.copytree(other.path, spec.path)
    assert open_matching(spec, Group()) is None


# Builds that fail


def build_until_killed(model, directory):
    """Runs in a process of its own."""
    write, calls = ShardWriter.write, []

    def kill_after_three(self, *args):
        write(self, *args)
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    ShardWriter.write = kill_after_three
    build(model, directory)


def test_killed_build_leaves_only_an_aside_directory_that_the_next_build_removes(model, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=build_until_killed, args=(model, tmp_path))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    spec = make_spec(model, tmp_path)
    assert left.name.startswith(spec.path.name + ".tmp-") and any(left.glob("*.arrow"))
    with pytest.raises(StoreError):
        FeatureStore.open(left)
    assert open_matching(spec, Group()) is None
    store = materialize(spec, Group())
    assert list(tmp_path.iterdir()) == [store.path] and store.verify()


def test_aside_directory_of_a_living_process_or_another_host_is_left_alone(model, tmp_path):
    spec = make_spec(model, tmp_path)
    living = tmp_path / f"{spec.path.name}.tmp-{socket.gethostname()}-{os.getppid()}-abc"
    foreign = tmp_path / f"{spec.path.name}.tmp-elsewhere-1-abc"
    living.mkdir()
    foreign.mkdir()
    store = materialize(spec, Group())
    assert set(tmp_path.iterdir()) == {store.path, living, foreign}


@pytest.mark.parametrize("failing_write", [1, 4])
def test_full_disk_is_build_failed_and_leaves_nothing(model, tmp_path, monkeypatch, failing_write):
    write, calls = ShardWriter.write, []

    def full(self, *args):
        calls.append(1)
        if len(calls) == failing_write:
            raise OSError(28, "No space left on device")
        write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(BuildFailed, match="No space left"):
        build(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_at_completion_is_build_failed_and_leaves_nothing(model, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_write", full)
    with pytest.raises(BuildFailed, match="No space left"):
        build(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_made_is_build_failed(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuildFailed):
        build(model, tmp_path / "file")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bad", [2, 13, 21])
def test_feature_that_is_not_finite_names_its_sample(model, tmp_path, codec, value, bad):
    class Broken(Rows):
        def __getitem__(self, row):
            sample = super().__getitem__(row)
            if row == bad:
                sample["pixel_values"][0, 3, 3] = value
            return sample

    with pytest.raises(ValueError, match=rf"\b{bad}\b"):
        build(model, tmp_path, Broken(), codec=codec, cut=1)
    assert list(tmp_path.iterdir()) == []


def test_images_of_other_sizes_are_refused_by_sample(tmp_path):
    class Growing(Rows):
        def __getitem__(self, row):
            self.size = 32 if row < 12 else 48
            return super().__getitem__(row)

    with pytest.raises(ValueError, match="sample 12.*one size"):
        build(zoo.make("resnet"), tmp_path, Growing(), cut=2)
    assert list(tmp_path.iterdir()) == []


def test_labels_of_other_lengths_are_refused_by_sample(model, tmp_path):
    dataset = Rows(12, label=lambda row: torch.zeros(3 if row < 8 else 4))
    with pytest.raises(ValueError, match="labels.*sample 8"):
        build(model, tmp_path, dataset)
    dataset = Rows(12, label=lambda row: torch.zeros(3, dtype=torch.float32 if row < 8 else torch.float64))
    with pytest.raises(ValueError, match="labels.*sample 8"):
        build(model, tmp_path, dataset)


def test_constants_and_columns_that_change_are_refused_by_sample(model, tmp_path):
    def changing_constant(samples):
        batch = collate(samples)
        return {**batch, "scale": 1.0 if batch["labels"][0] == 0 else 2.0}

    def changing_columns(samples):
        batch = collate(samples)
        return batch if batch["labels"][0] == 0 else {**batch, "more": batch["labels"]}

    with pytest.raises(ValueError, match="constants differ.*sample 4"):
        build(model, tmp_path, collator=changing_constant)
    with pytest.raises(ValueError, match="'labels', 'more'.*sample 4"):
        build(model, tmp_path, collator=changing_columns)
    assert list(tmp_path.iterdir()) == []


# Several processes


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_store_does_not_depend_on_how_many_processes_wrote_it(model, tmp_path, processes):
    alone = build(model, tmp_path / "alone")
    spec = make_spec(model, tmp_path / "together")
    stores = on_every_process(processes, lambda group: materialize(spec, group))
    for store in stores:
        assert isinstance(store, FeatureStore), store
    store = stores[0]
    assert store.path.name == alone.path.name and len(store.manifest.shards) == processes
    assert list((tmp_path / "together").iterdir()) == [store.path]
    indices = [21, 0, 5, 5, 12, 3]
    assert torch.equal(store.read(indices), alone.read(indices))
    assert store.dataset.to_dict() == alone.dataset.to_dict()
    assert store.verify()


def test_failure_on_one_process_is_raised_on_all(model, tmp_path, monkeypatch):
    write = ShardWriter.write

    def full(self, *args):
        if "00001-of" in self.path.name:
            raise OSError(28, "No space left on device")
        write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", full)
    spec = make_spec(model, tmp_path)
    errors = on_every_process(2, lambda group: materialize(spec, group))
    assert all(isinstance(error, BuildFailed) and "No space left" in str(error) for error in errors), errors
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_batches_writes_a_complete_store(model, tmp_path):
    spec = make_spec(model, tmp_path, Rows(3))
    for store in on_every_process(4, lambda group: materialize(spec, group)):
        assert isinstance(store, FeatureStore), store
        assert store.read_rows([2, 0])["labels"].tolist() == [2, 0]
