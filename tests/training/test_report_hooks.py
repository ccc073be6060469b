"""What a training leaves for people: its record, pictures, a page, and numbers in the logs."""

import json

import pytest
from support.helpers import losses, manual, messages, pixel_dataset, run, tiny_vit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

import hf_freezecache
from hf_freezecache import FreezeCacheConfig
from hf_freezecache.hub.card import describe_hardware, library_versions
from hf_freezecache.reporting.run_record import RECORD, read_record


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(folder, config, **settings):
    return run(
        tiny_vit(),
        pixel_dataset(),
        folder,
        config,
        eval_dataset=pixel_dataset(16, seed=1),
        eval_strategy="epoch",
        compute_metrics=accuracy,
        **settings,
    )


def test_record_tells_epochs_costs_and_decisions(tmp_path, caplog):
    trainer = train(tmp_path, manual("2:3", codec="int8"))
    record, report = read_record(tmp_path), trainer.freeze_cache_report()
    assert [(entry["epoch"], entry["cut"], entry["mode"], entry["steps"]) for entry in record.epochs] == [
        (0, 0, "live", 4),
        (1, 0, "live", 4),
        (2, 3, "replay", 4),
        (3, 3, "replay", 4),
    ]
    assert record.epochs[2]["store_bytes"] == trainer.freeze_status().store_bytes
    ends = [second for entry in record.epochs for second in (entry["begin"], entry["end"])]
    assert ends == sorted(ends)
    assert [point[2] for point in record.curve("loss")] == losses(trainer)
    assert len(record.curve("eval_accuracy")) == 4 and record.metric == "eval_accuracy"
    assert record.phases == report.to_dict()["phases"]
    assert record.blocks == trainer._session.chain.names
    assert any("Built the feature store" in note["text"] and note["epoch"] == 1 for note in record.notes)
    assert record.store["codec"] == "int8" and record.store["samples"] == 32
    assert record.run["settings"]["codec"] == "'int8'" and "feature_cache_dir" not in record.run["settings"]
    assert "What the training has cost" in messages(caplog)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [RECORD]


def test_pictures_and_a_page_are_made_on_request(tmp_path):
    train(tmp_path, manual("1:2", report="html"), num_train_epochs=2)
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert names == {RECORD, "freeze_cache_report.png", "freeze_cache_report.html"}
    assert "2 of 4 blocks" in (tmp_path / "freeze_cache_report.html").read_text()


def test_without_matplotlib_pages_are_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf_freezecache\[recipes\]"):
        train(tmp_path, manual("1:2", report="html"), num_train_epochs=2)


def test_nothing_is_left_if_nobody_asks(tmp_path, caplog):
    trainer = train(tmp_path, manual("1:2", report="none"), num_train_epochs=2)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("freeze/")]
    assert "What the training has cost" not in messages(caplog)
    train(tmp_path / "plain", FreezeCacheConfig(policy="none"), num_train_epochs=1)
    assert not [path for path in (tmp_path / "plain").glob("*") if path.is_file()]


def test_resumed_training_goes_on_with_the_record(tmp_path):
    settings = dict(save_strategy="epoch")
    whole = train(tmp_path, manual("2:3"), **settings)
    before = read_record(tmp_path)
    (tmp_path / RECORD).unlink()
    train(tmp_path, manual("2:3"), resume=str(tmp_path / "checkpoint-12"), **settings)
    after = read_record(tmp_path)
    what = ("epoch", "cut", "mode", "steps")
    assert [[entry[name] for name in what] for entry in after.epochs] == [
        [entry[name] for name in what] for entry in before.epochs
    ]
    assert [point[1:] for point in after.curve("loss")] == [point[1:] for point in before.curve("loss")]
    assert [point[2] for point in after.curve("loss")] == losses(whole)
    seconds = [entry["seconds"] for entry in after.logs]
    assert seconds == sorted(seconds) and len(seconds) == len(after.logs)


def test_record_that_cannot_be_written_costs_no_training(tmp_path, caplog):
    (tmp_path / RECORD).mkdir()
    trainer = train(tmp_path, manual("1:2"), num_train_epochs=2)
    assert trainer.state.global_step == 8
    assert "The report could not be written" in messages(caplog)


def test_training_that_breaks_off_leaves_no_record(tmp_path):
    class Impatient(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise RuntimeError("out of patience")

    with pytest.raises(RuntimeError, match="patience"):
        run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2"), callbacks=[Impatient()])
    assert not (tmp_path / RECORD).exists()


def test_tensorboard_shows_the_freeze(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train(tmp_path / "run", manual("2:3"), report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values["train/freeze/cut"] == [0] * 8 + [3] * 8
    assert values["train/freeze/replaying"] == [0] * 8 + [1] * 8
    cached = values["train/freeze/cache_gb"]
    assert not any(cached[:8]) and len(set(cached[8:])) == 1 and cached[8] > 0
    saved = values["train/freeze/flops_saved"]
    assert saved[6] == pytest.approx(0, abs=0.2) and saved[15] > saved[8]
    assert values["train/freeze/step_speedup"][6] == pytest.approx(1)


def test_logs_are_json(tmp_path):
    trainer = train(tmp_path, manual("1:2"), num_train_epochs=2)
    json.dumps(trainer.state.log_history, allow_nan=False)


@pytest.mark.parametrize(
    "metric",
    [{"$^$": 0.5}, {"large": 10**400}, {"f1": float("nan")}, {"_": 0.5}],
    ids=["formula", "large", "nan", "_"],
)
def test_names_and_numbers_of_any_kind_break_no_training(metric, tmp_path):
    settings = dict(eval_dataset=pixel_dataset(8), eval_strategy="epoch", compute_metrics=lambda prediction: metric)
    config = manual("1:2", report="html")
    trainer = run(
        tiny_vit(), pixel_dataset(), tmp_path, config, num_train_epochs=2, run_name="$\\frac \udcff", **settings
    )
    assert len(losses(trainer)) == 8
    assert (tmp_path / "freeze_cache_report.png").exists()
    assert "$\\frac" in (tmp_path / "freeze_cache_report.html").read_text()
    (name,) = metric
    assert len(read_record(tmp_path).curve(f"eval_{name}")) == (2 if metric[name] == 0.5 else 0)


def test_report_that_cannot_be_drawn_is_no_error_of_the_training(tmp_path, monkeypatch, caplog):
    def fail(record, path):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("hf_freezecache.training.report_hooks.draw_run", fail)
    trainer = train(tmp_path, manual("1:2", report="html"), num_train_epochs=2)
    assert len(losses(trainer)) == 8 and (tmp_path / RECORD).exists()
    assert f"The report could not be written to {tmp_path}: no fonts (RuntimeError)" in messages(caplog)


def test_record_names_releases_and_hardware_as_cards_do(tmp_path):
    trainer = train(tmp_path, manual("1:2"), num_train_epochs=2)
    versions = read_record(tmp_path).run["versions"]
    assert versions == {**library_versions(), "hardware": describe_hardware(trainer.args)}
    assert versions["hf_freezecache"] == hf_freezecache.__version__ and "CPU" in versions["hardware"]


def test_epoch_that_is_resumed_in_its_middle_is_one_epoch(tmp_path):
    train(tmp_path, manual("1:2"), save_strategy="steps", save_steps=6)
    train(tmp_path, manual("1:2"), save_strategy="no", resume=str(tmp_path / "checkpoint-6"))
    entries = [(entry["epoch"], entry["steps"], entry["mode"]) for entry in read_record(tmp_path).epochs]
    assert entries == [(0, 4, "live"), (1, 4, "replay"), (2, 4, "replay"), (3, 4, "replay")]
