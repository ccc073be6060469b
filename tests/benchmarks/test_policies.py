"""What the comparison of freezing rules computes besides trainings."""

import json

from benchmarks.policies import run


def result(accuracy, flops, cuts):
    return {
        "accuracy": accuracy,
        "accuracy_by_epoch": [accuracy],
        "best_accuracy": accuracy,
        "seconds": 10.0,
        "seconds_to_best": 8.0,
        "flops": flops,
        "cut_by_epoch": cuts,
        "phases": [],
    }


def test_every_rule_is_compared_freezing_alone_and_cached():
    arms = run.make_arms("some/predictor")
    assert [arm.name for arm in arms if arm.cache == "auto"] == [
        f"{name}, cached"
        for name in ("linear", "freezeout", "freezeout, annealed", "autofreeze", "egeria", "simfreeze", "smartfrz")
    ]
    assert len({arm.name for arm in arms}) == len(arms) == 15
    assert len(run.make_arms(None)) == 13
    assert all(arm.config().cache == arm.cache for arm in run.make_arms(None))


def test_cuts_by_epoch_are_those_of_the_phases():
    phases = [
        {"cut": 0, "mode": "live", "epochs": 2},
        {"cut": 4, "mode": "build", "epochs": 1},
        {"cut": 4, "mode": "replay", "epochs": 1},
    ]
    assert run.cuts(phases, 3) == [0, 0, 4] and run.cuts([], 3) == [0, 0, 0]


def test_tables_pair_seeds_and_claims_say_what_fails(tmp_path, capsys, monkeypatch):
    options = run.parse_options(["--smoke", "--tasks", "banking77", "--output_dir", str(tmp_path), "--predictor", "x"])
    monkeypatch.setattr(run, "result_folder", lambda *_: tmp_path)
    for arm, found in {"none": result(0.9, 100, [0, 0]), "smartfrz": result(0.88, 60, [0, 5])}.items():
        run.result_file(options, "banking77", arm, 0).write_text(json.dumps(found))
    run.collect(options)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| smartfrz | 88.0 | -2.0 | 10 | 8 | 0.60 | 0 5 | 1 |" in lines
    assert "FAILS: banking77: smartfrz minus no freezing, points: -2" in capsys.readouterr().out
