"""`freezecache plan`: a table on the terminal, and nothing on the disk."""

import json

import pytest
from support import helpers, images
from transformers import ViTImageProcessor

from hf_freezecache.cli.main import main


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a ViT of two layers for 16x16 images, and its processor."""
    folder = tmp_path_factory.mktemp("model")
    helpers.tiny_vit(num_hidden_layers=2).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.parquet"
    images.picture_dataset(20).to_parquet(path)
    return path


def plan_lines(capsys, *options):
    code = main(["plan", *map(str, options), "--cpu", "--batches", "1"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out.splitlines()


def test_plan_prints_a_line_a_cut_and_writes_nothing(classifier, parquet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = plan_lines(capsys, classifier, "--data", parquet, "--batch-size", 8)
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["1", "vit.embeddings", "int4"],
        ["2", "vit.layers.0", "int4"],
        ["3", "vit.layers.1", "int4"],
    ]
    assert lines[4].startswith("Plain training") and "1 view beside the base view" in lines[5]
    assert "of 8 of 20 samples" in lines[5]
    assert list(tmp_path.iterdir()) == []


def test_plan_as_json(classifier, parquet, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (line,) = plan_lines(capsys, classifier, "--data", parquet, "--batch-size", 8, "--cuts", 2, "--json")
    (row,) = json.loads(line)["rows"]
    assert (row["cut"], row["block"], row["codec"]) == (2, "vit.layers.0", "int4")
    assert row["bytes"] == row["base_bytes"] + row["view_bytes"] and row["verdict"]


def test_plan_takes_a_folder_and_the_settings_of_the_cache(classifier, tmp_path, capsys):
    for number, row in enumerate(images.picture_dataset(9)):
        path = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    options = "--cuts 2 --codec fp16 --views 0 --budget 1kB --augmentation none --image-size 32".split()
    lines = plan_lines(capsys, classifier, "--data", tmp_path / "images", *options)
    assert lines[1].split()[:3] == ["2", "vit.layers.0", "fp16"]
    assert "does not fit" in lines[1] and "1 kB left" in lines[1]
    assert lines[2].startswith("Plain training")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.parquet"], "missing.parquet does not exist"),
        (["--cuts", "9"], "from 1 to 3"),
        (["--codec", "jpeg"], "jpeg"),
        (["--label-column", "kind"], "--label-column"),
    ],
)
def test_plan_names_what_is_wrong(classifier, parquet, options, message, capsys):
    assert main(["plan", str(classifier), "--data", str(parquet), "--cpu", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
