"""`freezecache report`: the pages of trainings from their records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..reporting.page import COMPARISON_HEADINGS, common_metric, comparison_cells, make_comparison, make_page
from ..reporting.run_record import RunRecord, read_record
from ..units import format_table


def report(folders: Sequence[str], output: str, metric: str | None, as_json: bool) -> None:
    """Writes a page on one training, or on several side by side, and prints a table; or prints their records.

    Args:
        folders: output folders of the trainings.
        output: file of the page.
        metric: logged number that is compared; None: the first one that all have evaluated.
        as_json: print the records, write nothing.

    Raises:
        ValueError: if a folder has no record, or no training has logged the metric.
        ImportError: without matplotlib.
        OSError: if a file cannot be read or written.
    """
    records = [read_record(folder) for folder in folders]
    named = list(zip(_names(folders, records), records, strict=True))
    if as_json:
        print(json.dumps([{"folder": name, **asdict(record)} for name, record in named]))
        return
    page = make_page(records[0]) if len(records) == 1 else make_comparison(named, metric)
    Path(output).write_text(page, encoding="utf-8", errors="replace")
    metric = metric or common_metric(records)
    rows = [comparison_cells(name, record, metric) for name, record in named]
    headings = [metric if heading == "metric" else heading for heading in COMPARISON_HEADINGS]
    print(format_table([headings, *rows], left=[0]))
    print(f"wrote {output}")


def _names(folders: Sequence[str], records: Sequence[RunRecord]) -> list[str]:
    """Names of the trainings; where two have the same, the places of their folders as they were given."""
    names = [record.name for record in records]
    return [name if names.count(name) == 1 else folder for name, folder in zip(names, folders, strict=True)]
