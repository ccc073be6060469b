"""Tables, curves and claims of what is measured."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._common import Claim, pick, result_folder, write_result
from .._statistics import deviation, markdown_table, paired
from .jobs import Done, Result, Series, accuracy, make_series, preparation, read_done
from .methods import METHODS, OF_BOTH_STARTS, WIDTHS, on_the_fly, pool
from .tasks import TASKS

#: The methods whose curves are shown.
SHOWN = ("exact gradient", "MeZO", pool(4095), on_the_fly(8), "naive uniform", "naive uniform, not tuned", "FZOO-like")
#: What the machine was that the results are of, in the folder of results.
MACHINE = "machine.json"
#: By seed.
Rows = dict[int, Result]


def collect(options: argparse.Namespace, folder: Path) -> None:
    """Writes tables, curves and JSON of what is finished."""
    done = read_done(folder)
    if not done:
        print("nothing is finished.")
        return
    target = result_folder("zeroth_order", options.smoke) / ("gpu" if options.gpu else "cpu")
    target.mkdir(parents=True, exist_ok=True)
    series = make_series(map(TASKS.__getitem__, options.tasks), OF_BOTH_STARTS)
    found = {each: rows for each in series if (rows := final_rows(each, done, options.seeds))}
    text = "\n".join(
        part
        for task in dict.fromkeys(job.task for job in done if job.task in options.tasks)
        for part in (*_tables(task, found, _heads(task, done, options.seeds)), _trials_table(task, series, done))
    )
    print(text)
    (target / "tables.md").write_text(text)
    if found:
        _plot(found, target / "curves.png")
    content: dict[str, Any] = {
        "validation": {
            f"{each.task}, {each.start}, {each.method.name}": {
                f"{rate:g}, eps {eps:g}": 100 * points for (rate, eps), points in sorted(each.trials(done).items())
            }
            for each in series
            if not each.method.tuned_as and each.trials(done)
        },
        "test": {f"{each.task}, {each.start}, {each.method.name}": rows for each, rows in found.items()},
    }
    if (folder / MACHINE).exists():
        content["measured_on"] = json.loads((folder / MACHINE).read_text())
    settings = pick(options, "rows test_rows batch_size passes seeds jobs threads gpu")
    file = f"{'gpu' if options.gpu else 'cpu'}/result.json"
    write_result("zeroth_order", options, settings, content, make_claims(found), file)


def final_rows(series: Series, done: Done, seeds: list[int]) -> Rows:
    """The results on the test samples, by seed."""
    return {job.seed: done[job] for job in series.finals(done, seeds) if job in done}


def make_claims(found: Mapping[Series, Rows]) -> list[Claim]:
    """The aims, where there are three seeds: PeZO as good as MeZO with few numbers, naive uniform numbers worse."""
    claims = []
    by_name = {(each.task, each.start, each.method.name): rows for each, rows in found.items()}
    for (task, start, name), rows in by_name.items():
        mezo = by_name.get((task, start, "MeZO"), {})
        seeds = sorted(set(rows) & set(mezo))
        if name == "MeZO" or len(seeds) < 3 or name == "exact gradient":
            continue
        points = statistics.mean(100 * (accuracy(rows[seed]) - accuracy(mezo[seed])) for seed in seeds)
        what = f"{task}, {start}: '{name}' - 'MeZO', points, mean of {len(seeds)} seeds"
        if name in (pool(4095), on_the_fly(8)):
            claims.append(Claim(what, points, at_least=-0.5))
        if name == pool(4095):
            share = max(rows[seed]["numbers_drawn"] / mezo[seed]["numbers_drawn"] for seed in seeds)
            claims.append(Claim(f"{task}, {start}: random numbers of '{name}' over MeZO's", share, at_most=1e-3))
        if name.startswith("naive uniform"):
            claims.append(Claim(what, points, at_most=-0.5))
    return claims


def _heads(task: str, done: Done, seeds: list[int]) -> Rows:
    """The heads with which trainings begin, by seed."""
    return {seed: done[job] for seed in seeds if (job := preparation(task, seed, False)) in done}


def _tables(task: str, found: Mapping[Series, Rows], heads: Rows) -> list[str]:
    header = (
        "method | learning rate | eps | test accuracy, % | test loss | minus the head start's | "
        "minus MeZO's (95 % interval) | training loss, begin | end | steps | random numbers drawn | seeds"
    )
    tables = []
    for start in ("head start", "new head"):
        own = {each.method.name: rows for each, rows in found.items() if (each.task, each.start) == (task, start)}
        if own:
            begin = heads if start == "head start" else {}
            lines = [_line(name, own[name], begin, own.get("MeZO", {})) for name in METHODS if name in own]
            title = f"{task}, {start}"
            if begin:
                points = [100 * accuracy(head) for head in begin.values()]
                title += f"; head alone: {statistics.mean(points):.2f} ± {deviation(points):.2f} %"
            tables.append("\n".join([title, "", *markdown_table(header, lines)]) + "\n")
    return tables


def _line(name: str, rows: Rows, heads: Rows, mezo: Rows) -> tuple[str, ...]:
    first = next(iter(rows.values()))
    points = [100 * accuracy(row) for row in rows.values()]
    losses = [row["test_loss"] for row in rows.values() if "test_loss" in row]
    drawn = [row["numbers_drawn"] for row in rows.values() if "numbers_drawn" in row]
    return (
        name,
        f"{first['rate']:g}",
        f"{first['eps']:g}" if first["eps"] else "",
        f"{statistics.mean(points):.2f} ± {deviation(points):.2f}",
        f"{statistics.mean(losses):.3f} ± {deviation(losses):.3f}" if losses else "",
        _difference(rows, heads),
        "" if name == "MeZO" else _difference(rows, mezo),
        f"{statistics.mean(row['losses'][0][1] for row in rows.values()):.3f}",
        f"{statistics.mean(row['losses'][-1][1] for row in rows.values()):.3f}",
        str(first["steps"]),
        f"{statistics.mean(drawn):,.0f}" if drawn else "",
        str(len(rows)),
    )


def _difference(rows: Rows, others: Rows) -> str:
    """Points of accuracy between pairs of the same seed, with their interval."""
    seeds = [seed for seed in rows if seed in others]
    if not seeds:
        return ""
    pairs = paired([100 * (accuracy(rows[seed]) - accuracy(others[seed])) for seed in seeds])
    interval = pairs["interval_95"]
    return f"{pairs['mean']:+.2f}" + ("" if interval is None else " ({:+.2f} to {:+.2f})".format(*interval))


def _trials_table(task: str, series: list[Series], done: Done) -> str:
    """Accuracies on the validation samples, by learning rate and eps."""
    trials = {
        f"{each.start}, {each.method.name}": each.trials(done)
        for each in series
        if each.task == task and not each.method.tuned_as and each.trials(done)
    }
    rates = sorted({rate for found in trials.values() for rate, _ in found})
    lines = []
    for name, found in trials.items():
        cells = []
        for rate in rates:
            points = [(eps, value) for (own, eps), value in sorted(found.items()) if own == rate]
            cells.append(", ".join(f"{100 * value:.1f}" + (f" ({eps:g})" if eps else "") for eps, value in points))
        lines.append((name, *cells))
    title = f"{task}, accuracy on validation samples, %, by learning rate (eps in parentheses); one seed"
    header = " | ".join(["method", *(f"{rate:g}" for rate in rates)])
    return "\n".join([title, "", *markdown_table(header, lines)]) + "\n"


def _plot(found: Mapping[Series, Rows], path: Path) -> None:
    """Training losses by forward passes, means of the seeds; and the accuracy by pool size and width of registers.

    Methods with fewer seeds than others are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(map(len, found.values()))
    found = {each: rows for each, rows in found.items() if len(rows) == most}
    panels = sorted({(each.task, each.start) for each in found})
    sources = len({each.method.name for each in found if (each.method.settings or {}).get("number_reuse")}) > 1
    count = len(panels) + sources
    figure, axes = plt.subplots(1, count, figsize=(4.8 * count, 4.4), squeeze=False)
    for axis, (task, start) in zip(axes[0], panels, strict=False):
        for number, name in enumerate(SHOWN):
            for each, rows in found.items():
                if (each.task, each.start, each.method.name) == (task, start, name):
                    curves = [row["losses"] for row in rows.values()]
                    passes = [place for place, _ in curves[0]]
                    losses = [statistics.mean(curve[k][1] for curve in curves) for k in range(len(passes))]
                    axis.plot(passes, losses, label=name, color=f"C{number}", linewidth=1.2)
        axis.set(title=f"{task}, {start}", xlabel="forward passes", ylabel="training loss", ylim=(0, None))
        axis.set_ylim(0, min(axis.get_ylim()[1], 6))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    if sources:
        _plot_sources(axes[0][-1], found)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_sources(axis: Any, found: Mapping[Series, Rows]) -> None:
    """Test accuracies from a task's own start, by the numbers that there are: bits of a register, or of the pool."""
    for colour, task in zip(("C0", "C1", "C2", "C3"), sorted({each.task for each in found}), strict=False):
        start = TASKS[task].start
        own = {each.method.name: rows for each, rows in found.items() if (each.task, each.start) == (task, start)}
        mean = {name: 100 * statistics.mean(map(accuracy, rows.values())) for name, rows in own.items()}
        pools = [(bits, mean[pool(2**bits - 1)]) for bits in (8, 10, 12, 14, 16) if pool(2**bits - 1) in mean]
        flies = [(bits, mean[on_the_fly(bits)]) for bits in WIDTHS if on_the_fly(bits) in mean]
        if pools:
            axis.plot(*zip(*pools, strict=True), "o-", color=colour, label=f"{task}, pool of 2^x - 1")
        if flies:
            axis.plot(*zip(*flies, strict=True), "s--", color=colour, label=f"{task}, registers of x bits")
        if "MeZO" in mean:
            axis.axhline(mean["MeZO"], color=colour, linewidth=0.8)
    axis.set(title="line: MeZO", xlabel="x", ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
