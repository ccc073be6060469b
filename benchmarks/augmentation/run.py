"""Augmentation on replay: what is lost without it, what views and sensitive channels win back, and for how many bytes.

python -m benchmarks.augmentation.run --jobs 2
python -m benchmarks.augmentation.run --collect          # tables and plots of what is finished, nothing is trained
"""

from __future__ import annotations

import argparse
import functools
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from .._common import make_parser, prepare, quiet, result_folder, write_result
from .._partials import add_run_options, read_measurements, run_experiments, settle_run_options, write_measurements
from .experiments import Arm, Data, Experiment, make_experiments
from .features import FEATURES, feature_settings, measure_seed
from .tables import compare, make_claims, plot, summarize_features, table
from .training import LIVE, train_arm, train_live, weights_file

NAME = "augmentation"
TRAININGS = ("cifar10", "caltech")
_WEIGHTS = "weights"


def run_task(name: str, seed: int, options: argparse.Namespace) -> None:
    """One experiment with one seed; what is finished already is skipped."""
    quiet()
    torch.set_num_threads(options.threads)
    if name != FEATURES:
        run_seed(make_experiments(options)[name], seed, options)
    elif not read_measurements(options.output_dir, name, seed, feature_settings(options)):
        write_measurements(options.output_dir, name, seed, feature_settings(options), measure_seed(seed, options))
        print(f"{name}, seed {seed}: done", flush=True)


def run_seed(experiment: Experiment, seed: int, options: argparse.Namespace) -> None:
    """Trains the live epochs of a seed and all arms from their checkpoint, one after the other."""
    measurements = read_measurements(options.output_dir, experiment.name, seed, experiment.settings)
    if all(arm.name in measurements for arm in experiment.arms):
        return
    data = experiment.load_data(options, experiment.rows, experiment.test_rows)
    folder = Path(options.output_dir) / f"{experiment.name}-seed-{seed}"

    def note(name: str, result: dict[str, Any]) -> None:
        measurements[name] = result
        write_measurements(options.output_dir, experiment.name, seed, experiment.settings, measurements)
        seconds, accuracy = sum(result["epoch_seconds"]), 100 * result["accuracy"]
        print(f"{experiment.name}, seed {seed}, {name}: {accuracy:.2f} %, epochs {seconds:.0f} s", flush=True)

    if not has_checkpoint(experiment, data, folder, measurements):
        live = train_live(experiment, seed, data, folder, options)
        if measurements and measurements[LIVE][_WEIGHTS] != live[_WEIGHTS]:
            # Arms are compared only if they branch from the same weights.
            measurements.clear()
        note(LIVE, live)
    for arm in experiment.arms:
        if arm.name not in measurements:
            note(arm.name, timed(experiment, arm, seed, data, folder, options))
    shutil.rmtree(folder, ignore_errors=True)


def timed(
    experiment: Experiment, arm: Arm, seed: int, data: Data, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """An arm, with the seconds that all of it took."""
    start = time.perf_counter()
    result = train_arm(experiment, arm, seed, data, folder, options)
    return {**result, "all_seconds": time.perf_counter() - start}


def has_checkpoint(experiment: Experiment, data: Data, folder: Path, measurements: dict[str, Any]) -> bool:
    """Whether the live epochs were finished and their checkpoint is still there."""
    return LIVE in measurements and weights_file(experiment, data, folder).is_file()


# All of it


def collect(options: argparse.Namespace) -> None:
    """Tables, plots and JSON of the seeds that are finished, of all experiments.

    Raises:
        SystemExit: if nothing is finished.
    """
    target = result_folder(NAME, options.smoke)
    results, settings, text, claims = {}, {}, [], []
    for name, experiment in make_experiments(options).items():
        finished = {
            seed: read_measurements(options.output_dir, name, seed, experiment.settings) for seed in options.seeds
        }
        names = [arm.name for arm in experiment.arms]
        runs = {
            seed: measurements for seed, measurements in finished.items() if all(arm in measurements for arm in names)
        }
        if not runs:
            continue
        settings[name] = {**experiment.settings, "seeds": list(runs)}
        arms = compare(runs, names)
        results[name] = {"arms": arms, "runs": runs}
        claims += make_claims(name, arms)
        text.append(table(experiment.title, arms, len(runs)))
        plot(arms, f"{experiment.title}, {len(runs)} seeds", target / f"{name}.png")
    measured = {
        seed: read_measurements(options.output_dir, FEATURES, seed, feature_settings(options))
        for seed in options.seeds
    }
    measured = {seed: measurements for seed, measurements in measured.items() if measurements}
    if measured:
        settings[FEATURES] = {**feature_settings(options), "seeds": list(measured)}
        results[FEATURES], lines, more = summarize_features(measured)
        text.append(lines)
        claims += more
    if not results:
        raise SystemExit("nothing is finished yet.")
    (target / "table.md").write_text("\n".join(text))
    print("\n".join(text))
    settings |= {"jobs": options.jobs, "threads": options.threads}
    write_result(NAME, options, settings, results, claims)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_run_options(parser)
    parser.add_argument("--experiments", nargs="+", default=[*TRAININGS, FEATURES], choices=[*TRAININGS, FEATURES])
    options = parser.parse_args(argv)
    settle_run_options(options, NAME, options.jobs)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    run_experiments(options, {name: functools.partial(run_task, name) for name in options.experiments}, collect)


if __name__ == "__main__":
    main()
