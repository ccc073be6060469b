"""What the comparison of freezing rules computes besides trainings."""

import json

import pytest
import torch
from datasets import Dataset
from support.helpers import make_args, pixel_dataset, tiny_vit
from transformers import default_data_collator

from benchmarks.headline.tasks import Task
from benchmarks.policies import run
from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.training.flops import measure_training_flops


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


def test_every_rule_is_compared_freezing_alone_and_cached_with_the_same_head_start():
    names = ["linear", "smartfrz", "autofreeze", "egeria", "simfreeze", "freezeout", "freezeout, annealed"]
    arms = run.make_arms()
    limits = {"linear, to the head": 1.0, "smartfrz, three quarters": 0.75}
    cached = [f"{name}, cached" for name in names]
    assert [arm.name for arm in arms] == ["none", *names, *limits, "none, cold head", *cached]
    assert [arm.cache for arm in arms] == ["never"] * 11 + ["always"] * 7
    assert {arm.name: arm.config().max_frozen for arm in arms if arm.name in limits} == limits
    smart = {"smartfrz", "smartfrz, cached"}
    configs = {arm.name: arm.config() for arm in arms if arm.name not in smart}
    assert {name for name, config in configs.items() if config.epochs_of_head_start != 2} == {"none, cold head"}
    [unseen] = [arm for arm in run.make_arms("banking77", "some/folder") if "unseen" in arm.name]
    assert unseen.settings["predictor"] == "some/folder/banking77" and unseen.config().max_frozen == 0.75


def test_hindsight_is_compared_with_the_rules_on_the_seeds_of_the_sweep():
    assert all(arm.config().freeze_points == arm.name for arm in run.make_sweep())
    arms = {
        "none": {"0": result(0.8, 100, [0]), "1": result(0.9, 200, [0])},
        "linear": {"0": result(0.7, 50, [1]), "1": result(0.0, 50, [1])},
        "smartfrz": {"1": result(0.0, 50, [1])},
        "linear, cached": {"0": result(0.0, 1, [1])},
    }
    points, rules = run.compare_with_hindsight(arms, {"1:5": {"0": result(0.78, 40, [0, 5])}})
    assert points == [{"epoch": 1, "cut": 5, "flops": 0.4, "accuracy": pytest.approx(-2)}]
    assert rules == {"linear": {"flops": 0.5, "accuracy": pytest.approx(-10)}}
    assert run.compare_with_hindsight(arms, {"1:5": {"7": result(0.78, 40, [0, 5])}}) == ([], {})


def test_cuts_by_epoch_are_those_of_the_phases():
    phases = [
        {"cut": 0, "mode": "live", "epochs": 2},
        {"cut": 4, "mode": "build", "epochs": 1},
        {"cut": 4, "mode": "replay", "epochs": 1},
    ]
    assert run.cuts(phases, 3) == [0, 0, 4] and run.cuts([], 3) == [0, 0, 0]


@pytest.mark.parametrize("collates", ["the collator", "the data set"])
def test_flops_of_plain_training_are_counted_whoever_collates(collates, tmp_path):
    class Collated(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitems__(self, numbers):
            return default_data_collator([rows[number] for number in numbers])

    rows = pixel_dataset(10)
    by_rows = collates == "the collator"
    train, collator = (rows, default_data_collator) if by_rows else (Collated(), lambda batch: batch)
    task = Task("task", train, train, tiny_vit, collator, 4, 7, 3, 5)
    args = make_args(tmp_path, per_device_train_batch_size=4)
    trainer = FreezeCacheTrainer(tiny_vit(), args=args, train_dataset=train, data_collator=collator)
    batch = default_data_collator([rows[0]])
    assert run.plain_flops(trainer, task) == 10 * measure_training_flops(trainer.model, batch)


def test_settings_are_chosen_on_training_samples_and_change_no_result(tmp_path, capsys, monkeypatch):
    arguments = ["--smoke", "--tasks", "banking77", "--arms", "none", "--validate"]
    options = run.parse_options([*arguments, "--output_dir", str(tmp_path / "partial")])
    seen = {}
    task = Task(
        "banking77", Dataset.from_dict({"x": range(10)}), Dataset.from_dict({"x": [-1]}), *[None] * 2, 1, 7, 3, 5
    )
    monkeypatch.setattr(run, "load_task", lambda *_: task)
    monkeypatch.setattr(run, "result_folder", lambda *_: tmp_path)

    def train_arm(arm, seed, task, options):
        seen[arm.name] = (task.train["x"][:], task.test["x"][:])
        return result(0.5, 1.0, [0])

    monkeypatch.setattr(run, "train_arm", train_arm)
    run.run_task("banking77", options)
    run.collect(options)
    assert seen == {"none": (list(range(8)), [8, 9])}
    assert "| none | 50.0 |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["validation"]


def test_tables_pair_seeds_and_claims_say_what_fails(tmp_path, capsys, monkeypatch):
    options = run.parse_options(["--smoke", "--tasks", "banking77", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(run, "result_folder", lambda *_: tmp_path)
    found_by_arm = {"none": (0.9, 100, [0, 0]), "linear": (0.86, 50, [0, 5]), "smartfrz": (0.88, 60, [0, 5])}
    for arm, found in ((arm, result(*found)) for arm, found in found_by_arm.items()):
        run.result_file(options, "banking77", arm, 0).write_text(json.dumps(found))
    run.collect(options)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| smartfrz | 88.0 | -2.0 | 10 | 8 | 0.60 | 0 5 | 1 |" in lines
    said = capsys.readouterr().out
    assert "FAILS: banking77: smartfrz minus none, points: -2" in said
    assert "holds: banking77: smartfrz minus linear, points: 2" in said
    assert "FAILS: banking77: FLOPs of smartfrz / linear: 1.2" in said
    assert (tmp_path / "rules.png").stat().st_size > 1000 and not (tmp_path / "regret.png").exists()
    run.result_file(options, "banking77", "1:3", 0).write_text(json.dumps(result(0.9, 70, [0, 3])))
    run.collect(options)
    assert (tmp_path / "regret.png").stat().st_size > 1000
    options.tasks = ["caltech-112"]
    run.collect(options)  # without the swept task there is nothing to compare its sweep with
