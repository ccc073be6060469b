"""What a predictor reads of a block: a few of its weights at regular moments of the training."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

#: Weights that stand for a block (SmartFRZ).
SAMPLED = 1024
#: Moments of a training at which they are taken, at most; the same for trainings of any length.
SNAPSHOTS = 60
#: Quantiles that stand for the distribution of the sampled weights, their drift and their step.
QUANTILES = 16

Variant = Literal["fixed", "fresh"]
#: Values that do not depend on the order of the weights, after the quantiles.
SCALARS = ("scale", "drift", "step", "step_to_drift", "turn", "outward", "progress", "depth")
NUM_FEATURES = 3 * QUANTILES + len(SCALARS)
_TINY = 1e-8


def snapshot_every(max_steps: int) -> int:
    """Optimizer steps from one snapshot to the next.

    Args:
        max_steps: of the whole training.
    """
    return max(1, -(-max_steps // SNAPSHOTS))


class WeightSampler:
    """Takes some weights of a block, each relative to the size of the weights in its tensor at the start.

    Of tensors with two dimensions or more: convolutions, linear layers, embeddings. Biases and normalizations are few,
    and of another kind. Where there are none, whatever parameters there are.

    Args:
        parameters: of the block, by name, as they are at the start of the training.
        seed: of the positions.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], seed: int):
        matrices = {name: value for name, value in parameters.items() if value.ndim > 1}
        self._names = sorted(matrices or parameters)
        self._sizes = [parameters[name].numel() for name in self._names]
        self._seed = seed
        self.scales = np.array([_scale(parameters[name]) for name in self._names], dtype=np.float32)

    def take(self, parameters: Mapping[str, nn.Parameter], snapshot: int, variant: Variant) -> np.ndarray:
        """The weights at a moment.

        Args:
            parameters: of the block, by name.
            snapshot: number of the snapshot.
            variant: `fixed`: the same positions at every snapshot, so that trajectories are seen; `fresh`: others at
                each, sorted by value: the distribution alone is seen.

        Returns:
            float32 `(SAMPLED,)`; zeros where the block has no parameters.
        """
        if not self._sizes or not sum(self._sizes):
            return np.zeros(SAMPLED, dtype=np.float32)
        positions = self._positions(snapshot) if variant == "fresh" else self._fixed
        values = [
            parameters[name].detach().reshape(-1)[mine.to(parameters[name].device)].float().cpu().numpy() / scale
            for name, mine, scale in zip(self._names, positions, self.scales, strict=True)
        ]
        result = np.concatenate(values).astype(np.float32)
        return np.sort(result) if variant == "fresh" else result

    @functools.cached_property
    def _fixed(self) -> list[torch.Tensor]:
        return self._positions(0)

    def _positions(self, snapshot: int) -> list[torch.Tensor]:
        """Positions in each tensor; they repeat where a block has fewer weights."""
        generator, bounds = np.random.default_rng([self._seed, snapshot]), np.cumsum([0, *self._sizes])
        drawn = np.sort(generator.integers(0, bounds[-1], SAMPLED))
        return [
            torch.from_numpy(drawn[(drawn >= start) & (drawn < end)] - start)
            for start, end in zip(bounds, bounds[1:], strict=False)
        ]


def _scale(value: torch.Tensor) -> float:
    rms = float(value.detach().float().square().mean().sqrt())
    return rms if rms > _TINY else 1.0


def describe_snapshot(
    now: np.ndarray, first: np.ndarray, before: np.ndarray, step_before: np.ndarray, progress: float, depth: float
) -> np.ndarray:
    """What a predictor reads of one snapshot: scale, drift since the start, step since the snapshot before, and where.

    Networks, kinds of layer and learning rates differ by orders of magnitude: shapes of distributions and logarithms
    of sizes are what they have in common. Weights of blocks in all depths come to rest at nearly the same time, and
    the outputs of the first ones much earlier: without its depth, a predictor cannot tell blocks of a network apart.

    Args:
        now: weights `(SAMPLED,)`, as `WeightSampler` takes them.
        first: at the start.
        before: at the snapshot before.
        step_before: from that before it to that.
        progress: share of the training that is done.
        depth: of the block, see `depth_of`.

    Returns:
        float32 `(NUM_FEATURES,)`, all of the order of 1.
    """
    drift, step = now - first, now - before
    sizes = [_rms(now), _rms(drift), _rms(step)]
    logs = [np.log10(size + _TINY) / 4 for size in sizes]
    shapes = [_quantiles(value / (size + _TINY)) for value, size in zip((now, drift, step), sizes, strict=True)]
    scalars = [*logs, logs[2] - logs[1], _cosine(step, step_before), _cosine(step, drift), progress, depth]
    return np.concatenate([*shapes, np.array(scalars)]).astype(np.float32)


def describe_history(weights: np.ndarray, progress: Sequence[float], depth: float) -> np.ndarray:
    """The same for all snapshots of a block.

    Args:
        weights: `(S, SAMPLED)`.
        progress: `(S,)`.
        depth: of the block, see `depth_of`.

    Returns:
        float32 `(S, NUM_FEATURES)`.

    Shapes: S snapshots.
    """
    described, before, step_before = [], weights[0], np.zeros_like(weights[0])
    for now, done in zip(weights, progress, strict=True):
        described.append(describe_snapshot(now, weights[0], before, step_before, done, depth))
        before, step_before = now, now - before
    return np.stack(described)


def depth_of(index: int, num_blocks: int) -> float:
    """Where a block is: 0 for the stem, 1 for the last one."""
    return index / max(1, num_blocks - 1)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Means of equal parts of the sorted values: tails are seen without being noisy."""
    return np.sort(values).reshape(QUANTILES, -1).mean(1).clip(-5, 5)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    sizes = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(one @ other) / sizes if sizes > _TINY * _TINY else 0.0
