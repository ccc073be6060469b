"""`freezecache inspect`, `verify` and `clean`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from support import helpers, images, zoo
from support.builds import build
from support.helpers import tiny_vit
from support.packed_stores import build_plain_and_packed

from hf_freezecache import FeatureStore
from hf_freezecache.cli import main as cli
from hf_freezecache.cli.main import main
from hf_freezecache.units import show_bytes


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A store of base views alone."""
    return build(zoo.make("vit"), tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module", params=["replayed", "whole"])
def augmented(request, tmp_path_factory):
    """A store with two augmented views, of which sensitive channels are kept, or everything."""
    fraction = 0.25 if request.param == "replayed" else 1.0
    config = helpers.manual("0:2", cache="always", views=2, similarity="cosine", sensitive_fraction=fraction)
    trainer = helpers.run(
        helpers.tiny_vit(),
        images.picture_dataset(16).with_transform(images.replayable()),
        tmp_path_factory.mktemp("training"),
        config,
        num_train_epochs=1,
        remove_unused_columns=False,
    )
    return request.param, FeatureStore.open(trainer.freeze_status().store_path)


def facts(text):
    """The table as a dict: first word group of a line -> the rest."""
    rows = [line.split("  ", 1) for line in text.splitlines() if "  " in line]
    return {name: value.strip() for name, value in rows}


def test_commands_print_json_on_request(plain, tmp_path, capsys):
    folder = tmp_path / "stores"
    shutil.copytree(plain.path, folder / plain.path.name)
    store = str(folder / plain.path.name)
    assert main(["inspect", store, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["path"], manifest["cut"], manifest["codec"], manifest["rows"]) == (store, 2, "int4", 22)
    assert main(["verify", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": store, "ok": True}
    size = sum(file.stat().st_size for file in (folder / plain.path.name).iterdir())
    for options, removed in (([], 0), (["--yes"], size)):
        assert main(["clean", str(folder), "--json", *options]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == {"found": [{"path": store, "bytes": size, "state": "store"}], "removed_bytes": removed}
    assert not list(folder.iterdir())


def test_inspect_prints_the_facts_of_the_manifest(plain, capsys):
    assert main(["inspect", str(plain.path)]) == 0
    found = facts(capsys.readouterr().out)
    assert found["path"] == str(plain.path)
    assert found["cut"] == "2 frozen blocks"
    assert found["codec"] == "int4"
    assert found["feature"] == "17 x 16, float32"
    assert (found["grid"], found["special tokens"]) == ("4 x 4", "1")
    assert found["samples"] == "22"
    assert found["views"] == "0 beside the base view"
    assert "geometry" not in found and "sensitive channels" not in found
    files = [file for file in plain.path.iterdir() if file.is_file()]
    assert found["bytes"] == f"{sum(file.stat().st_size for file in files):,}"
    assert found["bytes a sample"].startswith(f"{plain.bytes / 22:,.0f},")
    for file in files:
        assert found[file.name].startswith(f"{file.stat().st_size:,}")
    assert found["data-00000-of-00001.arrow"].endswith("22 samples")


def test_inspect_prints_what_is_kept_of_the_views(augmented, capsys):
    kind, store = augmented
    assert main(["inspect", str(store.path)]) == 0
    found = facts(capsys.readouterr().out)
    assert found["views"] == "2 beside the base view"
    expected = {"replayed": ("projective", "8 of 32"), "whole": ("none: views are stored whole", "all 32")}[kind]
    assert (found["geometry"], found["sensitive channels"]) == expected


def test_inspect_draws_the_sensitivity_that_was_measured(augmented, tmp_path, monkeypatch, capsys):
    kind, store = augmented
    if kind == "replayed":
        pytest.importorskip("matplotlib")
        monkeypatch.chdir(tmp_path)
        assert main(["inspect", str(store.path), "--sensitivity"]) == 0
        assert main(["inspect", str(store.path), "--sensitivity", "--output", "other.png"]) == 0
        assert "picture: other.png" in capsys.readouterr().out
        for name in ("sensitivity.png", "other.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    else:
        assert main(["inspect", str(store.path), "--sensitivity"]) == 1
        assert "its views are stored whole" in capsys.readouterr().err


def test_inspect_says_why_there_is_no_sensitivity(plain, capsys):
    assert main(["inspect", str(plain.path), "--sensitivity"]) == 1
    captured = capsys.readouterr()
    assert "samples" in captured.out
    assert "it holds the base view alone" in captured.err and "Traceback" not in captured.err


def test_picture_that_cannot_be_written_is_an_error(augmented, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    kind, store = augmented
    if kind == "replayed":
        output = str(tmp_path / "missing" / "picture.png")
        assert main(["inspect", str(store.path), "--sensitivity", "--output", output]) == 1
        assert "missing" in capsys.readouterr().err


def test_output_without_sensitivity_is_refused(plain, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(plain.path), "--output", "picture.png"])
    assert stopped.value.code == 2
    assert "--sensitivity" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_folder_that_is_no_store_is_an_error(command, tmp_path, capsys):
    assert main([command, str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and f"{tmp_path} is not a feature store" in captured.err


def test_verify_finds_damage_inside_a_file(plain, tmp_path, capsys):
    path = shutil.copytree(plain.path, tmp_path / "store")
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: ok\n"
    shard = path / "data-00000-of-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(path)]) == 0
    capsys.readouterr()
    assert main(["verify", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and f"{shard} is damaged" in captured.err


# Cleaning


@pytest.fixture
def crowded(plain, tmp_path):
    """A folder with a store, a damaged one, leftovers of builds, and things that are none of our business."""
    folder = tmp_path / "stores"
    folder.mkdir()
    store = shutil.copytree(plain.path, folder / plain.path.name)
    damaged = folder / ("0" * 32)
    damaged.mkdir()
    (damaged / "manifest.json").write_text('{"fingerprint": "%s"}' % ("0" * 32))
    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = folder / f"{'a' * 32}.tmp-{host}-{dead.pid}-01234567"
    running = folder / f"{'a' * 32}.tmp-{host}-{os.getpid()}-01234567"
    elsewhere = folder / f"{'a' * 32}.tmp-another-machine-{dead.pid}-01234567"
    removed, begun = (folder / f"{'d' * 32}{end}" for end in (".removed.tmp-0123abcd", ".partial"))
    given_up = folder / f"{'e' * 32}.partial"
    for directory in (left, running, elsewhere, removed, begun, given_up):
        directory.mkdir()
        (directory / "data-00000-of-00001.arrow").write_bytes(bytes(1000))
    for path in (given_up, *given_up.iterdir()):
        os.utime(path, (time.time() - 4000,) * 2)
    (folder / ("b" * 32)).mkdir()  # a name like a store's, and nothing that says so
    (folder / "photos").mkdir()
    (folder / "photos" / "manifest.json").write_text('{"fingerprint": "photos"}')
    (folder / "notes.txt").write_text("mine")
    os.symlink(plain.path, folder / ("c" * 32))
    return folder, {store, damaged, left, removed, given_up}, {running, elsewhere, begun}


def test_clean_lists_and_removes_nothing_unless_told(crowded, capsys):
    folder, stores, building = crowded
    before = sorted(folder.rglob("*"))
    for options in ([], ["--dry-run"]):
        assert main(["clean", str(folder), *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {line.split()[-1] for line in lines[:-1]} == {str(path) for path in stores | building}
        assert sum("being built, stays" in line for line in lines) == 3
        assert "nothing was removed" in lines[-1]
        assert sorted(folder.rglob("*")) == before


def test_clean_removes_stores_and_leftovers_alone(crowded, plain, capsys):
    folder, stores, building = crowded
    others = set(folder.iterdir()) - stores
    freed = sum(file.stat().st_size for path in stores for file in path.rglob("*"))
    assert main(["clean", str(folder), "--yes"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"removed {show_bytes(freed)}"
    assert set(folder.iterdir()) == others and building <= others
    assert plain.verify()
    old = time.time() - 2 * 24 * 3600
    (elsewhere,) = (path for path in building if "another-machine" in path.name)
    for path in (elsewhere, *elsewhere.iterdir()):
        os.utime(path, (old, old))
    assert main(["clean", str(folder), "--yes"]) == 0
    assert set(folder.iterdir()) == others - {elsewhere}


def test_clean_of_what_holds_no_stores_says_so(tmp_path, capsys):
    assert main(["clean", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no stores, and none in a folder _freeze_cache of it\n"
    assert main(["clean", str(tmp_path / "missing")]) == 1
    assert "is not a directory" in capsys.readouterr().err


def test_inspect_says_that_rows_are_packed(tmp_path, capsys):
    plain, packed = build_plain_and_packed(tiny_vit(), tmp_path)
    for store, expected in ((plain, "int4"), (packed, "int4, every row packed with zstd")):
        assert cli.main(["inspect", str(store.path)]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("codec  ")]
        assert line.removeprefix("codec").strip() == expected


def test_clean_finds_the_stores_of_a_training_by_its_folder(tmp_path, capsys):
    store = tmp_path / "run" / "_freeze_cache" / ("ab" * 16)
    store.mkdir(parents=True)
    (store / "manifest.json").write_text(json.dumps({"fingerprint": store.name}))
    assert main(["clean", str(tmp_path / "run")]) == 0
    assert str(store) in capsys.readouterr().out and store.exists()
    assert main(["clean", str(tmp_path / "run"), "--yes"]) == 0
    assert not store.exists()
