"""One self-contained page of HTML on a training, or on several: no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ..units import show_bytes, show_flops, show_seconds
from . import charts
from .run_record import RunRecord


@charts.own_style()
def make_page(record: RunRecord) -> str:
    """The page of a training.

    Raises:
        ImportError: without matplotlib.
    """
    return (
        _environment()
        .get_template("run.html.jinja")
        .render(
            title=record.name,
            record=record,
            facts=_facts(record),
            charts=_run_charts(record),
            phases=[_phase_cells(phase) for phase in record.phases],
            store=_store_facts(record.store),
            notes=[(show_seconds(note["seconds"]), f"{note['epoch']:g}", note["text"]) for note in record.notes],
            settings=_pairs(record.run.get("settings")),
            versions=_pairs(record.run.get("versions")),
        )
    )


@charts.own_style()
def make_comparison(records: Sequence[tuple[str, RunRecord]], metric: str | None = None) -> str:
    """The page of several trainings side by side.

    Args:
        records: names and trainings.
        metric: logged number that is compared; None: the first metric that all have evaluated, else the loss.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no training has logged the metric.
    """
    metric = metric or common_metric([record for _, record in records])
    if not any(record.curve(metric) for _, record in records):
        known = sorted({name for _, record in records for entry in record.logs for name in entry})
        raise ValueError(f"no training has logged '{metric}'; logged were {', '.join(known)}.")
    figure = charts.make_figure(9.5, 4.8)
    charts.draw_comparison(figure.subplots(), records, metric)
    return (
        _environment()
        .get_template("comparison.html.jinja")
        .render(
            title=f"{len(records)} trainings",
            metric=charts.show_name(metric),
            chart=charts.as_svg(figure),
            rows=[comparison_cells(name, record, metric) for name, record in records],
        )
    )


def common_metric(records: Sequence[RunRecord]) -> str:
    """The first metric that all trainings have evaluated; the loss of evaluations or of training if there is none."""
    for metric in [*(records[0].metrics if records else ()), "eval_loss"]:
        if all(record.curve(metric) for record in records):
            return metric
    return "loss"


def comparison_cells(name: str, record: RunRecord, metric: str) -> list[str]:
    """A training as a row: name, last value of the metric, time, compute, deepest cut, bytes of stores."""
    points, totals = record.curve(metric), record.totals
    return [
        name,
        f"{points[-1][2]:.4g}" if points else "not measured",
        show_seconds(record.training_seconds),
        show_flops(totals.get("flops", 0.0)),
        f"{max((entry['cut'] for entry in record.epochs), default=0)} of {len(record.blocks)}",
        show_bytes(max((entry["store_bytes"] for entry in record.epochs), default=0)),
    ]


COMPARISON_HEADINGS = ("training", "metric", "time", "compute", "frozen blocks", "store")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__package__), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )


def _run_charts(record: RunRecord) -> list[str]:
    drawings: list[tuple[Any, ...]] = [(charts.draw_timeline,), (charts.draw_costs,)]
    for name in ("loss", record.metric):
        if name is not None and (record.curve(name) or (name == "loss" and record.curve("eval_loss"))):
            drawings += [(charts.draw_curve, name, "seconds"), (charts.draw_curve, name, "epochs")]
    pictures = []
    for draw, *arguments in drawings:
        figure = charts.make_figure(6.2, 3.3)
        draw(figure.subplots(), record, *arguments)
        pictures.append(charts.as_svg(figure))
    return pictures


def _facts(record: RunRecord) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, value, and what it is compared with."""
    totals, plain = record.totals, record.plain_estimate
    own, seconds, flops = record.training_seconds, plain.get("seconds"), plain.get("flops")
    facts = [
        ("Time", show_seconds(own), f"plain, estimated: {show_seconds(seconds)}" if seconds else "without evaluation")
    ]
    if seconds and own:
        facts.append(("Speed-up", f"{seconds / own:.2f} x", "estimated plain time over measured time"))
    used = totals.get("flops", 0.0)
    facts.append(("Compute", show_flops(used), f"plain, estimated: {show_flops(flops)}" if flops else ""))
    if record.metric is not None:
        facts.append((charts.show_name(record.metric), f"{record.curve(record.metric)[-1][2]:.4g}", "last evaluation"))
    deepest = max((entry["cut"] for entry in record.epochs), default=0)
    facts.append(("Frozen", f"{deepest} of {len(record.blocks)} blocks", "at the end"))
    replayed = sum(entry["mode"] == "replay" for entry in record.epochs)
    facts.append(("Replayed", f"{replayed} of {len(record.epochs)} epochs", "from a store"))
    peak = totals.get("peak_memory_bytes", 0)
    facts.append(("Peak memory", show_bytes(int(peak)), "of the accelerator, or of the process"))
    return facts


def _phase_cells(phase: Mapping[str, Any]) -> list[str]:
    return [
        str(phase["cut"]),
        str(phase.get("mode", "")),
        str(phase["epochs"]),
        str(phase["steps"]),
        show_seconds(phase["seconds"]),
        show_flops(phase["flops"]),
        show_bytes(phase["store_bytes"]),
        show_bytes(phase["peak_memory_bytes"]),
    ]


def _store_facts(store: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if store is None:
        return []
    return [(name, show_bytes(value) if name.endswith("bytes") else str(value)) for name, value in store.items()]


def _pairs(values: Any) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in values.items()] if isinstance(values, Mapping) else []
