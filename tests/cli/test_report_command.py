"""`freezecache report`."""

import json

from support.records import make_record

from hf_freezecache.cli.main import main


def record_in(folder, name, **changes):
    folder.mkdir()
    make_record(run={"name": name}, **changes).write(folder)
    return str(folder)


def test_page_on_one_training(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", record_in(tmp_path / "a", "first"), "--output", str(page)]) == 0
    assert "<title>first</title>" in page.read_text()
    out = capsys.readouterr().out
    assert "eval_accuracy" in out and "0.5" in out and f"wrote {page}" in out


def test_page_on_several_trainings_of_one_name(tmp_path, capsys):
    page, folders = tmp_path / "page.html", [record_in(tmp_path / name, "same") for name in ("a", "b")]
    assert main(["report", *folders, "--output", str(page)]) == 0
    assert all(folder in page.read_text() for folder in folders)
    out = capsys.readouterr().out
    assert all(folder in out for folder in folders)


def test_records_as_json(tmp_path, capsys):
    assert main(["report", record_in(tmp_path / "a", "first"), "--json"]) == 0
    (printed,) = json.loads(capsys.readouterr().out)
    assert printed["folder"] == "first" and printed["totals"]["flops"] == 4e9
    assert not (tmp_path / "freeze_cache_report.html").exists()


def test_mistakes_are_told_in_words(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "has no freeze_cache_report.json" in capsys.readouterr().err
    folder = record_in(tmp_path / "a", "first")
    assert main(["report", folder, folder, "--metric", "eval_f1", "--output", str(tmp_path / "x.html")]) == 1
    assert "no training has logged 'eval_f1'" in capsys.readouterr().err
