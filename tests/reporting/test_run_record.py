"""The record of a training as a file."""

import json

import pytest
from support.records import PHASE, make_record

from hf_freezecache.reporting.run_record import RECORD, RecordError, read_record


def test_record_comes_back_from_its_file(tmp_path):
    record = make_record()
    path = record.write(tmp_path)
    assert path == tmp_path / RECORD
    assert [file.name for file in tmp_path.iterdir()] == [RECORD]
    assert read_record(tmp_path) == read_record(path) == record


def test_numbers_that_json_does_not_know_are_left_out(tmp_path):
    logs = [{"loss": float("nan"), "seconds": 1.0, "epoch": 0.5}, {"loss": float("inf"), "seconds": 2.0, "epoch": 1.0}]
    make_record(logs=logs).write(tmp_path)
    assert "NaN" not in (tmp_path / RECORD).read_text()
    assert read_record(tmp_path).logs == [{"seconds": 1.0, "epoch": 0.5}, {"seconds": 2.0, "epoch": 1.0}]


def test_curves_and_the_metric_are_read_from_the_logs():
    record = make_record()
    assert record.metric == "eval_accuracy"
    assert record.curve("loss") == [(1.0, 0.5, 2.0), (2.8, 1.5, 1.0)]
    assert make_record(logs=record.logs[::2]).metric is None
    times = {"eval_model_preparation_time": 1.0, "eval_runtime": 1.0, "seconds": 1.0, "epoch": 1.0}
    assert make_record(logs=[times]).metric is None
    assert record.training_seconds == 3.5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "its format is 2 in place of 1"),
        ({"logs": {}}, "its `logs` is missing or of another kind"),
        ({"logs": [{"seconds": 1.0}]}, "an entry of `logs` lacks one of the numbers seconds, epoch"),
        ({"logs": [{"seconds": 1.0, "epoch": 1, "loss": "<b>"}]}, "a logged value is not a number"),
        ({"epochs": [3]}, "an entry of `epochs` lacks"),
        ({"phases": [{**PHASE, "seconds": "long"}]}, "an entry of `phases` lacks"),
        ({"totals": {"flops": "many"}}, "a total is not a number"),
        ({"totals": {"flops": None}}, "a total is not a number"),
        ({"totals": {"peak_memory_bytes": float("inf")}}, "a total is not a number"),
        ({"logs": [{"seconds": 1.0, "epoch": 1, "loss": 10**400}]}, "a logged value is not a number"),
        ({"phases": [{**PHASE, "seconds": float("nan")}]}, "an entry of `phases` lacks"),
        ({"phases": [{**PHASE, "mode": None}]}, "an entry of `phases` lacks the text mode"),
        ({"notes": [{"seconds": 1.0, "epoch": 0}]}, "an entry of `notes` lacks the text text"),
        ({"store": ["fp32"]}, "its `store` is of another kind"),
        ({"store": {"Arrow files, bytes": "many"}}, "its `store` is of another kind"),
    ],
)
def test_other_content_is_refused_in_words(change, message, tmp_path):
    make_record().write(tmp_path)
    content = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**content, **change}))
    with pytest.raises(RecordError, match=message):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", "[" * 100_000])
def test_file_that_is_no_record_is_refused_in_words(text, tmp_path):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(RecordError, match="is no record of a training"):
        read_record(tmp_path)


def test_folder_without_a_record_says_what_to_do(tmp_path):
    with pytest.raises(RecordError, match="report='json' or 'html'"):
        read_record(tmp_path)
