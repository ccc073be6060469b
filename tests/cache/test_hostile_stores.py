"""Stores that anybody may have written: whatever is wrong with one is a `StoreError`, or nothing is."""

import json
import os
import shutil

import pytest
import torch
from support.builds import build, flip
from support.helpers import tiny_vit
from support.hostile_stores import NamedRows, read_manifest, with_checksum, with_constant, write_manifest
from support.packed_stores import build_plain_and_packed

from hf_freezecache import FeatureStore
from hf_freezecache.cache.fingerprint import digest
from hf_freezecache.cache.manifest import StoreError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return build(tiny_vit().eval(), tmp_path_factory.mktemp("stores"), NamedRows(9), collator=with_constant)


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original.path, tmp_path / original.path.name)


def assert_refused_or_equal(path, original, unknown=False):
    """The store is refused in words, or holds what the original one holds, but for constants and grid if `unknown`."""
    try:
        store = FeatureStore.open(path)
        assert store.verify() is True
        rows = store.read_rows(range(9))
    except StoreError:
        return
    expected = original.read_rows(range(9))
    assert unknown or store.manifest == original.manifest
    assert torch.equal(store.read(range(9)), original.read(range(9)))
    assert rows["name"] == expected["name"] and torch.equal(rows["labels"], expected["labels"])


DEEP = json.loads("[" * 500 + "]" * 500)
HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "..",
        "../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "x" * 5000,
        "fp32",
        "float32",
        "zfp",
        "mixed@99",
        "projective",
    ),
    "projective",
    *([], {}, [[]], [0], [-1], [1, 2, 3], [2**40, 2**40], [None], ["a"], {"a": 1}, {"": None}, DEEP),
]


def places(value, path=()):
    """Every field of a JSON value, and every field within."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def replaced(content, place, value):
    if not place:
        return value
    copied = json.loads(json.dumps(content))
    target = copied
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return copied


def test_any_value_in_any_field_of_a_manifest_is_refused_or_harmless(original, copy):
    """The fields of `made_from` are bound to the fingerprint as one."""
    content = read_manifest(copy)
    fields = [place for place in places(content) if place and place[0] != "checksum" and len(place) < 4]
    fields = [place for place in fields if place[0] != "made_from" or len(place) == 1]
    assert len(fields) > 40
    tried = 0
    for place in fields:
        for value in HOSTILE:
            write_manifest(copy, replaced(content, place, value))
            # Only a training knows which constants and which grid are right: it compares them with its own.
            assert_refused_or_equal(copy, original, unknown=place[0] == "constants" or place == ("layout", "grid"))
            tried += 1
    assert tried > 1500


def test_fields_with_other_names_or_without_one_are_refused(original, copy):
    content = read_manifest(copy)
    for place in [place for place in places(content) if place and isinstance(place[-1], str) and len(place) < 4]:
        if place[0] in ("checksum", "made_from", "constants", "lossless"):
            continue
        for name in (None, "../" + place[-1], "x\0", "", "layout"):
            changed = json.loads(json.dumps(content))
            target = changed
            for key in place[:-1]:
                target = target[key]
            value = target.pop(place[-1])
            if name is not None and name not in target:
                target[name] = value
            write_manifest(copy, changed)
            assert_refused_or_equal(copy, original)


@pytest.mark.parametrize("empty", [{"files": {}}, {"shards": []}, {"files": {}, "shards": []}])
def test_store_without_files_is_not_verified(empty, original, copy):
    write_manifest(copy, {**read_manifest(copy), **empty})
    with pytest.raises(StoreError):
        FeatureStore.open(copy).verify()
    store = FeatureStore.open(original.path)
    for name, value in empty.items():
        object.__setattr__(store.manifest, name, value)
    with pytest.raises(StoreError):
        store.verify()


@pytest.mark.parametrize("name", ["manifest.json", "codec.safetensors", "dataset_info.json", "state.json"])
def test_any_flipped_byte_of_a_small_file_is_refused_or_harmless(name, original, copy):
    whole = (copy / name).read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 150)):
        for change in (0x01, 0x20, 0xFF):
            damaged = bytearray(whole)
            damaged[position] ^= change
            (copy / name).write_bytes(damaged)
            assert_refused_or_equal(copy, original)


@pytest.mark.parametrize("name", ["codec.safetensors", "state.json", "data-00000-of-00001.arrow"])
def test_file_whose_checksum_was_made_to_fit_never_escapes(name, copy):
    """Such a store may hold other values, but nothing else than a `StoreError` comes out of it."""
    whole = (copy / name).read_bytes()
    contents = [b"", b"\xff" * 64, b"[" * 100_000, whole[:100], whole + b"x", whole[: len(whole) // 2]]
    for position in range(0, min(len(whole), 4000), 37):
        damaged = bytearray(whole)
        damaged[position] ^= 0x5A
        contents.append(bytes(damaged))
    for content in contents:
        (copy / name).write_bytes(content)
        with_checksum(copy, name)
        try:
            store = FeatureStore.open(copy)
            store.verify()
            store.read_rows(range(9))
        except StoreError:
            pass


def test_state_that_names_files_elsewhere_is_refused(copy):
    state = json.loads((copy / "state.json").read_text())
    state["_data_files"] = [{"filename": "../../secret.arrow"}]
    (copy / "state.json").write_text(json.dumps(state))
    with_checksum(copy, "state.json")
    with pytest.raises(StoreError, match="state.json names other files"):
        FeatureStore.open(copy)


@pytest.mark.parametrize("name", ["codec.safetensors", "state.json", "data-00000-of-00001.arrow", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_of_the_store_is_refused(kind, name, copy, tmp_path):
    (copy / name).rename(tmp_path / "elsewhere")
    if kind == "link":
        (copy / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(copy / name)
    else:
        (copy / name).mkdir()
    with pytest.raises(StoreError):
        FeatureStore.open(copy).verify()


@pytest.mark.parametrize("text", ["[" * 200_000, '{"format_version": ' + "9" * 5000 + "}", '{"a": "\\ud800"}', "\0"])
def test_manifest_that_no_parser_likes_is_refused(text, copy):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match="not a manifest"):
        FeatureStore.open(copy)


def test_cut_codec_and_rows_are_those_of_the_fingerprint(copy):
    content = read_manifest(copy)
    made_from = {**content["made_from"], "cut": 3}
    write_manifest(copy, {**content, "made_from": made_from, "fingerprint": digest(made_from)})
    with pytest.raises(StoreError, match="`cut` is another one"):
        FeatureStore.open(copy)


def test_packed_store_is_checked_as_well(tmp_path):
    _, packed = build_plain_and_packed(tiny_vit().eval(), tmp_path)
    flip(packed.path / packed.manifest.shards[0].name, 300)
    with pytest.raises(StoreError):
        FeatureStore.open(packed.path).verify()
