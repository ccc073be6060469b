"""Differences of pairs with their intervals, spreads, and tables in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy.stats import t as student_t


def paired(differences: list[float]) -> dict[str, Any]:
    """Mean of the differences and its 95 % t-interval (None with a single pair)."""
    mean, count = statistics.mean(differences), len(differences)
    half = None
    if count > 1:
        half = float(student_t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return {
        "mean": mean,
        "sd": deviation(differences),
        "interval_95": None if half is None else [mean - half, mean + half],
        "by_seed": differences,
    }


def deviation(values: list[float]) -> float:
    """Standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: list[float]) -> dict[str, Any]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show_interval(interval: Sequence[float] | None, digits: int = 2) -> str:
    """Both ends with their signs; nothing if there is no interval."""
    return "" if interval is None else f"{interval[0]:+.{digits}f} to {interval[1]:+.{digits}f}"


def markdown_table(header: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown.

    Args:
        header: the headings, with ` | ` between them.
        rows: their cells.
    """
    lines = [f"| {header} |", "|" + "---|" * len(header.split(" | "))]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]
