"""Tables, plots and claims of what is measured."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._common import Claim, pick, result_folder, write_result
from .._statistics import deviation, markdown_table, paired, spread
from ..gpu.workload import describe_card
from .arms import Arm, make_arms
from .measurements import Done, Result, chosen_rate, read_done

#: By arm, by seed.
Runs = Mapping[str, Mapping[int, Result]]


def collect_task(name: str, options: argparse.Namespace) -> None:
    """Writes tables, plot and JSON of a task; of the validation alone if no arm has a seed."""
    done = read_done(options, name)
    if not done:
        print(f"{name}: nothing is finished.")
        return
    runs = _runs(done)
    folder = result_folder("headline", options.smoke) / ("gpu" if options.gpu else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"validation": _validation(done), "runs": runs}
    text = _validation_table(name, content["validation"])
    if runs:
        arms = {arm: _one_arm(rows) for arm, rows in runs.items()}
        places = {arm: (entry["seconds"]["median"], entry["accuracy"]["mean"]) for arm, entry in arms.items()}
        content |= {"arms": arms, "pareto_front": pareto_front(places)}
        text = f"{_table(name, arms, content['pareto_front'])}\n{text}"
        _plot(name, arms, folder / f"{name}.png")
    print(text)
    (folder / f"{name}.md").write_text(text)
    if options.gpu:
        content["gpu"] = describe_card()
    settings = pick(options, "rows test_rows batch_size seeds jobs threads gpu")
    target = f"{'gpu' if options.gpu else 'cpu'}/{name}.json"
    write_result("headline", options, settings, content, make_claims(name, runs), target)


def _validation(done: Done) -> dict[str, dict[str, float]]:
    """Accuracies on the validation samples, by arm and learning rate."""
    trials: dict[str, dict[str, float]] = {}
    for arm in make_arms():
        for (name, rate, _), result in sorted(done.items()):
            if name == arm.name and result["is_tuning"]:
                trials.setdefault(name, {})[f"{rate:g}"] = 100 * result["accuracy"]
    return trials


def _validation_table(name: str, trials: Mapping[str, Mapping[str, float]]) -> str:
    rates = sorted({rate for by_rate in trials.values() for rate in by_rate}, key=float)
    rows = [(arm, *(f"{found[rate]:.2f}" if rate in found else "" for rate in rates)) for arm, found in trials.items()]
    title = f"{name}, accuracy on validation samples, %, by learning rate; one seed"
    return "\n".join([title, "", *markdown_table(" | ".join(["arm", *rates]), rows)]) + "\n"


def _runs(done: Done) -> dict[str, dict[int, Result]]:
    runs: dict[str, dict[int, Result]] = {}
    for arm in make_arms():
        rate = chosen_rate(done, arm.tuned_as or arm.name)
        rows = {
            seed: result
            for (name, own, seed), result in done.items()
            if name == arm.name and own == rate and not result["is_tuning"]
        }
        if rows:
            runs[arm.name] = dict(sorted(rows.items()))
    return runs


def _one_arm(rows: Mapping[int, Result]) -> dict[str, Any]:
    points = [100 * row["accuracy"] for row in rows.values()]
    memory = [row["peak_gpu_bytes"] for row in rows.values() if row["peak_gpu_bytes"]]
    return {
        "learning_rate": next(iter(rows.values()))["learning_rate"],
        "seeds": list(rows),
        "accuracy": {"mean": statistics.mean(points), "sd": deviation(points), "by_seed": points},
        "seconds": spread([row["seconds"] for row in rows.values()]),
        "setup_seconds": statistics.median(row["setup_seconds"] for row in rows.values()),
        "flops": statistics.median(row["flops"] for row in rows.values()),
        "build_seconds": statistics.median(row.get("build_seconds", 0.0) for row in rows.values()),
        "head_start_seconds": statistics.median(row.get("head_start_seconds", 0.0) for row in rows.values()),
        "peak_gpu_bytes": statistics.median(memory) if memory else None,
    }


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points than which no other has a higher accuracy at no more cost.

    Args:
        points: cost and accuracy by name.
    """
    front: list[str] = []
    best = float("-inf")
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > best:
            front.append(name)
            best = accuracy
    return front


def _pairs(runs: Runs, first: str, second: str) -> list[tuple[Result, Result]]:
    """The results of two arms, by seeds that both have."""
    seeds = sorted(set(runs.get(first, ())) & set(runs.get(second, ())))
    return [(runs[first][seed], runs[second][seed]) for seed in seeds]


def is_ours(arm: Arm) -> bool:
    """Whether an arm freezes and caches by this package."""
    return not arm.lora and arm.cache == "always" and (arm.points not in (None, "0:all") or "policy" in arm.settings)


def make_claims(name: str, runs: Runs) -> list[Claim]:
    """The aims: ours against plain arms of the same seconds, and against the best plain ones."""
    arms = {arm.name: arm for arm in make_arms() if arm.name in runs}
    mean = {arm: statistics.mean(row["accuracy"] for row in rows.values()) for arm, rows in runs.items()}
    seconds = {arm: statistics.median(row["seconds"] for row in rows.values()) for arm, rows in runs.items()}
    ours = [arm for arm in arms if is_ours(arms[arm])]
    plain = [arm for arm in arms if arms[arm].is_plain]
    claims = []
    gains = [mean[best] - mean[arm] for arm in plain if (best := _best_within(ours, seconds[arm], mean, seconds))]
    if gains:
        what = f"{name}: the best of ours that takes no more seconds - a plain arm, points, least over the plain arms"
        claims.append(Claim(what, 100 * min(gains), at_least=0))
    for has_start, what, most in ((False, "plain's best", 1 / 3), (True, "plain's best with a head start", 2 / 3)):
        others = [arm for arm in plain if bool(arms[arm].head_start) == has_start]
        if not ours or not others:
            continue
        best = max(others, key=mean.__getitem__)
        as_good = [arm for arm in ours if mean[arm] >= mean[best]]
        own = min(as_good, key=seconds.__getitem__) if as_good else max(ours, key=mean.__getitem__)
        pairs = _pairs(runs, best, own)
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
        claims.append(Claim(f"{name}: seconds of '{own}' over those of {what} ('{best}')", ratio, at_most=most))
        interval = paired([100 * (b["accuracy"] - a["accuracy"]) for a, b in pairs])["interval_95"]
        if interval is not None:
            what = f"{name}: '{own}' - '{best}', points, lower end of the 95 % interval"
            claims.append(Claim(what, interval[0], at_least=-0.5))
    return claims


def _best_within(
    arms: Iterable[str], most: float, accuracy: Mapping[str, float], seconds: Mapping[str, float]
) -> str | None:
    """The arm of the highest accuracy that takes no more seconds; None if none does."""
    return max((arm for arm in arms if seconds[arm] <= most), key=accuracy.__getitem__, default=None)


def _table(name: str, arms: Mapping[str, Any], front: list[str]) -> str:
    header = (
        "arm | learning rate | accuracy, % | seconds (min to max) | before the first epoch | of it head start | "
        "builds | TFLOP | GPU memory, MB | on the Pareto front of seconds"
    )
    rows = []
    for arm, entry in arms.items():
        memory = entry["peak_gpu_bytes"]
        rows.append(
            (
                arm,
                f"{entry['learning_rate']:g}",
                f"{entry['accuracy']['mean']:.2f} ± {entry['accuracy']['sd']:.2f}",
                "{median:.1f} ({min:.1f} to {max:.1f})".format(**entry["seconds"]),
                f"{entry['setup_seconds']:.1f}",
                f"{entry['head_start_seconds']:.1f}",
                f"{entry['build_seconds']:.1f}",
                f"{entry['flops'] / 1e12:.2f}",
                "" if memory is None else f"{memory / 1e6:.0f}",
                "yes" if arm in front else "",
            )
        )
    seeds = sorted({len(entry["seeds"]) for entry in arms.values()})
    count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return "\n".join([f"{name}, {count} seeds", "", *markdown_table(header, rows)]) + "\n"


def _plot(name: str, arms: Mapping[str, Any], path: Path) -> None:
    """Accuracy against seconds and against FLOPs, all arms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    known = {arm.name: arm for arm in make_arms()}
    figure, panels = plt.subplots(1, 2, figsize=(13, 6), sharey=True)
    for panel, label, cost_of in (
        (panels[0], "seconds of training, all but the evaluation", lambda entry: entry["seconds"]["median"]),
        (panels[1], "TFLOP, builds and head start included", lambda entry: entry["flops"] / 1e12),
    ):
        front = pareto_front({arm: (cost_of(entry), entry["accuracy"]["mean"]) for arm, entry in arms.items()})
        for number, (arm, entry) in enumerate(arms.items(), start=1):
            colour = "C0" if known[arm].is_plain else "C3" if is_ours(known[arm]) else "tab:gray"
            place = cost_of(entry), entry["accuracy"]["mean"]
            panel.errorbar(*place, yerr=entry["accuracy"]["sd"], fmt="o", color=colour, markersize=5, linewidth=0.7)
            panel.annotate(str(number), place, textcoords="offset points", xytext=(4, 4), fontsize=8)
        line = sorted((cost_of(arms[arm]), arms[arm]["accuracy"]["mean"]) for arm in front)
        panel.step(*zip(*line, strict=True), where="post", color="black", linewidth=0.8)
        panel.set(xlabel=label, xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    legend = "\n".join(f"{number}  {arm}" for number, arm in enumerate(arms, start=1))
    figure.text(0.76, 0.5, legend, fontsize=8, va="center")
    figure.suptitle(f"{name}: blue plain, red ours, grey others; line: Pareto front; bars: one standard deviation")
    figure.tight_layout(rect=(0, 0, 0.76, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
