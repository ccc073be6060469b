"""What a predictor needs: scores on networks that it was made without, with parts of it left out.

python -m benchmarks.predictor.ablations outputs/predictor/runs/train outputs/predictor/runs/test
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hf_freezecache.smartfrz.evaluation import Scores, score, without_each_network
from hf_freezecache.smartfrz.fitting import Fitting, fit
from hf_freezecache.smartfrz.history import SCALARS
from hf_freezecache.smartfrz.labels import LabelRule
from hf_freezecache.smartfrz.predictor import FreezePredictor
from hf_freezecache.smartfrz.recording import RecordedRun
from hf_freezecache.smartfrz.windows import load_runs, split_runs

from .._common import make_parser, pick, prepare, result_folder, write_result
from .._statistics import markdown_table

WHOLE = "whole"
#: Settings of `FreezePredictor` by what is changed.
VARIANTS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "fresh positions": {"variant": "fresh"},
    "no attention": {"attention": False},
    "window 4": {"window": 4},
    "window 16": {"window": 16},
    "window 32": {"window": 32},
    "with quantiles": {"inputs": ["quantiles", *SCALARS]},
    "with quantiles, window 16": {"inputs": ["quantiles", *SCALARS], "window": 16},
    **{f"no {name}": {"inputs": [other for other in SCALARS if other != name]} for name in SCALARS},
    "progress alone": {"inputs": ["progress"]},
    "progress and depth alone": {"inputs": ["progress", "depth"]},
    "quantiles alone": {"inputs": ["quantiles"]},
}


def measure(
    runs: Sequence[RecordedRun], tests: Sequence[RecordedRun], settings: Mapping[str, Any], seed: int, epochs: int
) -> dict[str, dict[str, Any]]:
    """Scores of one variant with one seed, by network: those left out in turn, and those of the test runs.

    Args:
        runs: to train with.
        tests: of networks that are never trained with.
        settings: of the predictor.
        seed: of the split, the initialization and the order.
        epochs: of the fit.
    """
    rule = LabelRule()

    def make(some: Sequence[RecordedRun]) -> FreezePredictor:
        training, validation = split_runs(some, 0.2, seed)
        return fit(training, validation, rule, Fitting(epochs=epochs, seed=seed), **settings)[0]

    found = without_each_network(runs, make, rule)
    predictor = make(runs)
    for network in sorted({run.facts.network for run in tests}):
        own = [run for run in tests if run.facts.network == network]
        found[f"{network} (test)"] = score(predictor, own, rule)
    return {network: scores.to_dict() | {"skill": skill(scores)} for network, scores in found.items()}


def skill(scores: Scores) -> float:
    """Brier skill: 1 is perfect, 0 is a predictor that always says the share that has settled."""
    return 1 - scores.brier / scores.brier_of_the_share


def work(arguments: tuple[argparse.Namespace, str, int]) -> dict[str, dict[str, Any]]:
    options, name, seed = arguments
    prepare(options)
    runs, tests = load_runs(Path(options.runs)), load_runs(Path(options.tests))
    return measure(runs, tests, VARIANTS[name], seed, options.epochs)


def table(results: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> list[str]:
    """One variant a line: means over networks and seeds, and the spread over seeds of the mean over networks."""
    rows = []
    for name, by_seed in results.items():
        cells = []
        for are_tests in (False, True):
            skills, precisions, recalls = [], [], []
            for found in by_seed.values():
                own = [scores for network, scores in found.items() if network.endswith("(test)") == are_tests]
                skills.append(statistics.fmean(scores["skill"] for scores in own))
                precisions += [scores["precision"] for scores in own if scores["precision"] is not None]
                recalls += [scores["recall"] for scores in own if scores["recall"] is not None]
            numbers = [statistics.fmean(values) if values else float("nan") for values in (precisions, recalls)]
            cells += [f"{statistics.fmean(skills):.2f} ({min(skills):.2f} to {max(skills):.2f})"]
            cells += [f"{number:.2f}" for number in numbers]
        rows.append([name, *cells])
    return markdown_table(
        "predictor | skill, each network left out | precision | recall | skill, test networks | precision | recall",
        rows,
    )


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("runs", help="recorded trainings to make predictors from")
    parser.add_argument("tests", help="recorded trainings of other networks")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    prepare(options)
    planned = [(options, name, seed) for name in options.only for seed in options.seeds]
    results: dict[str, dict[str, Any]] = {}
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for (_, name, seed), found in zip(planned, pool.map(work, planned), strict=True):
            results.setdefault(name, {})[str(seed)] = found
            print(name, seed, f"{statistics.fmean(entry['skill'] for entry in found.values()):.3f}", flush=True)
    text = "\n".join(table(results))
    (result_folder("predictor", options.smoke) / "ablations.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    write_result("predictor", options, pick(options, "seeds epochs only"), results, [], "ablations.json")


if __name__ == "__main__":
    main()
