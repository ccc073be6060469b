"""Pictures of the comparison of freezing rules."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: One for each rule, or more: the last ones are not among matplotlib's ten.
COLORS = (*(f"C{number}" for number in range(10)), "black", "gold")
Arms = Mapping[str, Mapping[str, Mapping[str, Any]]]


def plot_rules(results: Mapping[str, Arms], reference: str, path: Path) -> None:
    """A row for each task: the cut by epoch of each rule, and accuracy against FLOPs, both relative to no freezing.

    Args:
        results: by task, arm and seed.
        reference: the arm without freezing.
        path: of the picture.
    """
    figure, rows = plt.subplots(len(results), 2, figsize=(11, 3.4 * len(results) + 1), squeeze=False)
    names: dict[str, int] = {}
    for (task, arms), (cuts, costs) in zip(results.items(), rows, strict=True):
        plain = arms.get(reference, {})
        # Without a head start, all of the picture would be the distance to it.
        alone = {
            name: by_seed
            for name, by_seed in arms.items()
            if not name.endswith(", cached") and not name.startswith(f"{reference}, ")
        }
        for name, by_seed in alone.items():
            number = names.setdefault(name, len(names))
            color, marker = COLORS[number % len(COLORS)], "osD^vP*Xh<>d"[number % 12]
            curves = [run["cut_by_epoch"] for run in by_seed.values()]
            if any(map(any, curves)):
                means = [statistics.fmean(epoch) for epoch in zip(*curves, strict=True)]
                line = "--" if ", " in name else "-"  # over that of the same rule with other settings
                cuts.step(range(len(means) + 1), [*means, means[-1]], line, where="post", color=color)
            pairs = [(run, plain[seed]) for seed, run in by_seed.items() if seed in plain]
            if pairs:
                points = [100 * (run["accuracy"] - other["accuracy"]) for run, other in pairs]
                flops = statistics.fmean(run["flops"] / other["flops"] for run, other in pairs)
                spread = [[statistics.fmean(points) - min(points)], [max(points) - statistics.fmean(points)]]
                costs.errorbar(
                    flops, statistics.fmean(points), spread, color=color, marker=marker, capsize=2, label=name
                )
        cuts.set(title=f"{task}: frozen blocks", xlabel="epoch", ylabel="cut (mean over seeds)", ylim=(0, None))
        costs.axhline(0, color="0.8", zorder=0)
        costs.set(title=task, xlabel="FLOPs relative to no freezing", ylabel="points of accuracy (all seeds)")
    found = {
        name: handle for axes in rows[:, 1] for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight(), 1, 1))
    figure.legend(found.values(), found.keys(), loc="lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_regret(sweep: Mapping[str, Any], rules: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Accuracy against FLOPs of every cut and epoch of a sweep, its best, and where rules have come to.

    Args:
        sweep: `points`, each with `epoch`, `cut`, `flops` and `accuracy`, relative to no freezing.
        rules: `flops` and `accuracy` by rule, relative to no freezing.
        path: of the picture.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5))
    points = sweep["points"]
    for epoch in sorted({point["epoch"] for point in points}):
        own = sorted((point for point in points if point["epoch"] == epoch), key=lambda point: point["cut"])
        axes.plot(
            [point["flops"] for point in own],
            [point["accuracy"] for point in own],
            "o-",
            label=f"one freeze at epoch {epoch}",
            alpha=0.7,
        )
        for point in own:
            axes.annotate(str(point["cut"]), (point["flops"], point["accuracy"]), fontsize=7)
    for number, (name, rule) in enumerate(rules.items()):
        axes.plot(rule["flops"], rule["accuracy"], "sD^vP*Xh<"[number % 9], color="black", label=name, markersize=8)
    axes.axhline(0, color="0.8", zorder=0)
    axes.set(
        title=f"{sweep['task']}: hindsight and rules",
        xlabel="FLOPs relative to no freezing",
        ylabel="points of accuracy relative to no freezing",
    )
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
