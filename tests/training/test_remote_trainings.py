"""A team builds a store once: trainings with `feature_cache_dir` in an object store."""

import json
import logging
import socket

import fsspec
import pytest
from support.builds import flip
from support.helpers import losses, manual, messages, pixel_dataset, run, tiny_vit
from support.s3_server import BUCKET, point_s3_to, s3_server

from hf_freezecache.cache.urls import LOCAL_COPIES
from hf_freezecache.cli.main import main

URL = f"s3://{BUCKET}/features"


def train_on(machine, url, tmp_path, monkeypatch, **settings):
    """A training on a machine, which has a folder of its own for local copies."""
    monkeypatch.setenv(LOCAL_COPIES, str(tmp_path / machine))
    config = manual("0:2", **{"feature_cache_dir": url, **settings})
    return run(tiny_vit(), pixel_dataset(24), tmp_path / f"run-{machine}", config, num_train_epochs=2)


def modes(trainer):
    return [phase.mode for phase in trainer.freeze_cache_report().phases]


def check_team(url, tmp_path, monkeypatch, caplog):
    """One machine builds, the other one downloads; both train the same."""
    caplog.set_level(logging.WARNING)
    first = train_on("first", url, tmp_path, monkeypatch)
    assert "Uploaded the feature store" in messages(caplog)
    caplog.clear()
    second = train_on("second", url, tmp_path, monkeypatch)
    log = messages(caplog)
    assert "Downloaded the feature store" in log and "Reusing the feature store" in log and "Built" not in log
    assert losses(second) == losses(first) and first.freeze_status().replaying and second.freeze_status().replaying
    path = second.freeze_status().store_path
    assert path.parent.parent == tmp_path / "second" and path.is_dir()
    return f"{url}/{path.name}"


def test_second_machine_downloads_what_the_first_one_has_built(tmp_path, monkeypatch, caplog, capsys):
    with s3_server(monkeypatch):
        store = check_team(URL, tmp_path, monkeypatch, caplog)
        assert main(["verify", store]) == 0 and main(["inspect", store]) == 0
        assert "frozen blocks" in capsys.readouterr().out
        assert main(["clean", URL]) == 1 and "freezecache clean" in capsys.readouterr().err
        # A damaged file there is found, and the store is built here and put right there.
        files = fsspec.filesystem("s3")
        [shard] = [file for file in files.find(store.removeprefix("s3://")) if file.endswith(".arrow")]
        content = bytearray(files.cat_file(shard))
        content[len(content) // 2] ^= 1
        files.pipe_file(shard, bytes(content))
        assert main(["verify", store]) == 1 and "is damaged" in capsys.readouterr().err
        caplog.clear()
        third = train_on("third", URL, tmp_path, monkeypatch)
        assert "is not used" in messages(caplog) and "Built the feature store" in messages(caplog)
        assert third.freeze_status().replaying and main(["verify", store]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_other_places_of_fsspec_work_as_well(protocol, tmp_path, monkeypatch, caplog, capsys):
    url = f"{protocol}://{tmp_path}/remote"
    store = check_team(url, tmp_path, monkeypatch, caplog)
    capsys.readouterr()
    assert main(["inspect", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cut"] == 2
    assert main(["verify", f"{url}/{'0' * 32}"]) == 1 and "has no manifest.json" in capsys.readouterr().err
    assert main(["inspect", store, "--sensitivity"]) == 1 and "local copy" in capsys.readouterr().err


def test_place_that_nobody_answers_for_costs_no_training(tmp_path, monkeypatch, caplog):
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        point_s3_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        caplog.set_level(logging.WARNING)
        trainer = train_on("first", URL, tmp_path, monkeypatch)
    log = messages(caplog)
    assert log.count("goes on with local feature stores") == 1 and "Built the feature store" in log
    assert trainer.freeze_status().replaying and "build" in modes(trainer)


@pytest.mark.slow
def test_damaged_local_copy_is_downloaded_again(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    url = f"memory://{tmp_path}/remote"
    first = train_on("first", url, tmp_path, monkeypatch)
    [shard] = first.freeze_status().store_path.glob("*.arrow")
    flip(shard, 900)
    caplog.clear()
    again = train_on("first", url, tmp_path, monkeypatch)
    log = messages(caplog)
    assert "could not be reused" in log and "Downloaded the feature store" in log and "Built" not in log
    assert losses(again) == losses(first)


@pytest.mark.slow
def test_stores_of_earlier_cuts_stay_for_the_team(tmp_path, monkeypatch):
    url = f"memory://{tmp_path}/remote"
    monkeypatch.setenv(LOCAL_COPIES, str(tmp_path / "copies"))
    config = manual("0:2,1:3", feature_cache_dir=url)
    trainer = run(tiny_vit(), pixel_dataset(24), tmp_path / "run", config, num_train_epochs=2)
    files, root = fsspec.core.url_to_fs(url)
    assert len(files.ls(root, detail=False)) == 2
    assert [path.name for path in trainer.freeze_status().store_path.parent.iterdir()] == [
        trainer.freeze_status().store_path.name
    ]


@pytest.mark.slow
def test_cached_evaluations_are_shared_as_well(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    url = f"memory://{tmp_path}/remote"
    for machine in ("first", "second"):
        caplog.clear()
        monkeypatch.setenv(LOCAL_COPIES, str(tmp_path / machine))
        config = manual("0:2", feature_cache_dir=url, cache_eval=True)
        data = dict(eval_dataset=pixel_dataset(16, seed=5), eval_strategy="epoch", num_train_epochs=3)
        run(tiny_vit(), pixel_dataset(24), tmp_path / f"run-{machine}", config, **data)
    assert messages(caplog).count("Downloaded the feature store") == 2
