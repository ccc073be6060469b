"""What the measurements say: by arm, paired, as claims, as a table and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._common import Claim
from .._statistics import deviation, markdown_table, paired, show_interval, spread
from .arms import PLAIN, PROBE, cached, freeze_only

Runs = Mapping[int, Mapping[str, Mapping[str, Any]]]  # seed -> arm -> measurements


def by_arm(runs: Runs) -> dict[str, dict[str, Any]]:
    """Mean and spread of every arm, and its speed-ups over the plain arm of the same seed."""
    names = list(next(iter(runs.values())))
    return {name: _one_arm(name, runs) for name in names}


def _one_arm(name: str, runs: Runs) -> dict[str, Any]:
    rows = [arms[name] for arms in runs.values()]
    plain = [arms[PLAIN] for arms in runs.values()]
    measured = [p["train_seconds"] / row["train_seconds"] for p, row in zip(plain, rows, strict=True)]
    predicted = [p["flops"] / row["flops"] for p, row in zip(plain, rows, strict=True)]
    points = [100 * row["accuracy"] for row in rows]
    return {
        "accuracy_percent": {"mean": statistics.mean(points), "sd": deviation(points), "by_seed": points},
        "train_seconds": spread([row["train_seconds"] for row in rows]),
        "build_seconds": statistics.median(row["build_seconds"] for row in rows),
        "setup_seconds": statistics.median(row["setup_seconds"] for row in rows),
        "eval_seconds": statistics.median(row["eval_seconds"] for row in rows),
        "flops": statistics.median(row["flops"] for row in rows),
        "speedup_over_plain": spread(measured),
        "predicted_speedup": statistics.median(predicted),
        "measured_over_predicted": spread([m / p for m, p in zip(measured, predicted, strict=True)]),
    }


def by_schedule(runs: Runs, schedules: list[str]) -> dict[str, dict[str, Any]]:
    """Cached against freeze-only, paired by seed."""
    result = {}
    for points in schedules:
        pairs = [(arms[freeze_only(points)], arms[cached(points)]) for arms in runs.values()]
        difference = [100 * (second["accuracy"] - first["accuracy"]) for first, second in pairs]
        result[points] = {
            "cached_minus_freeze_only_points": paired(difference),
            "speedup_over_freeze_only": spread([a["train_seconds"] / b["train_seconds"] for a, b in pairs]),
            "predicted_over_freeze_only": statistics.median(a["flops"] / b["flops"] for a, b in pairs),
            "speedup_after_the_freeze": spread([a["own_seconds"] / b["own_seconds"] for a, b in pairs]),
        }
    return result


def make_claims(arms: Mapping[str, Any], schedules: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for points, result in schedules.items():
        interval = result["cached_minus_freeze_only_points"]["interval_95"]
        if interval is not None:
            what = f"{points}: cached - freeze-only, points, lower end of the 95 % interval"
            claims.append(Claim(what, interval[0], at_least=-0.5))
        ratio = arms[cached(points)]["measured_over_predicted"]["median"]
        claims.append(Claim(f"{points}: cached, measured / predicted speed-up over plain", ratio, at_least=0.9))
    best = max(schedules, key=lambda points: arms[cached(points)]["speedup_over_plain"]["median"])
    over_plain = arms[cached(best)]["speedup_over_plain"]["median"]
    over_freezing = schedules[best]["speedup_over_freeze_only"]["median"]
    claims.append(Claim(f"{best}: cached over plain, whole run", over_plain, at_least=2.0))
    claims.append(Claim(f"{best}: cached over freeze-only, whole run", over_freezing, at_least=1.3))
    return claims


def table(arms: Mapping[str, Any], schedules: Mapping[str, Any], seeds: int) -> str:
    """Markdown."""
    header = "arm | accuracy, % | training s | of it build s | TFLOP | speed-up over plain | by FLOPs | measured / it"
    rows = [
        (
            name,
            f"{arm['accuracy_percent']['mean']:.2f} ± {arm['accuracy_percent']['sd']:.2f}",
            f"{arm['train_seconds']['median']:.1f}",
            f"{arm['build_seconds']:.1f}",
            f"{arm['flops'] / 1e12:.2f}",
            f"{arm['speedup_over_plain']['median']:.2f}",
            f"{arm['predicted_speedup']:.2f}",
            f"{arm['measured_over_predicted']['median']:.2f}",
        )
        for name, arm in arms.items()
    ]
    lines = markdown_table(header, rows)
    lines += [
        "",
        f"{seeds} seeds; accuracy on test images: mean ± standard deviation; all else: medians, evaluation left out.",
        "",
    ]
    header = "schedule | cached - freeze-only | 95 % interval | cached over freeze-only | by FLOPs | after the freeze"
    rows = [
        (
            points,
            f"{result['cached_minus_freeze_only_points']['mean']:+.2f} points",
            show_interval(result["cached_minus_freeze_only_points"]["interval_95"]),
            f"{result['speedup_over_freeze_only']['median']:.2f}",
            f"{result['predicted_over_freeze_only']:.2f}",
            f"{result['speedup_after_the_freeze']['median']:.2f}",
        )
        for points, result in schedules.items()
    ]
    return "\n".join([*lines, *markdown_table(header, rows)]) + "\n"


def plot(runs: Runs, schedules: list[str], path: Path) -> None:
    """Test accuracy against training seconds, mean over the seeds, with one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    styles = {PLAIN: ("black", "-"), PROBE: ("tab:gray", ":")}
    for number, points in enumerate(schedules):
        styles[freeze_only(points)], styles[cached(points)] = (f"C{number}", "--"), (f"C{number}", "-")
    for name, (colour, line) in styles.items():
        curves = [arms[name]["curve"] for arms in runs.values()]
        seconds = [statistics.mean(point["seconds"] for point in column) for column in zip(*curves, strict=True)]
        points = [[100 * point["accuracy"] for point in column] for column in zip(*curves, strict=True)]
        means, spreads = [statistics.mean(column) for column in points], [deviation(column) for column in points]
        axes.plot(seconds, means, color=colour, linestyle=line, marker="o", markersize=4, label=name)
        lower = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        upper = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(seconds, lower, upper, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="training seconds, builds included, evaluation apart", ylabel="test accuracy, %", xlim=(0, None))
    axes.set_title(f"DeiT-Tiny on Caltech-101, {len(runs)} seeds, mean and standard deviation", fontsize=10)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
