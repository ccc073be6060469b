"""The arithmetic of a plan, by numbers that were worked out by hand, and what a person reads."""

import math
from dataclasses import replace

import pytest

from hf_freezecache.estimate.costs import (
    Costs,
    Plan,
    PlanRow,
    Work,
    build_seconds,
    decide,
    make_row,
    overlapped,
    runs_of_prefix,
    step_seconds,
)

COSTS = Costs(
    load=2.0,
    prefix=3.0,
    load_base=1.0,
    load_view=4.0,
    encode=0.5,
    read=0.25,
    decode=0.75,
    suffix=5.0,
    compare=2.0,
    fixed=7.0,
)


def row(**changes):
    values = dict(
        cut=2,
        block="vit.layers.0",
        codec="int4",
        base_bytes=600,
        view_bytes=400,
        build_seconds=10.0,
        live_epoch_seconds=9.0,
        replay_epoch_seconds=5.0,
        live_step_seconds=0.9,
        replay_step_seconds=0.5,
        peak_memory_bytes=2_000_000,
        limit=5000,
    )
    return PlanRow(**{**values, **changes})


def test_step_without_workers_loads_and_computes_in_turn():
    assert step_seconds(COSTS, workers=0) == (2 + 3 + 5, 0.25 + 0.75 + 5)


def test_every_forward_pass_of_a_step_runs_the_frozen_blocks_and_a_store_is_read_once():
    assert step_seconds(COSTS, workers=0, passes=2) == (2 + 2 * 3 + 5, 0.25 + 0.75 + 5)
    assert step_seconds(replace(COSTS, suffix=None), 2, passes=3) == (9.0, 0.75)


def test_step_with_workers_waits_for_the_slower_of_loading_and_computing():
    assert step_seconds(COSTS, workers=1) == (3 + 5, 0.75 + 5)
    slow = replace(COSTS, load=40.0, read=12.0)
    assert step_seconds(slow, workers=2) == (20.0, 6.0)
    assert overlapped(3.0, 8.0, 4) == 3.0


def test_step_without_suffix_saves_as_much_as_with_it():
    live, replay = step_seconds(COSTS, 0)
    assert math.isclose(live - replay, 4.0)
    live, replay = step_seconds(replace(COSTS, suffix=None), 0)
    assert math.isclose(live - replay, 4.0)
    # Behind workers loading is hidden, as far as is known.
    assert step_seconds(replace(COSTS, suffix=None), 2) == (3.0, 0.75)


def test_build_of_base_views_runs_the_prefix_once_over_every_range():
    # 7 fixed + 10.5 ranges of (1 loaded + 3 prefix + 0.5 encoded)
    assert math.isclose(build_seconds(COSTS, Work(ranges=10.5)), 7 + 10.5 * 4.5)


def test_build_of_rows_that_others_read_takes_longer_and_its_own_part_decides():
    assert math.isclose(build_seconds(COSTS, Work(ranges=8, shared=1.25)), 7 + 10 * 4.5)
    # Of 10 seconds, 2 are for the training's own rows: an epoch saves 4.
    assert decide(row(), epochs_left=1) is not None
    assert decide(row(shared=5.0), epochs_left=1) is None
    assert row(shared=5.0).break_even_epochs == 0.5


def test_build_with_views_runs_every_view_and_compares_some():
    work = Work(ranges=10, views=2, views_run=2, compared=4, run_twice=1)
    one_range = (1 + 2 * 4) + 3 * 3
    compared = (1 + 4) + 2 * 3 + 2
    assert math.isclose(build_seconds(COSTS, work), 7 + 4 * compared + 1 * one_range + 10 * (one_range + 0.5))


def test_build_of_views_whose_geometry_is_enough_runs_the_base_view_alone():
    work = Work(ranges=10, views=1, views_run=0)
    assert math.isclose(build_seconds(COSTS, work), 7 + 10 * (1 + 4 + 3 + 0.5))


def test_build_is_shared_by_processes_and_its_loading_by_workers():
    work = Work(ranges=10, views=1, views_run=1, compared=2, workers=2, processes=5)
    # compared by one process: max(2 * 3 + 2, 5 / 2); a range: max(2 * 3 + 0.5, 5 / 2)
    assert math.isclose(build_seconds(COSTS, work), 7 + 2 * 8 + 10 / 5 * 6.5)


def test_build_from_something_else_than_images_takes_what_that_takes():
    work = Work(ranges=10, views=1, views_run=1, compared=3)
    costs = replace(COSTS, run=1.5)
    assert math.isclose(build_seconds(costs, work), 7 + 3 * (1.5 + 2) + 10 * (1.5 + 0.5))


def test_row_multiplies_steps_to_epochs():
    made = make_row(
        cut=3,
        block="b",
        codec="fp16",
        base_bytes=5,
        view_bytes=6,
        costs=replace(COSTS, peak_memory_bytes=9),
        work=Work(ranges=12, processes=2),
        limit=10,
    )
    assert (made.live_step_seconds, made.replay_step_seconds) == (10, 6)
    # A replay epoch also runs a batch of sentinel rows at most: 3 + 1.
    assert (made.live_epoch_seconds, made.replay_epoch_seconds) == (60, 40)
    assert made.seconds_saved_per_epoch == 20
    assert math.isclose(made.build_seconds, 7 + 6 * 4.5)
    assert math.isclose(made.break_even_epochs, 34 / 20)
    assert (made.bytes, made.peak_memory_bytes, made.fits) == (11, 9, False)


def test_row_that_saves_nothing_never_breaks_even():
    for replay in (9.0, 9.5):
        slow = row(replay_epoch_seconds=replay)
        assert slow.break_even_epochs == math.inf
        assert slow.verdict == "does not pay: a replay step is no faster"
        assert "no faster" in decide(slow, 1000)


def test_verdict_says_when_it_pays_and_what_does_not_fit():
    assert row().break_even_epochs == 2.5
    assert row().verdict == "pays after 3 epochs"
    assert row(build_seconds=1.0).verdict == "pays after 1 epoch"
    assert row(limit=999).verdict == "does not fit: needs 1 kB, 999 B left"
    assert row(limit=None).fits


def test_verdict_and_decision_agree_at_every_number_of_epochs():
    for build in (0.5, 3.9, 4.0, 4.1, 7.7, 10.0, 30.0):
        made = row(build_seconds=build)
        epochs = next(number for number in range(1, 100) if decide(made, number) is None)
        assert made.verdict == f"pays after {epochs} epoch{'s' if epochs > 1 else ''}"


def test_decision_builds_only_with_a_margin():
    # 4 s saved an epoch against 10 s
    assert decide(row(), epochs_left=3) is None
    reason = decide(row(), epochs_left=2.5)
    assert reason == "a build takes about 10 s, and the 2.5 epochs left would save 10 s"
    assert decide(row(), epochs_left=2.62) is not None
    assert decide(row(), epochs_left=2.63) is None


def test_decision_declines_what_there_is_no_room_for():
    assert decide(row(), 100, limit=1000) is None
    assert decide(row(), 100, limit=999) == "it needs 1 kB, and 999 B are left"
    assert decide(row(limit=10), 100) is not None


@pytest.mark.parametrize(
    ("work", "least"),
    [
        (Work(ranges=10), 1),
        (Work(ranges=10, views=2, views_run=2), 3),
        (Work(ranges=10, views=1, views_run=0), 1),
        (Work(ranges=10, views=1, views_run=1, compared=5), 3),
        (Work(ranges=10, run_twice=5), 1.5),
    ],
)
def test_few_epochs_never_pay(work, least):
    assert runs_of_prefix(work) == least
    # A build that costs nothing but its runs of the prefix, and a replay that costs nothing at all.
    costs = Costs(load=0.0, prefix=1.0, load_base=0.0)
    free = make_row(cut=1, block="b", codec="int4", base_bytes=0, view_bytes=0, costs=costs, work=work, limit=None)
    assert decide(free, least) is not None


def test_a_build_of_sorted_texts_takes_less_than_an_epoch():
    work, costs = Work(ranges=10), replace(COSTS, prefix_build=1.0)
    assert build_seconds(COSTS, work) - build_seconds(costs, work) == 10 * (3 - 1)
    assert step_seconds(costs, workers=0) == step_seconds(COSTS, workers=0)


def test_table_has_a_line_a_cut_and_says_what_plain_training_takes():
    rows = (row(), row(cut=10, block="vit.layers.8", limit=999, peak_memory_bytes=None))
    lines = str(Plan(rows, 1.5, 90.0, "Measured on nothing.")).splitlines()
    assert len(lines) == 5
    header, first, second = lines[:3]
    for line, verdict in ((first, "pays after 3 epochs"), (second, "does not fit: needs 1 kB, 999 B left")):
        assert line.index(verdict) == header.index("verdict")
        assert line.index("vit.layers") == header.index("last frozen block")
    assert first.split()[0] == "2" and second.split()[0] == "10"
    assert "10 s" in first and "2 MB" in first and "400 B" in first
    assert lines[3] == "Plain training, nothing frozen: 1.5 s a step, 90 s an epoch."
    assert lines[4] == "Measured on nothing."
