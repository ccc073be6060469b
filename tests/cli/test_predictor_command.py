"""`freezecache predictor`: from a recorded training to a predictor on the Hub."""

import json

import pytest
from support import helpers, images
from support.hub_server import OWNER, WRITER, point_client_to, serving
from support.recorded_runs import made_up_run, made_up_runs
from transformers import ViTImageProcessor

from hf_freezecache.cli.main import main
from hf_freezecache.smartfrz import SmartFrzPolicy
from hf_freezecache.smartfrz.recording import RecordedRun


def call(capsys, *arguments):
    code = main(["predictor", *map(str, arguments)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out, printed.err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for run in made_up_runs(2, 3):
        run.save(folder / f"{run.facts.run}.safetensors")
    return folder


@pytest.fixture(scope="module")
def predictor(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictor") / "made"
    assert main(["predictor", "train", str(runs), str(folder), "--epochs", "2", "--window", "8"]) == 0
    return folder


def test_a_training_is_recorded_once(tmp_path, capsys):
    helpers.tiny_vit(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    images.picture_dataset(24).to_parquet(tmp_path / "images.parquet")
    arguments = [tmp_path / "model", "first", "--output", tmp_path / "runs", "--data", tmp_path / "images.parquet"]
    options = ["--epochs", 2, "--batch-size", 8, "--cpu", "--from-scratch", "--learning-rate", 1e-3]
    code, out, _ = call(capsys, "record", *arguments, *options)
    assert code == 0 and "recorded" in out
    run = RecordedRun.load(tmp_path / "runs" / "first.safetensors")
    assert run.facts.network == "vit" and len(run.progress) == 7 and run.facts.settings["learning_rate"] == 1e-3
    assert "is there already" in call(capsys, "record", *arguments, *options)[1]


def test_labels_are_printed_with_what_other_rules_would_say(runs, capsys):
    code, out, _ = call(capsys, "label", runs, "--json")
    told = json.loads(out)
    assert code == 0 and told["rule"] == {"remaining": 0.02, "floor": 0.005, "window": 3} and len(told["runs"]) == 6
    assert [entry["settled"] for entry in told["sensitivity"][::3]] == sorted(
        entry["settled"] for entry in told["sensitivity"][::3]
    )
    assert "share that is settled, by rule" in call(capsys, "label", runs)[1]


def test_predictor_is_a_folder_for_the_hub_with_a_card(predictor):
    names = {path.name for path in predictor.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "training.json"}
    made = json.loads((predictor / "training.json").read_text())
    assert sorted(made["without_each_network"]) == ["net0", "net1"]
    assert sum(run["validates"] for run in made["runs"]) == 2
    card = (predictor / "README.md").read_text()
    assert "| net0 | made up | 3 |" in card and "by a predictor made without it" in card
    assert SmartFrzPolicy(str(predictor)).predictor.window == 8


def test_evaluation_is_on_other_trainings_and_in_the_card(predictor, runs, tmp_path, capsys):
    code, _, error = call(capsys, "evaluate", predictor, runs)
    assert code == 1 and "was trained on net0-0" in error
    made_up_run("new", "another", 5).save(tmp_path / "new.safetensors")
    code, out, _ = call(capsys, "evaluate", predictor, tmp_path, "--json")
    assert code == 0 and sorted(json.loads(out)) == ["all", "another"]
    assert "| another that it was not made from |" in (predictor / "README.md").read_text()


def test_predictor_is_pushed(predictor, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with serving() as hub:
        point_client_to(hub.url, tmp_path / "cache", monkeypatch.setattr)
        code, out, error = call(capsys, "push", predictor, f"{OWNER}/predictor")
        assert code == 0, error
        assert {"README.md", "config.json", "model.safetensors"} <= set(hub.paths(f"{OWNER}/predictor"))
        assert out.startswith("pushed: ")
        code, _, error = call(capsys, "push", predictor, "somebody/predictor")
        assert code == 1 and "the predictor was not pushed to somebody/predictor" in error and WRITER not in error


def test_folders_without_what_is_asked_for_are_errors_in_words(tmp_path, capsys):
    for arguments in (("label", tmp_path), ("train", tmp_path, tmp_path / "out"), ("push", tmp_path, "ann/x")):
        code, _, error = call(capsys, *arguments)
        assert code == 1 and error.startswith("freezecache: ") and len(error) < 500
