"""Numbers and tables for people."""

import pytest

from hf_freezecache.estimate.costs import Plan, PlanRow
from hf_freezecache.training.accounting import Phase
from hf_freezecache.training.report import make_report
from hf_freezecache.units import format_table, parse_bytes, show_bytes, show_flops, show_seconds


def test_table_aligns_columns_right_and_the_named_ones_left():
    rows = [("cut", "block", "bytes"), ("1", "stem", "9"), ("12", "a longer name", "1,234,567")]
    assert format_table(rows, left=[1]).split("\n") == [
        "cut  block              bytes",
        "  1  stem                   9",
        " 12  a longer name  1,234,567",
    ]


def test_table_has_no_spaces_at_the_ends_of_lines():
    assert format_table([("name", "value"), ("a", "")], left=[0, 1]) == "name  value\na"


def test_table_of_no_rows_is_empty():
    assert format_table([]) == ""


def test_table_refuses_rows_of_another_length():
    with pytest.raises(ValueError):
        format_table([("cut", "block"), ("1",)])


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 FLOP"), (12_300.0, "12.3 kFLOP"), (1.234e12, "1.23 TFLOP"), (5e18, "5,000 PFLOP")],
)
def test_flops_are_shown_with_three_digits(count, expected):
    assert show_flops(count) == expected


def test_numbers_just_below_a_larger_unit_are_written_out():
    assert show_bytes(999_600_000) == "1,000 MB"
    assert show_flops(9.9996e11) == "1,000 GFLOP"


def test_report_is_a_table_with_a_unit_in_every_cell():
    live = Phase(0, "live", epochs=2, steps=8, seconds=75.0, flops=3.2e12, peak_memory_bytes=1_500_000_000)
    replay = Phase(3, "replay", epochs=10, steps=40, seconds=4.0, flops=5e9, store_bytes=2_500_000)
    lines = str(make_report([live, replay], plain_flops_per_step=4e11)).split("\n")
    assert lines == [
        "cut  mode    epochs  steps  time    compute   store  peak memory",
        "  0  live         2      8  75 s  3.2 TFLOP     0 B       1.5 GB",
        "  3  replay      10     40   4 s    5 GFLOP  2.5 MB          0 B",
        "training: 79 s, 3.21 TFLOP",
        "plain training, estimated: 7 min 30 s, 19.2 TFLOP",
    ]


@pytest.mark.parametrize(
    ("phases", "per_step", "estimate"),
    [
        ([Phase(3, "replay", steps=40)], 4e11, "16 TFLOP"),
        ([Phase(0, "live", steps=8, seconds=8.0)], None, "8 s"),
        ([Phase(3, "replay", steps=40)], None, None),
    ],
)
def test_report_estimates_plain_training_from_what_was_measured(phases, per_step, estimate):
    text = str(make_report(phases, per_step))
    if estimate is None:
        assert "estimated" not in text
    else:
        assert text.endswith(f"plain training, estimated: {estimate}")


def test_plan_is_a_table_whose_columns_stand_below_each_other():
    row = dict(codec="int4", view_bytes=0, build_seconds=3.0, live_epoch_seconds=9.0, replay_epoch_seconds=6.0)
    row |= dict(live_step_seconds=0.9, replay_step_seconds=0.6)
    rows = (
        PlanRow(cut=1, block="vit.embeddings", base_bytes=1_500, **row),
        PlanRow(cut=12, block="vit.layers.10", base_bytes=12_000_000, peak_memory_bytes=3_000_000, **row),
    )
    header, first, second, *rest = str(Plan(rows, 1.0, 10.0, "3 batches")).split("\n")
    assert rest == ["Plain training, nothing frozen: 1 s a step, 10 s an epoch.", "3 batches"]
    for line, cut, block, size in ((first, "1", "vit.embeddings", "1.5 kB"), (second, "12", "vit.layers.10", "12 MB")):
        assert line[: header.index("cut") + 3].strip() == cut
        assert line[header.index("last") :].startswith(block)
        assert line[: header.index("store") + 5].endswith(size)
        assert line[header.index("verdict") :] == "pays after 2 epochs"


def test_units_are_for_people():
    sizes = [0, 999, 1234, 5_670_000, 12_345_678_901, 2_500_000_000_000]
    assert [show_bytes(size) for size in sizes] == ["0 B", "999 B", "1.23 kB", "5.67 MB", "12.3 GB", "2.5 TB"]
    seconds = [0.0123, 0.9996, 3.456, 99.96, 125, 4800, -2.5]
    shown = ["12.3 ms", "1 s", "3.46 s", "1 min 40 s", "2 min 05 s", "1 h 20 min", "-2.5 s"]
    assert [show_seconds(each) for each in seconds] == shown


@pytest.mark.parametrize(
    ("size", "expected"),
    [("4096", 4096), (7, 7), ("2GB", 2 * 10**9), ("2gb", 2 * 10**9), ("1.5 KiB", 1536), ("1TB", 10**12), ("3 B", 3)],
)
def test_sizes_are_read_with_their_units(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "-1", "1e9", "2 Gbit", "1.5.2MB"])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="GiB"):
        parse_bytes(size)
