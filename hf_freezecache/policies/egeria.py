"""Egeria: blocks whose plasticity has come to rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .base import Moment, ObservedBlock
from .settling import SettlingPolicy, tensor_from_text, tensor_to_text


class EgeriaPolicy(SettlingPolicy):
    """Freezes a block when the similarity-preserving loss to a reference model stops to change.

    Wang et al. 2023 (EuroSys), arXiv 2201.06227. The plasticity of a block is the mean squared difference between the
    inner products of samples in its output and in that of a reference, rows scaled to length 1 (Tung and Mori 2019).
    It is smoothed over `window` readings; a block has settled when the slope of the smoothed curve has been below
    `tolerance` of its largest early slope for `window` readings.

    As implemented: over a few fixed training samples, `similarities` of `ObservedBlock`, where the paper runs a
    quantized copy of the model on every batch that it looks at. The reference is the model after the first epoch,
    which stands for the paper's critical period, and stays; the paper renews it. All blocks are watched, not only the
    foremost live one. Nothing freezes before epoch 2, nor before eleven readings, so that a training of few epochs may
    end before anything does. Measured (`benchmarks/policies`): nothing froze in fine-tunings of six epochs, and little
    in the last fifth of twenty from scratch.

    Args:
        tolerance: share of the largest of the first three slopes.
        window: readings that are averaged, that a slope spans, and in which it must be small.
        max_frozen: fraction of the blocks in the deepest cut.
        unfreeze: the paper unfreezes all blocks when the learning rate falls. Features of a frozen block are kept in a
            store, which would be wrong then: not possible.

    Raises:
        ValueError: if blocks are to be unfrozen.
    """

    name = "egeria"
    observes = frozenset({"similarities"})

    def __init__(self, tolerance: float = 0.2, window: int = 3, max_frozen: float = 1.0, unfreeze: bool = False):
        super().__init__(max_frozen)
        if unfreeze:
            raise ValueError(
                "Egeria's unfreezing is not possible here: features of frozen blocks are kept and would be wrong as "
                "soon as one trains again. Leave unfreeze at False; for a learning rate that falls in steps, freeze "
                "after the last one with policy='manual'."
            )
        if not tolerance > 0 or window < 2:
            raise ValueError(f"tolerance={tolerance!r} must be more than 0, and window={window!r} at least 2.")
        self.tolerance, self.window = tolerance, window
        self._reference: dict[int, torch.Tensor] = {}
        self._plasticity: dict[int, list[float]] = {}

    def start(self, num_blocks: int) -> None:
        super().start(num_blocks)
        self._reference, self._plasticity = {}, {}

    def look(self, moment: Moment, blocks: Sequence[ObservedBlock]) -> None:
        read = {block.index: block.similarities for block in blocks if block.similarities is not None}
        if not read or moment.epoch < 1:
            return
        if not self._reference:
            self._reference = read
            return
        for index, now in read.items():
            loss = float((_scaled(now) - _scaled(self._reference[index])).square().mean())
            self._plasticity.setdefault(index, []).append(loss)
        self.settle([self._is_settled(self._plasticity[index]) for index in sorted(read) if index >= self.settled])

    def _is_settled(self, values: Sequence[float]) -> bool:
        if len(values) < 2 * self.window - 1:
            return False
        smooth = np.convolve(values, np.full(self.window, 1 / self.window), mode="valid")
        windows = np.lib.stride_tricks.sliding_window_view(smooth, self.window)
        slopes = np.abs([np.polyfit(np.arange(self.window), window, 1)[0] for window in windows])
        limit = self.tolerance * slopes[:3].max()
        return len(slopes) >= 3 + self.window and bool((slopes[-self.window :] <= limit).all())

    def describe(self) -> str:
        return f"egeria, tolerance={self.tolerance}, window={self.window}, max_frozen={self.max_frozen}"

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "reference": {str(index): tensor_to_text(value) for index, value in self._reference.items()},
            "plasticity": {str(index): list(values) for index, values in self._plasticity.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._reference = {int(index): tensor_from_text(text) for index, text in state.get("reference", {}).items()}
        self._plasticity = {int(index): list(values) for index, values in state.get("plasticity", {}).items()}


def _scaled(similarities: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(similarities.double(), dim=1)
