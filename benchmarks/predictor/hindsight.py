"""What a predictor would have frozen in trainings of networks that it was made without, beside what hindsight says.

python -m benchmarks.predictor.hindsight outputs/predictor/runs/train
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_freezecache.policies.linear import LinearPolicy
from hf_freezecache.smartfrz.evaluation import cuts_of
from hf_freezecache.smartfrz.fitting import Fitting, fit
from hf_freezecache.smartfrz.labels import LabelRule
from hf_freezecache.smartfrz.recording import RecordedRun
from hf_freezecache.smartfrz.windows import load_runs, split_runs

from .._common import make_parser, pick, prepare, result_folder, write_result
from .._statistics import markdown_table

#: Shares of the largest distance at which a block counts as settled, by hindsight.
REMAINING = (0.02, 0.05, 0.1, 0.2)
THRESHOLD, VOTES = 0.5, 4
#: A distance counts as a share of at least this one: below, blocks of a fine-tuning have hardly moved at all.
LEAST_DISTANCE = 0.1


def by_epoch(cuts: Sequence[int], run: RecordedRun) -> list[int]:
    """The cut of each epoch: what was found before it began.

    Args:
        cuts: found by each snapshot.
        run: with those snapshots.
    """
    epochs = run.facts.settings["epochs"]
    before = [int((run.progress < epoch / epochs - 1e-9).sum()) for epoch in range(epochs)]
    return [cuts[number - 1] if number else 0 for number in before]


def cuts_by_hindsight(run: RecordedRun, rule: LabelRule) -> list[int]:
    """The deepest cut by each snapshot before which all blocks have settled."""
    return np.logical_and.accumulate(rule.settled(run.cka), axis=1).sum(1).tolist()


def cuts_of_linear(run: RecordedRun) -> list[int]:
    """The cut of each epoch by policy `linear`."""
    epochs, blocks = run.facts.settings["epochs"], run.cka.shape[1]
    changes = LinearPolicy().changes(blocks, epochs)
    return [max([cut for when, cut in changes if when <= epoch], default=0) for epoch in range(epochs)]


def measure(run: RecordedRun, cuts: Sequence[int]) -> dict[str, float]:
    """What cuts by epoch would have cost and left undone, had the training gone on as it did.

    Args:
        run: recorded, nothing frozen.
        cuts: of each epoch.

    Returns:
        `flops` of freezing alone, relative to no freezing, blocks counted alike; `remaining`: the largest share of
        its largest distance that a block had left when it froze.
    """
    epochs, blocks = len(cuts), run.cka.shape[1]
    rule = LabelRule()
    distances = 1 - np.nan_to_num(run.cka, nan=0.0)
    means = np.stack([distances[max(0, end - rule.window) : end].mean(0) for end in range(1, len(distances) + 1)])
    left, frozen = 0.0, 0
    for epoch, cut in enumerate(cuts):
        place = max(0, int((run.progress < epoch / epochs - 1e-9).sum()) - 1)
        for block in range(frozen, cut):
            left = max(left, float(means[place, block] / max(LEAST_DISTANCE, means[:, block].max())))
        frozen = max(frozen, cut)
    return {"flops": statistics.fmean(1 - 2 / 3 * cut / blocks for cut in cuts), "remaining": left}


def compare(runs: Sequence[RecordedRun], seeds: Sequence[int], epochs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Means over the runs of each network, by rule: `linear`, hindsight, and a predictor made without the network.

    Args:
        runs: of all networks.
        seeds: of the predictors.
        epochs: of their fits.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for network in sorted({run.facts.network for run in runs}):
        own = [run for run in runs if run.facts.network == network]
        others = [run for run in runs if run.facts.network != network]
        by_rule = {"linear": [measure(run, cuts_of_linear(run)) for run in own]}
        for remaining in REMAINING:
            rule = LabelRule(remaining=remaining)
            by_rule[f"hindsight, {remaining}"] = [
                measure(run, by_epoch(cuts_by_hindsight(run, rule), run)) for run in own
            ]
        by_rule["predictor"] = []
        for seed in seeds:
            predictor, _ = fit(*split_runs(others, 0.2, seed), LabelRule(), Fitting(epochs=epochs, seed=seed))
            by_rule["predictor"] += [
                measure(run, by_epoch(cuts_of(predictor, run, THRESHOLD, VOTES), run)) for run in own
            ]
        found[network] = {
            name: {key: statistics.fmean(each[key] for each in values) for key in ("flops", "remaining")}
            for name, values in by_rule.items()
        }
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """FLOPs and what was left, by network."""
    rules = list(next(iter(found.values())))
    rows = [
        [network, *(f"{by_rule[rule]['flops']:.2f} ({by_rule[rule]['remaining']:.2f})" for rule in rules)]
        for network, by_rule in found.items()
    ]
    return markdown_table(" | ".join(["network", *rules]), rows)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", help="recorded trainings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=Fitting().epochs)
    options = parser.parse_args()
    prepare(options)
    found = compare(load_runs(Path(options.runs)), options.seeds, options.epochs)
    text = "\n".join(table(found))
    (result_folder("predictor", options.smoke) / "hindsight.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    write_result("predictor", options, pick(options, "seeds epochs"), found, [], "hindsight.json")


if __name__ == "__main__":
    main()
