"""What a freezing rule sees and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: What a policy may ask to observe.
SIGNALS = frozenset({"weights", "gradients", "activations"})


@dataclass(frozen=True)
class Moment:
    """Where the training stands.

    Args:
        epoch: the epoch that begins (`decide`) or is running (`observe`), from 0.
        num_epochs: epochs of the whole training; a started one counts.
        step: optimizer steps done.
        max_steps: optimizer steps of the whole training.
        cut: frozen blocks.
        num_blocks: `len(chain)`.
    """

    epoch: int
    num_epochs: int
    step: int
    max_steps: int
    cut: int
    num_blocks: int


@dataclass(frozen=True)
class ObservedBlock:
    """One live block during training, just before an optimizer step.

    Args:
        index: position in the chain, 0 is the stem.
        name: module name.
        parameters: the block's parameters by name; their `.grad` holds the step's (unscaled, clipped) gradient.
        activation: what the block returned for this process's last micro-batch, detached, if the policy observes
            activations; None otherwise.
    """

    index: int
    name: str
    parameters: Mapping[str, nn.Parameter]
    activation: torch.Tensor | None


class FreezePolicy(ABC):
    """A rule that says how many blocks to freeze.

    `observes` names what `observe` needs of `"weights"`, `"gradients"`, `"activations"`; nothing is collected for a
    policy that leaves it empty. `observe` must not change anything and must not draw from the global generators.
    Decisions are taken by the main process and hold for all. The cut never moves back: a smaller answer is kept at
    the present cut. A policy with a memory returns it from `state_dict` (JSON values), so that a resumed training
    decides as the uninterrupted one.
    """

    observes: frozenset[str] = frozenset()

    def start(self, num_blocks: int) -> None:  # noqa: B027 - schedules remember nothing
        """Called before every training: forget the last one. ValueError if the rule does not fit `num_blocks`."""

    def observe(self, moment: Moment, blocks: Sequence[ObservedBlock]) -> None:  # noqa: B027 - schedules do not observe
        """Called before every optimizer step with the live blocks, if `observes` is not empty."""

    @abstractmethod
    def decide(self, moment: Moment) -> int:
        """Called at the beginning of every epoch.

        Returns:
            The cut from this epoch on, 0 to `moment.num_blocks`.
        """

    def next_change(self, moment: Moment) -> int | None:
        """The epoch at which the cut will move on, where the rule knows; a store of the present cut serves until then.

        Args:
            moment: with the cut that holds from now on.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What the rule has learnt so far, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - schedules have no memory
        """Puts `state_dict()` back."""
