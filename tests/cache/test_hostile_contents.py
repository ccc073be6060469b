"""Stores whose checksums fit, but not their contents: absurd amounts, foreign columns, scales that are no numbers."""

import json
import multiprocessing
import os
import resource
import shutil
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load, save
from support.builds import build
from support.helpers import tiny_vit
from support.hostile_stores import NamedRows, read_manifest, with_checksum, with_constant, write_manifest

from hf_freezecache import FeatureStore
from hf_freezecache.cache.cleaning import find_stores
from hf_freezecache.cache.holdings import is_owned
from hf_freezecache.cache.leases import STALE_AFTER, Lease, holders
from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.cache.small_files import LARGEST_JSON, read_small

SHARD = "data-00000-of-00001.arrow"
#: Memory that a hostile store may make a process take, in bytes.
ALLOWED = 200 << 20


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return build(tiny_vit().eval(), folder, NamedRows(9), collator=with_constant, codec="int4")


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original.path, tmp_path / original.path.name)


def read_all(path):
    store = FeatureStore.open(path)
    store.verify()
    return store.read_rows(range(9)), store.read(range(9))


# Amounts


def numbers_in(value, path=()):
    if type(value) is int:
        yield path
    for key, entry in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from numbers_in(entry, (*path, key))


def with_number(content, place, number):
    copied = json.loads(json.dumps(content))
    target = copied
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = number
    return copied


def read_in_little_memory(path, results):
    """Runs in a process of its own, which gets no more memory than it has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ALLOWED, now + ALLOWED))
    content, tried, refused = read_manifest(path), 0, 0
    for place in list(numbers_in(content)):
        if place[0] in ("made_from", "format_version"):
            continue
        for number in (2**24, 2**31, 2**40, 2**60):
            write_manifest(path, with_number(content, place, number))
            tried += 1
            try:
                read_all(path)
            except StoreError:
                refused += 1
    results.put((tried, refused))


def test_absurd_numbers_are_refused_before_memory_is_taken(copy):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=read_in_little_memory, args=(copy, results))
    process.start()
    tried, refused = results.get(timeout=120)
    process.join(timeout=60)
    assert process.exitcode == 0 and tried == refused > 40


@pytest.mark.parametrize("name", ["manifest.json", "codec.safetensors", "state.json", "dataset_info.json"])
def test_huge_file_is_refused_unread(name, copy):
    os.truncate(copy / name, 1 << 40)  # takes no place on the disk
    if name != "manifest.json":
        content = read_manifest(copy)
        content["files"][name]["bytes"] = 1 << 40
        write_manifest(copy, content)
    begin = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match="bytes"):
            FeatureStore.open(copy)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23 and time.monotonic() - begin < 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_json_that_becomes_much_in_memory_is_refused(name, copy):
    (copy / name).write_text('{"_data_files": [' + "[]," * LARGEST_JSON + "[]]}")
    if name != "manifest.json":
        with_checksum(copy, name)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match="bytes"):
            FeatureStore.open(copy)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_manifest_that_could_not_be_read_again_is_not_written(original):
    object.__setattr__(original.manifest, "constants", {"text": "x" * LARGEST_JSON})
    try:
        with pytest.raises(StoreError, match="can be read again"):
            original.manifest.to_json()
    finally:
        object.__setattr__(original.manifest, "constants", {"return_loss": True, "scale": 0.5})


# Codecs


def replaced(name, change):
    def change_one(tensors):
        tensors[name] = change(tensors[name])

    return change_one


def at_channel(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(replaced(name, at_channel(value)) for name in ("scale", "offset") for value in (float("nan"), float("inf"))),
        replaced("scale", at_channel(-1.0)),
        *(replaced("scale", lambda tensor, dtype=dtype: tensor.to(dtype)) for dtype in (torch.float64, torch.int8)),
        *(replaced("offset", lambda tensor, dtype=dtype: tensor.to(dtype)) for dtype in (torch.float16, torch.bool)),
        replaced("scale", lambda tensor: tensor[:-1]),
        replaced("scale", lambda tensor: tensor[:, None]),
        replaced("offset", lambda tensor: tensor[:0]),
        lambda tensors: tensors.pop("scale"),
        lambda tensors: tensors.update(more=torch.zeros(4)),
        lambda tensors: tensors.clear(),
        lambda tensors: tensors.update(view_channels=torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_tensors_that_are_no_scales_are_refused(change, copy):
    tensors = load((copy / "codec.safetensors").read_bytes())
    change(tensors)
    (copy / "codec.safetensors").write_bytes(save({name: value.contiguous() for name, value in tensors.items()}))
    with_checksum(copy, "codec.safetensors")
    with pytest.raises(StoreError, match="codec.safetensors does not fit|tensors of the views do not fit"):
        FeatureStore.open(copy)


# Columns


def table_of(path):
    with pa.ipc.open_stream((path / SHARD).read_bytes()) as reader:  # not mapped: the file is written again
        return reader.read_all()


def column_of(kind):
    """Nine values of a type that no store has."""
    if pa.types.is_struct(kind):
        return pa.array([{"a": row} for row in range(9)], kind)
    if pa.types.is_dictionary(kind):
        return pa.array(["a"] * 9).dictionary_encode()
    if pa.types.is_map(kind):
        return pa.array([[("a", row)] for row in range(9)], kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind):
        return pa.array([[row] * (row % 3) for row in range(9)], kind)
    if pa.types.is_null(kind):
        return pa.nulls(9)
    if pa.types.is_run_end_encoded(kind):
        return pa.RunEndEncodedArray.from_arrays(pa.array([9], pa.int32()), pa.array([1], pa.int64()))
    if pa.types.is_union(kind):
        return pa.UnionArray.from_sparse(pa.array([0] * 9, pa.int8()), [pa.array(range(9))])
    return pa.array([None] + [1] * 8, pa.int64()).fill_null(0).cast(kind)


FOREIGN = [
    *(pa.struct([("a", pa.int64())]), pa.map_(pa.string(), pa.int64()), pa.null()),
    *(pa.dictionary(pa.int32(), pa.string()), pa.run_end_encoded(pa.int32(), pa.int64())),
    *(pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_view(pa.int64())),
    *(pa.int8(), pa.uint64(), pa.float64(), pa.timestamp("ns"), pa.date64(), pa.decimal128(38, 2), pa.bool_()),
    pa.sparse_union([pa.field("a", pa.int64())]),
]


@pytest.mark.parametrize("kind", FOREIGN, ids=str)
@pytest.mark.parametrize("name", ["labels", "base"])
def test_foreign_type_of_a_column_is_refused(name, kind, copy):
    table = table_of(copy)
    table = table.set_column(table.schema.get_field_index(name), name, column_of(kind))
    with pa.OSFile(str(copy / SHARD), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with_checksum(copy, SHARD)
    with pytest.raises(StoreError):
        read_all(copy)


class Foreign(pa.ExtensionType):
    """A type that this process knows."""

    def __init__(self):
        super().__init__(pa.int64(), "tests.foreign")

    def __arrow_ext_serialize__(self):
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls()


@pytest.fixture
def foreign_type():
    pa.register_extension_type(Foreign())
    yield Foreign()
    pa.unregister_extension_type("tests.foreign")


@pytest.mark.parametrize("how", ["compressed", "file", "nulls", "extension", "one more", "one less", "fewer rows"])
def test_arrow_file_of_another_kind_is_refused(how, copy, foreign_type):
    table, options = table_of(copy), None
    if how == "compressed":
        options = pa.ipc.IpcWriteOptions(compression="zstd")
    elif how == "nulls":
        place = table.schema.get_field_index("labels")
        table = table.set_column(place, table.schema.field(place), pa.array([None, *range(8)], pa.int64()))
    elif how == "extension":
        column = pa.ExtensionArray.from_storage(foreign_type, pa.array(range(9)))
        table = table.set_column(table.schema.get_field_index("labels"), "labels", column)
    elif how == "one more":
        table = table.append_column("more", pa.array(range(9)))
    elif how == "one less":
        table = table.drop_columns(["name"])
    elif how == "fewer rows":
        table = table.slice(0, 8)
    make = pa.ipc.new_file if how == "file" else pa.ipc.new_stream
    with pa.OSFile(str(copy / SHARD), "wb") as sink, make(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    with_checksum(copy, SHARD)
    with pytest.raises(StoreError):
        read_all(copy)


# What is read beside the files of a manifest


def put(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"[" * 100)
        os.truncate(path, 1 << 40)


KINDS = ["pipe", "link", "folder", "huge"]


@pytest.mark.parametrize("kind", KINDS)
def test_lease_that_is_no_lease_is_not_waited_for(kind, tmp_path):
    put(tmp_path / ".lease-a", kind)
    assert holders(tmp_path) == [None]
    os.utime(tmp_path / ".lease-a", (time.time() - STALE_AFTER - 60,) * 2, follow_symlinks=False)
    assert holders(tmp_path) == []
    Lease.take(tmp_path)  # deletes it if it can


@pytest.mark.parametrize("kind", KINDS)
def test_owner_that_is_none_is_nobody(kind, tmp_path):
    put(tmp_path / ".owner", kind)
    assert is_owned(tmp_path, "f" * 32) is False


@pytest.mark.parametrize("kind", KINDS)
def test_directory_whose_manifest_is_none_is_no_store(kind, copy):
    put(copy / "manifest.json", kind)
    assert find_stores(copy.parent) == []


def test_small_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_small(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_small(tmp_path / "file", 4)
