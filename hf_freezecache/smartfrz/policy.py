"""The rule: blocks freeze when a predictor has seen enough of their history."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..policies.base import Moment, ObservedBlock
from ..policies.settling import SettlingPolicy, tensor_from_text, tensor_to_text
from ..rng import hash_key
from .history import NUM_FEATURES, WeightSampler, depth_of, describe_snapshot, snapshot_every
from .predictor import FreezePredictor, load_predictor


class BlockHistory:
    """What is remembered of one block: its last snapshots as the predictor reads them, and the last verdicts.

    Args:
        sampler: takes its weights.
        window: snapshots that are kept.
        votes: verdicts that are kept.
        depth: of the block, see `depth_of`.
    """

    def __init__(self, sampler: WeightSampler, window: int, votes: int, depth: float):
        self.sampler, self.depth = sampler, depth
        self.snapshots: deque[np.ndarray] = deque(maxlen=window)
        self.verdicts: deque[bool] = deque(maxlen=votes)
        # Weights at the start and at the last snapshot, and the step to that.
        self.weights: list[np.ndarray] = []

    def add(self, weights: np.ndarray, progress: float) -> None:
        """Adds a snapshot."""
        first, before, step = self.weights or [weights, weights, np.zeros_like(weights)]
        self.snapshots.append(describe_snapshot(weights, first, before, step, progress, self.depth))
        self.weights = [first, weights, weights - before]

    def state_dict(self) -> dict[str, Any]:
        """JSON values to continue from."""
        arrays = {
            "snapshots": np.stack(self.snapshots),
            "weights": np.stack(self.weights),
            "scales": self.sampler.scales,
        }
        return {
            **{name: tensor_to_text(torch.from_numpy(value)) for name, value in arrays.items()},
            "verdicts": list(self.verdicts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        arrays = {name: tensor_from_text(state[name]).numpy() for name in ("snapshots", "weights", "scales")}
        self.snapshots.clear()
        self.snapshots.extend(arrays["snapshots"])
        self.weights, self.sampler.scales = list(arrays["weights"]), arrays["scales"]
        self.verdicts.clear()
        self.verdicts.extend(state["verdicts"])


class SmartFrzPolicy(SettlingPolicy):
    """Freezes the blocks of which a predictor says, again and again, that they have settled.

    SmartFRZ (ICLR 2023, "Attention-based layer freezing"). Sixty times in a training, 1,024 weights of every live
    block are added to its history; a predictor that was trained once, on other trainings, reads the last few of them,
    how far the training is, and how deep the block. A block has settled when at least half of the last `votes`
    verdicts are a confidence of `threshold`.

    Measured (`benchmarks/policies`): 0.5 and 0.0 points below no freezing in fine-tunings, at the FLOPs of `linear`,
    and 0.7 in a training from scratch, where `linear` lost 9.2. A MobileNetV2, which is unlike the networks that the
    predictor was made from, froze much too early (`benchmarks/predictor`).

    Args:
        predictor: the network, or where it is: folder or id on the Hub; None: the one that comes with the package.
        threshold: confidence from which on a verdict is "settled".
        votes: verdicts that are counted, at least half of which must be "settled".
        least: snapshots before the first verdict.
        max_frozen: fraction of the blocks in the deepest cut.
        seed: of the positions of the weights.

    Raises:
        ValueError: if a setting is not possible.
        OSError: if there is no such predictor.
    """

    name = "smartfrz"
    observes = frozenset({"weights"})

    def __init__(
        self,
        predictor: FreezePredictor | str | None = None,
        threshold: float = 0.5,
        votes: int = 4,
        least: int = 6,
        max_frozen: float = 1.0,
        seed: int = 0,
    ):
        super().__init__(max_frozen)
        if not 0 < threshold < 1 or votes < 1 or least < 2:
            raise ValueError(
                f"threshold={threshold!r} is a confidence, between 0 and 1; votes={votes!r} are at least 1, and "
                f"least={least!r} snapshots at least 2."
            )
        self.source = predictor if isinstance(predictor, str) else None
        self.predictor = predictor if isinstance(predictor, FreezePredictor) else load_predictor(predictor)
        self.threshold, self.votes, self.least, self.seed = threshold, votes, least, seed
        self._histories: dict[int, BlockHistory] = {}
        self._saved: Mapping[str, Any] = {}
        self._snapshot = 0

    def start(self, num_blocks: int) -> None:
        super().start(num_blocks)
        self._histories, self._saved, self._snapshot = {}, {}, 0

    def look(self, moment: Moment, blocks: Sequence[ObservedBlock]) -> None:
        if moment.step % snapshot_every(moment.max_steps):
            return
        live = [block for block in blocks if block.index >= self.settled and _trained(block)]
        for block in live:
            history = self._history_of(block, moment.num_blocks)
            weights = history.sampler.take(_trained(block), self._snapshot, self.predictor.variant)
            history.add(weights, moment.step / moment.max_steps)
        self._snapshot += 1
        if self._snapshot < self.least or not live:
            return
        for block, confidence in zip(live, self._confidences(live), strict=True):
            self._histories[block.index].verdicts.append(confidence >= self.threshold)
        watched = {block.index for block in live}
        rest = [block.index for block in blocks if block.index >= self.settled]
        self.settle([index not in watched or self._is_settled(index) for index in rest])  # untrained ones have settled

    def _confidences(self, live: Sequence[ObservedBlock]) -> list[float]:
        histories = [np.stack(self._histories[block.index].snapshots) for block in live]
        longest = max(map(len, histories))
        padded = [np.pad(history, ((longest - len(history), 0), (0, 0))) for history in histories]
        lengths = torch.tensor([len(history) for history in histories])
        return self.predictor.confidence(torch.from_numpy(np.stack(padded)), lengths).tolist()

    def _is_settled(self, index: int) -> bool:
        verdicts = self._histories[index].verdicts
        return len(verdicts) == self.votes and 2 * sum(verdicts) >= self.votes

    def _history_of(self, block: ObservedBlock, num_blocks: int) -> BlockHistory:
        if block.index not in self._histories:
            sampler = WeightSampler(_trained(block), hash_key(self.seed, block.index) % 2**32)
            depth = depth_of(block.index, num_blocks)
            history = BlockHistory(sampler, self.predictor.window, self.votes, depth)
            if (saved := self._saved.get(str(block.index))) is not None:
                history.load_state_dict(saved)
            self._histories[block.index] = history
        return self._histories[block.index]

    def describe(self) -> str:
        source = "" if self.source is None else f", predictor={self.source!r}"
        return f"smartfrz, threshold={self.threshold}, votes={self.votes}, max_frozen={self.max_frozen}{source}"

    def state_dict(self) -> dict[str, Any]:
        histories = {**self._saved, **{str(index): own.state_dict() for index, own in self._histories.items()}}
        live = {index: own for index, own in histories.items() if int(index) >= self.settled}
        return {**super().state_dict(), "snapshot": self._snapshot, "histories": live}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._snapshot, self._saved = state.get("snapshot", 0), state.get("histories", {})
        for history in self._saved.values():
            if (values := history["snapshots"]["shape"][-1]) != NUM_FEATURES:
                raise ValueError(
                    f"Snapshots of weights in this checkpoint have {values} values, and those of this version of "
                    f"hf_freezecache have {NUM_FEATURES}: policy='smartfrz' cannot go on from them. Resume with the "
                    "version that wrote the checkpoint, or with another policy."
                )


def _trained(block: ObservedBlock) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in block.parameters.items() if parameter.requires_grad}
