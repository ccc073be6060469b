"""Pictures of trainings: where each epoch's batches came from, curves over seconds and epochs, and what it has cost.

The same figures make the PNG and, as SVG with colours of the page, the charts of the HTML; matplotlib comes with the
extra `recipes`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .run_record import RunRecord

#: Name of a colour -> as it is drawn in a PNG; the page has its own for light and dark.
COLOURS = {
    "ink": "#1f2430",
    "muted": "#6b7280",
    "grid": "#d9dce1",
    "paper": "#fefefe",
    "live": "#c2611f",
    "replay": "#2f6fb0",
    "build": "#7a5aa6",
    "other": "#8a8f98",
    "estimate": "#9aa1ab",
}
#: Colours of runs that are compared.
RUNS = ("#2f6fb0", "#c2611f", "#3d8c5c", "#7a5aa6", "#b03a5b", "#8a6d1d", "#2a8a8f", "#5f6670")
MODES = {
    "live": ("live", "live epochs"),
    "replay": ("replay", "replay epochs"),
    "build": ("build", "builds"),
    "plan": ("other", "measuring stores that were not built"),
    "head_start": ("other", "head start"),
    "trial": ("other", "trial"),
}


def make_figure(width: float, height: float) -> Any:
    """An empty figure in inches.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib: pip install "hf_freezecache[recipes]"', name=error.name
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_facecolor(COLOURS["paper"])
    FigureCanvasAgg(figure)
    return figure


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Inside, figures are drawn as they are here, whatever style the user has set; names are no formulas.

    Raises:
        ImportError: without matplotlib.
    """
    make_figure(1, 1)
    import matplotlib.style

    # In SVG text stays text, and nothing in it differs between two runs.
    own = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "hf_freezecache"}
    with matplotlib.style.context(["default", own]):
        yield


def as_svg(figure: Any) -> str:
    """A figure as an SVG element whose colours are variables of the page that it stands in."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    for name, colour in COLOURS.items():
        text = re.sub(colour, f"var(--{name})", text, flags=re.IGNORECASE)
    # The style sheet of the page says the font; ids must not meet those of the other charts.
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


@own_style()
def draw_run(record: RunRecord, path: str | os.PathLike) -> None:
    """All charts of a training as one PNG.

    Raises:
        ImportError: without matplotlib.
    """
    figure = make_figure(12, 8.5)
    figure.suptitle(_drawable(record.name), fontsize=13, color=COLOURS["ink"])
    grid = figure.subplots(3, 2)
    draw_timeline(grid[0][0], record)
    draw_costs(grid[0][1], record)
    for row, name in enumerate(["loss", record.metric], start=1):
        for column, over in enumerate(["seconds", "epochs"]):
            draw_curve(grid[row][column], record, name, over)
    figure.savefig(path, dpi=130)


def draw_timeline(axes: Any, record: RunRecord) -> None:
    """Frozen blocks by epoch; the colour says where the batches came from."""
    for mode in ("live", "replay"):
        colour, label = MODES[mode]
        entries = [entry for entry in record.epochs if entry["mode"] == mode]
        if not entries:
            continue
        axes.bar(
            [entry["epoch"] for entry in entries],
            [entry["cut"] for entry in entries],
            width=0.92,
            color=COLOURS[colour],
            label=f"{label}: {len(entries)}",
        )
        # An epoch without frozen blocks would not be seen.
        nothing = [entry["epoch"] for entry in entries if not entry["cut"]]
        axes.bar(nothing, [0.12] * len(nothing), width=0.92, color=COLOURS[colour])
    axes.set(xlabel="epoch", ylabel="frozen blocks", ylim=(0, max(1, len(record.blocks)) * 1.02))
    axes.locator_params(axis="both", integer=True)
    _finish(axes, "Frozen blocks and source of the batches, by epoch")


def draw_curve(axes: Any, record: RunRecord, name: str | None, over: str) -> None:
    """A logged number over seconds or epochs, evaluation loss beside the training loss.

    Over seconds, the same points at the pace of plain training, as far as it is estimated, are drawn lightly.

    Args:
        axes: to draw on.
        record: of the training.
        name: of the number; None draws a note that there is none.
        over: "seconds" or "epochs".
    """
    place = 0 if over == "seconds" else 1
    title = "Loss" if name == "loss" else "No metric was evaluated" if name is None else show_name(name)
    names = [name] if name is not None else []
    names += ["eval_loss"] if name == "loss" else []
    plain = record.plain_estimate.get("seconds")
    last = max((entry["epoch"] for entry in record.logs), default=0)
    for number, each in enumerate(names):
        points = record.curve(each)
        if not points:
            continue
        colour = COLOURS["replay" if number == 0 else "live"]
        style = dict(marker="o", markersize=3.5) if len(points) < 40 else {}
        label = "training" if each == "loss" else "evaluation"
        if over == "seconds" and plain and last:
            at_plain_pace = [point[1] / last * plain for point in points]
            axes.plot(
                at_plain_pace,
                [point[2] for point in points],
                color=COLOURS["estimate"],
                linestyle="--",
                linewidth=1.2,
                label="the same steps, unfrozen (estimated time)" if not number else None,
            )
        axes.plot(
            [point[place] for point in points], [point[2] for point in points], color=colour, label=label, **style
        )
    axes.set(xlabel="seconds since the training began" if over == "seconds" else "epoch", ylabel=title.lower())
    axes.set_xlim(left=0)
    _finish(axes, f"{title} over {over}" if names else title)


def draw_costs(axes: Any, record: RunRecord) -> None:
    """Seconds and FLOPs by what they were spent on, as shares of plain training where that is estimated."""
    quantities, labels = {"seconds": "time", "flops": "compute"}, []
    shown: set[str] = set()
    for number, (quantity, label_of_row) in enumerate(quantities.items()):
        total = sum(phase[quantity] for phase in record.phases if phase["mode"] in MODES)
        plain = record.plain_estimate.get(quantity) or 0.0
        whole, start = plain or total or 1.0, 0.0
        labels.append(f"{label_of_row}\n{'of plain' if plain else 'of itself'}")
        for mode, (colour, label) in MODES.items():
            share = sum(phase[quantity] for phase in record.phases if phase["mode"] == mode) / whole
            if not share:
                continue
            axes.barh(
                number,
                100 * share,
                left=100 * start,
                height=0.5,
                color=COLOURS[colour],
                label=label if label not in shown else None,
            )
            shown.add(label)
            start += share
        if plain:
            axes.barh(number, 100, height=0.72, fill=False, edgecolor=COLOURS["muted"], linewidth=1.2)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    is_estimated = any(record.plain_estimate.get(quantity) for quantity in quantities)
    axes.set_xlabel("%, plain training outlined (estimated)" if is_estimated else "%")
    _finish(axes, "What it has cost, evaluation apart")


def draw_comparison(axes: Any, records: Sequence[tuple[str, RunRecord]], metric: str) -> None:
    """A metric over seconds of training, a line a run."""
    for number, (name, record) in enumerate(records):
        points = record.curve(metric)
        axes.plot(
            [point[0] for point in points],
            [point[2] for point in points],
            color=RUNS[number % len(RUNS)],
            linestyle=("-", "--", ":")[number // len(RUNS) % 3],
            marker="o",
            markersize=4,
            label=_drawable(name),
        )
    axes.set(xlabel="seconds since the training began", ylabel=show_name(metric).lower())
    axes.set_xlim(left=0)
    _finish(axes, f"{show_name(metric)} over seconds")


def show_name(metric: str) -> str:
    """The name of a logged number for people: `eval_accuracy` -> `Accuracy`."""
    return _drawable(metric.removeprefix("eval_").replace("_", " ").capitalize())


def _drawable(text: str) -> str:
    """A text as matplotlib draws it: without halves of characters; an underscore at its beginning would hide it."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return f" {text}" if text.startswith("_") else text


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=11, color=COLOURS["ink"], loc="left", pad=26)
    axes.set_facecolor(COLOURS["paper"])
    axes.grid(axis="both", color=COLOURS["grid"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(COLOURS["muted"])
    axes.tick_params(colors=COLOURS["muted"], labelcolor=COLOURS["ink"], labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=COLOURS["ink"], fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        # Above the axes: no corner inside is always free.
        legend = axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.01, 1),
            ncols=min(4, len(labels)),
            frameon=False,
            fontsize=8.5,
            columnspacing=1.2,
            handlelength=1.4,
        )
        for text in legend.get_texts():
            text.set_color(COLOURS["ink"])
