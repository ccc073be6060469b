"""What rules share that find out, as the training goes, which blocks have settled."""

from __future__ import annotations

import base64
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .base import FreezePolicy, Moment, ObservedBlock


class SettlingPolicy(FreezePolicy):
    """Freezes the blocks from the input side that its rule has found to be settled.

    The rule says of each block by itself whether it has settled. A block freezes with the ones before it: a settled
    block behind one that still changes stays live. What is found in the middle of an epoch takes effect at the
    beginning of the next one.

    Args:
        max_frozen: fraction of the blocks in the deepest cut.
    """

    def __init__(self, max_frozen: float = 1.0):
        self.max_frozen = max_frozen
        self.deepest = self.settled = 0

    def start(self, num_blocks: int) -> None:
        self.deepest, self.settled = round(self.max_frozen * num_blocks), 0

    def observe(self, moment: Moment, blocks: Sequence[ObservedBlock]) -> None:
        # Blocks may have been frozen by other settings, or by the rule of a checkpoint.
        self.settled = max(self.settled, moment.cut)
        self.look(moment, blocks)

    @abstractmethod
    def look(self, moment: Moment, blocks: Sequence[ObservedBlock]) -> None:
        """Called before every optimizer step: calls `settle` when something is found.

        Args:
            moment: the progress of the training.
            blocks: the blocks that are not frozen, in their order; those before `settled` are decided.
        """

    def settle(self, verdicts: Sequence[bool]) -> None:
        """Takes what the rule has found.

        Args:
            verdicts: of the blocks from `settled` on, in their order: whether each has settled.
        """
        for verdict in verdicts:
            if not verdict or self.settled >= self.deepest:
                return
            self.settled += 1

    def decide(self, moment: Moment) -> int:
        return self.settled

    def state_dict(self) -> dict[str, Any]:
        return {"settled": self.settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.settled = state.get("settled", 0)


def tensor_to_text(value: torch.Tensor) -> dict[str, Any]:
    """A tensor as JSON values, bit for bit.

    Args:
        value: float32, of any shape.
    """
    array = value.detach().cpu().numpy()
    if array.dtype != np.float32:
        raise TypeError(f"float32 is written, and the tensor is {value.dtype}.")
    return {"shape": list(array.shape), "float32": base64.b64encode(array.astype("<f4").tobytes()).decode("ascii")}


def tensor_from_text(text: Mapping[str, Any]) -> torch.Tensor:
    """The tensor that `tensor_to_text` has written."""
    array = np.frombuffer(base64.b64decode(text["float32"]), dtype="<f4").astype(np.float32)
    return torch.from_numpy(array.reshape(text["shape"]))
