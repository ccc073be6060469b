"""What the measurements say: by arm, paired with freezing only, as claims, as tables and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._common import Claim
from .._statistics import deviation, markdown_table, paired, show_interval
from .experiments import FLIP, FREEZE_ONLY, NONE, gamma, whole

Runs = Mapping[int, Mapping[str, Mapping[str, Any]]]  # seed -> arm -> measurements
Arms = Mapping[str, Mapping[str, Any]]

#: Points of accuracy that are worth winning back.
_LOSS = 1.0
#: What one view with a quarter of its channels must win back of them, and may take of a whole view's extra bytes.
_WON_BACK, _OF_THE_BYTES = 2 / 3, 0.4
#: What warping must add to the cosine.
_MARGIN = 0.2


def compare(runs: Runs, names: list[str]) -> dict[str, dict[str, Any]]:
    """Every arm: accuracy, difference to freezing only, bytes, and what of the loss without views it wins back."""
    arms = {name: _one_arm(name, runs) for name in names}
    lost = -arms[NONE]["minus_freeze_only_points"]["mean"]
    for arm in arms.values():
        won = arm["accuracy_percent"]["mean"] - arms[NONE]["accuracy_percent"]["mean"]
        arm["minus_none_points"] = won
        arm["won_back"] = won / lost if lost > 0 else None
        if arm["bytes_per_sample"] is not None:
            arm["extra_bytes_per_sample"] = arm["bytes_per_sample"] - arms[NONE]["bytes_per_sample"]
    return arms


def _one_arm(name: str, runs: Runs) -> dict[str, Any]:
    rows = [measurements[name] for measurements in runs.values()]
    points = [100 * row["accuracy"] for row in rows]
    difference = [
        100 * (measurements[name]["accuracy"] - measurements[FREEZE_ONLY]["accuracy"])
        for measurements in runs.values()
    ]
    stores = [row["store"] for row in rows if "store" in row]
    return {
        "accuracy_percent": {"mean": statistics.mean(points), "sd": deviation(points), "by_seed": points},
        "minus_freeze_only_points": paired(difference),
        "bytes_per_sample": statistics.mean(store["bytes_per_sample"] for store in stores) if stores else None,
        "build_seconds": statistics.median(row["build_seconds"] for row in rows),
        # The clock starts at an epoch's beginning: a build is in it.
        "epochs_seconds": statistics.median(sum(row["epoch_seconds"]) - row["build_seconds"] for row in rows),
    }


def make_claims(name: str, arms: Arms) -> list[Claim]:
    """Whether a quarter of the channels wins back the loss, where there is one, and what it takes."""
    lost = -arms[NONE]["minus_freeze_only_points"]["mean"]
    claims = []
    if FLIP in arms:
        claims.append(Claim(f"{name}: points lost without augmentation", lost, at_least=_LOSS))
    if lost < _LOSS:
        return claims
    quarter = arms[gamma(0.25)]
    bytes_ratio = quarter["extra_bytes_per_sample"] / arms[whole()]["extra_bytes_per_sample"]
    return [
        *claims,
        Claim(f"{name}: part of them that {gamma(0.25)} wins back", quarter["won_back"], at_least=_WON_BACK),
        Claim(f"{name}: its extra bytes / a whole view's", bytes_ratio, at_most=_OF_THE_BYTES),
    ]


def table(title: str, arms: Arms, seeds: int) -> str:
    """Markdown."""
    header = "arm | bytes a sample | accuracy, % | minus freeze only | 95 % interval | won back | build s | epochs s"
    rows = []
    for name, arm in arms.items():
        accuracy, difference = arm["accuracy_percent"], arm["minus_freeze_only_points"]
        against_itself = name == FREEZE_ONLY
        rows.append(
            (
                name,
                "" if arm["bytes_per_sample"] is None else f"{arm['bytes_per_sample']:,.0f}",
                f"{accuracy['mean']:.2f} ± {accuracy['sd']:.2f}",
                "" if against_itself else f"{difference['mean']:+.2f}",
                "" if against_itself else show_interval(difference["interval_95"]),
                "" if against_itself or name == NONE or arm["won_back"] is None else f"{100 * arm['won_back']:.0f} %",
                f"{arm['build_seconds']:.1f}",
                f"{arm['epochs_seconds']:.0f}",
            )
        )
    return "\n".join([f"**{title}**, {seeds} seeds", "", *markdown_table(header, rows)]) + "\n"


def plot(arms: Arms, title: str, path: Path) -> None:
    """Difference in accuracy to freezing only against bytes a sample, with 95 % intervals over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    axes.axhline(0, color="black", linestyle="--", linewidth=1, label="freeze only: live augmentation, no store")
    groups = {
        "none": ("black", "s"),
        "naive": ("tab:red", "X"),
        "gamma": ("tab:blue", "o"),
        "whole": ("tab:orange", "D"),
    }
    places: list[float] = []
    for name, arm in arms.items():
        if arm["bytes_per_sample"] is None:
            continue
        colour, marker = groups[name.split(" ")[0]]
        difference = arm["minus_freeze_only_points"]
        interval = difference["interval_95"]
        half = 0.0 if interval is None else (interval[1] - interval[0]) / 2
        kilobytes = arm["bytes_per_sample"] / 1000
        # Arms of nearly the same size are drawn side by side.
        beside = any(abs(kilobytes - other) < 0.1 for other in places)
        places.append(kilobytes)
        place = kilobytes + (0.15 if beside else 0.0), difference["mean"]
        axes.errorbar(*place, yerr=half, color=colour, marker=marker, markersize=7, capsize=3, linestyle="none")
        style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
        if name.startswith(("gamma", "whole")):
            top = place[0], difference["mean"] + half
            axes.annotate(name, top, xytext=(1, 4), rotation=40, **style)
        else:
            axes.annotate(name, place, xytext=(-9, -3), ha="right", **style)
    axes.set(xlabel="kilobytes a sample in the store", ylabel="test accuracy minus freeze only, points")
    axes.set_xlim(0, 1.15 * max(places))
    axes.margins(y=0.15)
    axes.set_title(f"{title}; mean and 95 % interval", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summarize_features(runs: Mapping[int, Mapping[str, Mapping[str, float]]]) -> tuple[dict, str, list[Claim]]:
    """Cosines over the seeds, as a table and as claims."""
    results, claims, table_rows = {}, [], []
    for cut in next(iter(runs.values())):
        rows = [run[cut] for run in runs.values()]
        sides = {side: [row[side] for row in rows] for side in ("unwarped", "warped", "shown")}
        gain = paired([row["warped"] - row["unwarped"] for row in rows])
        results[cut] = {
            **{side: {"mean": statistics.mean(values), "by_seed": values} for side, values in sides.items()},
            "warped_minus_unwarped": gain,
        }
        table_rows.append(
            (
                cut,
                f"{statistics.mean(sides['unwarped']):.3f}",
                f"{statistics.mean(sides['warped']):.3f}",
                f"{gain['mean']:+.3f}",
                show_interval(gain["interval_95"], digits=3),
            )
        )
        claims.append(Claim(f"features, cut {cut}: cosine warped - unwarped", gain["mean"], at_least=_MARGIN))
    title = f"**Cosine of a view's features with the base view's**, DeiT-Tiny at 224 px, {len(runs)} seeds"
    header = "cut | base view as it is | base view, warped | gain | 95 % interval"
    return results, "\n".join([title, "", *markdown_table(header, table_rows)]) + "\n", claims
