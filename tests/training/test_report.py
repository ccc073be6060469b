"""What a person reads after a training: sums over phases, and what plain training would have cost."""

import json
import re

import pytest
from torch import nn

from hf_freezecache.training.accounting import Phase
from hf_freezecache.training.report import PlainEstimate, count_trainable, make_report


def phases() -> list[Phase]:
    """A training with evaluations and one build; numbers are powers of two, so that sums tell their parts."""
    return [
        Phase(0, "live", epochs=1, steps=4, seconds=8.0, flops=16e9, peak_memory_bytes=100_000_000),
        Phase(0, "eval", epochs=1, seconds=32.0, flops=64e9, peak_memory_bytes=900_000_000),
        Phase(2, "build", epochs=1, seconds=2.0, flops=4e9, store_bytes=1_250_000, peak_memory_bytes=200_000_000),
        Phase(2, "replay", epochs=3, steps=12, seconds=1.0, flops=8e9, store_bytes=1_250_000),
    ]


def test_totals_keep_training_builds_and_evaluations_apart():
    totals = make_report(phases(), None).totals
    assert (totals.seconds, totals.train_seconds, totals.build_seconds, totals.eval_seconds) == (43, 9, 2, 32)
    assert (totals.flops, totals.eval_flops) == (28e9, 64e9)
    assert totals.peak_memory_bytes == 900_000_000


def test_plain_training_is_every_step_at_the_price_of_a_live_one():
    report = make_report(phases(), plain_flops_per_step=5e9)
    # 8 s for 4 live steps; 16 steps in all.
    assert report.plain_estimate == PlainEstimate(seconds=32.0, flops=80e9)


@pytest.mark.parametrize(
    "first",
    [
        Phase(2, "live", steps=4, seconds=8.0),
        Phase(0, "replay", steps=4, seconds=8.0),
        Phase(0, "build", steps=4, seconds=8.0),
        Phase(0, "live", steps=0, seconds=8.0),
    ],
    ids=["frozen", "replayed", "built", "no step"],
)
def test_plain_seconds_are_unknown_without_a_live_step_at_cut_0(first):
    report = make_report([first, *phases()[1:]], plain_flops_per_step=5e9)
    assert report.plain_estimate.seconds is None
    assert report.plain_estimate.flops == 5e9 * (12 + (first.steps if first.mode != "build" else 0))


def test_training_that_did_not_begin_costs_nothing():
    report = make_report([], None)
    assert set(vars(report.totals).values()) == {0}
    assert report.plain_estimate == PlainEstimate(None, None)
    assert str(make_report([], None, "no training has run")) == "nothing was booked: no training has run"


def test_measuring_for_a_store_that_was_not_built_is_no_build():
    report = make_report([*phases(), Phase(3, "plan", seconds=7.0, flops=1e9)], 5e9)
    before = make_report(phases(), 5e9).totals
    assert report.totals.build_seconds == before.build_seconds and report.totals.plan_seconds == 7.0
    assert report.totals.flops == before.flops + 1e9
    assert "plans of stores that were not built 7 s" in str(report)


def test_table_has_a_line_a_phase_and_says_what_training_took():
    header, *rows, training, plain = str(make_report(phases(), 5e9)).splitlines()
    assert header.split()[:4] == ["cut", "mode", "epochs", "steps"]
    assert [row.split()[:4] for row in rows] == [
        ["0", "live", "1", "4"],
        ["0", "eval", "1", "0"],
        ["2", "build", "1", "0"],
        ["2", "replay", "3", "12"],
    ]
    # Live, replay and the build; then all 16 steps live.
    assert [float(number) for number in re.findall(r"[\d.]+", training)] == [11, 2, 28]
    assert plain.startswith("plain training, estimated: ")
    assert [float(number) for number in re.findall(r"[\d.]+", plain)] == [32, 80]


def test_table_leaves_out_what_plain_training_is_not_known_to_cost():
    frozen = phases()[2:]
    estimate = str(make_report(frozen, 5e9)).splitlines()[-1]
    assert estimate.startswith("plain training, estimated: ")
    assert [float(number) for number in re.findall(r"[\d.]+", estimate)] == [60]
    assert "plain" not in str(make_report(frozen, None))


def test_report_is_written_as_json():
    report = make_report(phases(), 5e9)
    content = json.loads(json.dumps(report.to_dict()))
    assert content.keys() == {"phases", "totals", "plain_estimate", "note", "learning_rates", "choice"}
    assert [Phase(**phase) for phase in content["phases"]] == report.phases == phases()
    assert content["totals"] == vars(report.totals)
    assert content["plain_estimate"] == {"seconds": 32.0, "flops": 80e9}


def test_report_does_not_grow_with_the_ledger():
    ledger = phases()[:2]
    report = make_report(ledger, None)
    ledger.append(Phase(2, "build"))
    assert len(report.phases) == 2


def test_values_that_get_a_gradient_are_counted():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert count_trainable(model) == 3 * 4 + 4 + 4 * 2 + 2
    model[0].requires_grad_(False)
    assert count_trainable(model) == 4 * 2 + 2
    model[1].bias.requires_grad_(False)
    assert count_trainable(model) == 4 * 2
