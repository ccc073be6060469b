"""The `freezecache` command."""

import shutil

import helpers
import images
import pytest
import zoo
from builds import build

from hf_freezecache import FeatureStore
from hf_freezecache.cli import main


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
    expected = {"replayed": ("projective", "8 of 32"), "whole": ("none: views are kept whole", "all 32")}[kind]
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
        assert "its views are kept whole" in capsys.readouterr().err


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
