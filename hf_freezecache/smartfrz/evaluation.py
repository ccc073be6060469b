"""How well a predictor knows what has settled, on trainings that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .labels import LabelRule
from .predictor import FreezePredictor
from .recording import RecordedRun
from .windows import make_windows

#: Bins of confidence, for the calibration.
_BINS = 10


@dataclass(frozen=True)
class Scores:
    """What a predictor answers, compared with hindsight; each block of each run counts the same.

    Args:
        windows: number of samples.
        settled: share of them in which the block has settled.
        precision: share of the answers "freeze" that are right; NaN where there are none.
        recall: share of the settled ones that are found; NaN where there are none.
        calibration_error: mean distance of confidence from how often it is right, over ten bins.
        brier: mean squared error of the confidence.
        brier_of_the_share: the same of a predictor that always says `settled`.
    """

    windows: int
    settled: float
    precision: float
    recall: float
    calibration_error: float
    brier: float
    brier_of_the_share: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; NaN as None."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def score(predictor: FreezePredictor, runs: Sequence[RecordedRun], rule: LabelRule, threshold: float = 0.5) -> Scores:
    """Scores of a predictor on recorded runs.

    Args:
        predictor: in eval mode.
        runs: that it has not seen.
        rule: of the labels.
        threshold: confidence from which on it says "freeze".
    """
    windows = make_windows(runs, rule, predictor.window, predictor.variant)
    confidence = predictor.confidence(windows.histories, windows.lengths).numpy().astype(np.float64)
    labels, weights = windows.labels.numpy().astype(np.float64), windows.weights.numpy().astype(np.float64)
    weights = weights / weights.sum()
    freeze = confidence >= threshold
    right = float((weights * labels * freeze).sum())
    said, settled = float((weights * freeze).sum()), float((weights * labels).sum())
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    error = sum(abs(float((weights * (confidence - labels))[bins == each].sum())) for each in range(_BINS))
    return Scores(
        windows=len(windows),
        settled=settled,
        precision=right / said if said else float("nan"),
        recall=right / settled if settled else float("nan"),
        calibration_error=error,
        brier=float((weights * (confidence - labels) ** 2).sum()),
        brier_of_the_share=settled * (1 - settled),
    )


def without_each_network(
    runs: Sequence[RecordedRun], make: Callable[[list[RecordedRun]], FreezePredictor], rule: LabelRule
) -> dict[str, Scores]:
    """Scores on every network by a predictor that was made without it.

    Args:
        runs: of all networks.
        make: trains a predictor on some of them.
        rule: of the labels.
    """
    networks = sorted({run.facts.network for run in runs})
    return {
        network: score(
            make([run for run in runs if run.facts.network != network]),
            [run for run in runs if run.facts.network == network],
            rule,
        )
        for network in networks
    }


def cuts_of(predictor: FreezePredictor, run: RecordedRun, threshold: float, votes: int, least: int = 6) -> list[int]:
    """The cut that the rule would have reached by each snapshot of a recorded run in which nothing was frozen."""
    features = torch.from_numpy(getattr(run, predictor.variant))
    cut, cuts, verdicts = 0, [], np.zeros((len(features), features.shape[1]), dtype=bool)
    for snapshot in range(len(features)):
        recent = features[max(0, snapshot + 1 - predictor.window) : snapshot + 1].transpose(0, 1)
        lengths = torch.full((len(recent),), recent.shape[1])
        verdicts[snapshot] = predictor.confidence(recent, lengths).numpy() >= threshold
        first = snapshot + 1 - votes
        while (
            first >= least - 1 and cut < features.shape[1] and 2 * verdicts[first : snapshot + 1, cut].sum() >= votes
        ):
            cut += 1
        cuts.append(cut)
    return cuts
