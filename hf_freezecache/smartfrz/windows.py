"""Recorded trainings as samples for a predictor: the last snapshots of a block, and whether it has settled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .history import NUM_FEATURES, Variant
from .labels import LabelRule
from .recording import RecordedRun


@dataclass(frozen=True)
class Windows:
    """Samples of several runs.

    Args:
        histories: `(N, W, NUM_FEATURES)`, the last snapshot at the end, zeros before short ones.
        lengths: `(N,)`: snapshots that count.
        labels: `(N,)`: 1 where the block had settled.
        weights: `(N,)`: every block of every run counts the same in sum, however many snapshots it has.
    """

    histories: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_runs(folder: Path) -> list[RecordedRun]:
    """All recorded runs of a folder, by name.

    Raises:
        FileNotFoundError: if there is none.
    """
    paths = sorted(folder.rglob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no recorded training: `freezecache predictor record` makes them.")
    return [RecordedRun.load(path) for path in paths]


def make_windows(
    runs: Iterable[RecordedRun], rule: LabelRule, window: int, variant: Variant, least: int = 6
) -> Windows:
    """The samples of some runs; none of the finished model, which is at its end by definition.

    Args:
        runs: recorded.
        rule: of the labels.
        window: snapshots of a sample, at most.
        variant: how weights were sampled.
        least: snapshots of a sample, at least.
    """
    parts: list[tuple[np.ndarray, list[int], np.ndarray, np.ndarray]] = []
    for run in runs:
        features, labels = getattr(run, variant), rule.settled(run.cka)
        ends = range(least, len(features))  # the last snapshot is the finished model
        for block in range(features.shape[1]):
            histories = np.zeros((len(ends), window, NUM_FEATURES), dtype=np.float32)
            for place, end in enumerate(ends):
                recent = features[max(0, end - window) : end, block]
                histories[place, window - len(recent) :] = recent
            own = labels[least - 1 : -1, block]
            parts.append((histories, [min(end, window) for end in ends], own, np.full(len(ends), 1 / len(ends))))
    histories, lengths, labels, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Windows(
        torch.from_numpy(histories),
        torch.from_numpy(lengths),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(weights.astype(np.float32)),
    )


def split_runs(runs: Sequence[RecordedRun], share: float, seed: int) -> tuple[list[RecordedRun], list[RecordedRun]]:
    """Some whole runs of every network for training, the others to validate: windows of a run are much alike.

    Args:
        runs: recorded.
        share: of the runs of each network that validate; at least one, where it has two.
        seed: of the choice.
    """
    generator = np.random.default_rng(seed)
    training: list[RecordedRun] = []
    validation: list[RecordedRun] = []
    for network in sorted({run.facts.network for run in runs}):
        own = [run for run in runs if run.facts.network == network]
        held_out = set(generator.permutation(len(own))[: max(1, round(share * len(own))) if len(own) > 1 else 0])
        for place, run in enumerate(own):
            (validation if place in held_out else training).append(run)
    return training, validation
