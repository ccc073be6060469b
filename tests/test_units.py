"""Bytes and seconds as people write them."""

import pytest

from hf_freezecache.units import parse_bytes, show_bytes, show_seconds


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
