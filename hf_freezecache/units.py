"""Bytes, seconds and epochs as text for people, and sizes in bytes from text."""

from __future__ import annotations

import re

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
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}" if abs(count) < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"


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
