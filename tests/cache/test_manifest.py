"""The manifest of a store: what it lists, and what is refused."""

import json

import pytest
from support.builds import build
from support.helpers import tiny_vit

from hf_freezecache import FeatureStore
from hf_freezecache.cache import manifest as manifest_module
from hf_freezecache.cache.manifest import Manifest, StoreError


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


def test_manifest_without_the_entry_is_one_of_a_plain_store(tmp_path):
    store = build(tiny_vit(), tmp_path)
    content = {name: value for name, value in vars(store.manifest).items() if name != "lossless"}
    assert Manifest(**content) == store.manifest
    text = (store.path / "manifest.json").read_bytes()
    assert Manifest.from_json(text, store.path) == store.manifest
