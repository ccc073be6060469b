"""Stores in remote places: fetched, uploaded, checked; nothing there costs a training."""

import json
import logging
import shutil

import fsspec
import pytest
from support.builds import Rows, build, flip
from support.helpers import messages, tiny_vit

from hf_freezecache.cache.manifest import StoreError
from hf_freezecache.cache.remote import RemoteStores
from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.cache.urls import LOCAL_COPIES, check_url, is_url, local_copy


@pytest.fixture
def store(tmp_path):
    return build(tiny_vit(), tmp_path / "built")


@pytest.fixture(params=["memory", pytest.param("file", marks=pytest.mark.slow)])
def place(request, tmp_path):
    """The URL of an empty remote place."""
    if request.param == "file":
        yield f"file://{tmp_path}/remote"
        return
    files = fsspec.filesystem("memory")
    yield "memory://team/cache"
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def uploaded(store, place):
    remote = RemoteStores(place)
    remote.upload(store.path)
    files, root = fsspec.core.url_to_fs(place)
    return files, f"{root}/{store.path.name}"


def copy_of(store, place, tmp_path):
    """The local copy that another machine makes; None if it makes none."""
    path = tmp_path / "copy" / store.path.name
    path.parent.mkdir(exist_ok=True)
    RemoteStores(place).fetch(path)
    return FeatureStore.open(path) if path.exists() else None


def only_store(tmp_path):
    """Nothing is left in the folder of copies but complete stores."""
    return [path.name for path in (tmp_path / "copy").iterdir()]


def test_uploaded_store_is_fetched_byte_for_byte(store, place, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    assert not RemoteStores(place).has_stores()
    files, root = uploaded(store, place)
    copy = copy_of(store, place, tmp_path)
    assert copy.verify() and copy.dataset[:] == store.dataset[:]
    for name in ("manifest.json", *(shard.name for shard in store.manifest.shards)):
        assert (copy.path / name).read_bytes() == (store.path / name).read_bytes()
    assert RemoteStores(place).has_stores() and only_store(tmp_path) == [store.path.name]
    assert "Uploaded the feature store" in messages(caplog) and "Downloaded the feature store" in messages(caplog)
    before = sorted(files.find(root))
    RemoteStores(place).upload(store.path)  # it is there
    assert sorted(files.find(root)) == before


def test_store_without_a_manifest_is_none(store, place, tmp_path):
    """An upload that was broken off; the next one completes it."""
    files, root = uploaded(store, place)
    files.rm_file(f"{root}/manifest.json")
    assert copy_of(store, place, tmp_path) is None and only_store(tmp_path) == []
    uploaded(store, place)
    assert copy_of(store, place, tmp_path).verify()


def test_builders_of_other_bytes_leave_one_whole_store(store, place, tmp_path):
    """Two machines build at once, with other bytes, and the second manifest replaces the first."""
    files, root = uploaded(store, place)
    other = tmp_path / "other" / store.path.name
    shutil.copytree(store.path, other)
    content = json.loads((other / "manifest.json").read_text())
    assert FeatureStore.open(other).verify()
    text = json.dumps(content)  # the same in other bytes
    (other / "manifest.json").write_text(text)
    files.rm_file(f"{root}/manifest.json")
    uploaded(FeatureStore.open(other), place)
    assert len([entry for entry in files.ls(root, detail=False) if "manifest.json" not in str(entry)]) == 2
    copy = copy_of(store, place, tmp_path)
    assert copy.verify() and (copy.path / "manifest.json").read_text() == text


def damage(files, path, change):
    content = bytearray(files.cat_file(path))
    files.pipe_file(path, bytes(change(content)))


CHANGES = {
    "a flipped bit": lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    "cut short": lambda content: content[:-1],
    "longer": lambda content: content + b"0",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("kind", ["manifest.json", "data-", "codec", "state"])
@pytest.mark.parametrize("change", CHANGES)
def test_damaged_remote_store_is_refused_and_replaced(store, kind, change, place, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    files, root = uploaded(store, place)
    [path] = [entry for entry in files.find(root) if kind in entry.rpartition("/")[2]]
    damage(files, path, CHANGES[change])
    with pytest.raises(StoreError):
        RemoteStores(place).verify(store.path.name)
    remote = RemoteStores(place)
    target = tmp_path / "copy" / store.path.name
    target.parent.mkdir()
    remote.fetch(target)
    assert only_store(tmp_path) == [] and "is not used" in messages(caplog)
    remote.upload(store.path)  # it was built here then
    assert copy_of(store, place, tmp_path).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["files"].update({"../outside": content["files"]["state.json"]}),
            "not what a manifest",
        ),
        (lambda content: content["shards"][0].update(name="../../outside.arrow"), "list of its Arrow files"),
        (lambda content: content["shards"][0].update(name="/tmp/outside.arrow"), "list of its Arrow files"),
        (lambda content: content["shards"][0].update(bytes=2**59), "are left"),
        (lambda content: content.update(rows=2**59), "contradicts itself"),
        (lambda content: content.update(made_from={}), "fingerprint"),
        (
            lambda content: content["files"].update({f"x{n}": content["files"]["state.json"] for n in range(99)}),
            "names 102 files",
        ),
    ],
)
def test_hostile_manifest_is_refused_before_anything_is_read(change, message, store, place, tmp_path, caplog):
    from hf_freezecache.cache.manifest import _content_checksum

    caplog.set_level(logging.WARNING)
    files, root = uploaded(store, place)
    content = json.loads(files.cat_file(f"{root}/manifest.json"))
    content.pop("checksum")
    change(content)
    files.pipe_file(f"{root}/manifest.json", json.dumps({**content, "checksum": _content_checksum(content)}).encode())
    assert copy_of(store, place, tmp_path) is None and message in messages(caplog)
    assert only_store(tmp_path) == [] and not (tmp_path / "out").exists()


def test_manifest_of_another_store_is_refused(store, place, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    other = build(tiny_vit(), tmp_path / "built", Rows(10))
    files, root = uploaded(store, place)
    uploaded(other, place)
    files.pipe_file(f"{root}/manifest.json", (other.path / "manifest.json").read_bytes())
    assert copy_of(store, place, tmp_path) is None and "is that of another store" in messages(caplog)


def test_store_that_the_budget_does_not_hold_is_not_fetched(store, place, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    uploaded(store, place)
    remote = RemoteStores(place)
    remote.limit = lambda cut, path: store.total_bytes - 1
    path = tmp_path / "copy" / store.path.name
    path.parent.mkdir()
    remote.fetch(path)
    assert only_store(tmp_path) == [] and "cache_budget" in messages(caplog)


def test_place_that_fails_is_left_alone_from_then_on(store, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    remote, calls = RemoteStores("memory://team/cache"), []

    def fail(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("no route")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    remote.fetch(tmp_path / store.path.name)
    remote.fetch(tmp_path / store.path.name)
    remote.upload(store.path)
    assert len(calls) == 1 and not remote.has_stores()
    log = messages(caplog)
    assert log.count("no route (ConnectionError)") == 1 and "goes on with local feature stores" in log


def test_copy_that_cannot_be_written_costs_nothing(store, place, tmp_path, caplog, monkeypatch):
    from hf_freezecache.cache import remote as module

    caplog.set_level(logging.WARNING)
    uploaded(store, place)
    monkeypatch.setattr(module, "disk_limit", lambda directory, limit: 10)
    assert copy_of(store, place, tmp_path) is None and "are left" in messages(caplog)


def test_local_copies_are_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv(LOCAL_COPIES, str(tmp_path))
    first, second = local_copy("s3://bucket/a"), local_copy("s3://bucket/b")
    assert first.parent == second.parent == tmp_path and first != second
    assert local_copy("s3://bucket/a/") == first
    monkeypatch.delenv(LOCAL_COPIES)
    assert local_copy("s3://bucket/a").parent.name == "freezecache"


def test_urls_that_cannot_be_places_are_refused():
    assert is_url("s3://bucket/prefix") and not is_url("/data/s3") and not is_url("C:/data") and not is_url("data")
    for url, kind, message in [
        ("memory://", ValueError, "no URL of a remote folder"),
        ("simplecache::memory://a", ValueError, "chains of protocols|no URL"),
        ("s3://key:secret@bucket/a", ValueError, "names or passwords"),
        ("nothing://a", ValueError, "fsspec does not know"),
        ("adl://a/b", ImportError, "needs a package"),
    ]:
        with pytest.raises(kind, match=message):
            check_url(url)


def test_missing_package_of_a_protocol_is_named(monkeypatch):
    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ImportError, match="pip install s3fs"):
        check_url("s3://bucket/prefix")


def test_flip_is_seen_locally_too(store):
    """The copy is verified again where it is opened, as any store."""
    flip(store.path / store.manifest.shards[0].name, 500)
    with pytest.raises(StoreError):
        store.verify()
