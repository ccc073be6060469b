"""Bytes, seconds and epochs as text for people, and sizes in bytes from text."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_UNITS = {"": 1, "B": 1} | {
    unit: base**power
    for base, units in ((1000, ("KB", "MB", "GB", "TB")), (1024, ("KIB", "MIB", "GIB", "TIB")))
    for power, unit in enumerate(units, start=1)
}


def parse_bytes(size: str | int) -> int:
    """Number of bytes of a size.

    Args:
        size: a number of bytes, or a number with a unit such as '4096', '2GB' or '1.5 GiB'.

    Raises:
        ValueError: if it is not a size; the message names the units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(
            f"{size!r} is not a size: a number and one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB, e.g. 2GB"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def show_epochs(epochs: float) -> str:
    """A number of epochs as text, e.g. `1 epoch`, `2.5 epochs`."""
    number = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
    return f"{number} epoch{'' if number == '1' else 's'}"


def show_bytes(count: int) -> str:
    """A number of bytes as text with three digits, e.g. `1.23 GB`."""
    return _show_count(count, {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}, "B")


def show_flops(count: float) -> str:
    """A number of floating-point operations as text with three digits, e.g. `1.23 TFLOP`."""
    return _show_count(count, {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6, "kFLOP": 1e3}, "FLOP")


def _show_count(count: float, units: dict[str, float], smallest: str) -> str:
    """Three digits in the largest unit that the count reaches."""
    for unit, size in units.items():
        if abs(count) >= size:
            # From 999.5 on, three digits would be written as 1e+03.
            return f"{count / size:.3g} {unit}" if abs(count) < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count:g} {smallest}"


def show_seconds(seconds: float) -> str:
    """A number of seconds as text, e.g. `12 ms`, `3.4 s`, `2 min 05 s`, `1 h 20 min`."""
    sign, size = ("-", -seconds) if seconds < 0 else ("", seconds)
    if size < 0.9995:
        return f"{sign}{1000 * size:.3g} ms"
    if size < 99.95:
        return f"{sign}{size:.3g} s"
    minutes, rest = divmod(round(size), 60)
    if minutes < 60:
        return f"{sign}{minutes} min {rest:02d} s"
    return f"{sign}{minutes // 60} h {minutes % 60:02d} min"


def format_table(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> str:
    """A table as text: one line a row, two spaces between the columns.

    Args:
        rows: cells, as many in every row; where the columns have headings, these are the first row.
        left: numbers of the columns that are aligned to the left, from 0; all others are aligned to the right.

    Raises:
        ValueError: if a row has more or fewer cells than the first one.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
