"""What a predictor would have frozen in recorded trainings."""

from dataclasses import replace

import numpy as np
import pytest
from support.recorded_runs import made_up_run, made_up_runs

from benchmarks.predictor import hindsight


def run_of(epochs, settles_at=(0.2, 0.5, 0.9, 0.9), network="net"):
    run = made_up_run("a", network, 3, settles_at)
    return replace(run, facts=replace(run.facts, settings={"epochs": epochs}))


def test_cuts_take_effect_when_the_next_epoch_begins_all_blocks_included():
    run = run_of(4)
    cuts = [int(progress >= 0.2) + 3 * int(progress >= 0.6) for progress in run.progress]
    assert hindsight.by_epoch(cuts, run) == [0, 1, 1, 4]
    first = [1] + [0] * 60
    assert hindsight.by_epoch(first, run)[0] == 0  # nothing is known before the first step


def test_hindsight_freezes_what_has_settled_behind_nothing_that_has_not():
    run = run_of(10)
    cuts = hindsight.by_epoch(hindsight.cuts_by_hindsight(run, hindsight.LabelRule(remaining=0.1)), run)
    assert cuts == sorted(cuts) and cuts[0] == 0 and cuts[3] == 1 and cuts[6] == 2
    late = run_of(10, (0.9, 0.1, 0.1))
    assert not any(hindsight.by_epoch(hindsight.cuts_by_hindsight(late, hindsight.LabelRule()), late)[:9])


def test_costs_count_backward_passes_and_what_was_left_when_blocks_froze():
    run = run_of(10)
    assert hindsight.measure(run, [0] * 10) == {"flops": 1.0, "remaining": 0.0}
    late = hindsight.measure(run, [0] * 5 + [2] * 5)
    assert late["flops"] == pytest.approx(1 - 2 / 3 * 0.25) and late["remaining"] < 0.1
    early = hindsight.measure(run, [0, *[2] * 9])
    assert early["remaining"] == pytest.approx(1 - (3 + 4 + 5) / 3 / 60 / 0.5)  # of the second block, three snapshots


def test_every_network_is_judged_by_a_predictor_made_without_it():
    runs = [replace(run, facts=replace(run.facts, settings={"epochs": 6})) for run in made_up_runs(2, 2)]
    found = hindsight.compare(runs, [0], 1)
    assert sorted(found) == ["net0", "net1"] and list(found["net0"])[-1] == "predictor"
    assert found["net0"]["linear"]["flops"] == pytest.approx(np.mean([1, 1, 7 / 9, 5 / 9, 5 / 9, 5 / 9]))
    assert "| net0 | 0.74" in "\n".join(hindsight.table(found))
