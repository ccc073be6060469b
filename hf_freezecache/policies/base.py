"""The interface of freezing rules: their input and their answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .trial import Choice, Trial

#: Signals that a policy may observe.
SIGNALS = ("activations", "gradients", "weights", "similarities")


@dataclass(frozen=True)
class Moment:
    """The progress of a training.

    Args:
        epoch: the epoch that begins (`decide`) or is running (`observe`), from 0.
        num_epochs: number of epochs of the whole training; the last one counts even if it is not complete.
        step: number of optimizer steps so far.
        max_steps: number of optimizer steps of the whole training.
        cut: number of frozen blocks.
        num_blocks: number of blocks, `len(chain)`.
    """

    epoch: int
    num_epochs: int
    step: int
    max_steps: int
    cut: int
    num_blocks: int


@dataclass(frozen=True)
class ComingFreeze:
    """A freeze that is known before it happens.

    Args:
        cut: number of frozen blocks from then on.
        known_since: the epoch at whose beginning it became known; 0 for a schedule.
        epoch: the epoch at whose beginning the blocks freeze.
    """

    cut: int
    known_since: int
    epoch: int


@dataclass(frozen=True)
class ObservedBlock:
    """A block that is not frozen, just before an optimizer step.

    Args:
        index: position in the chain; 0 is the stem.
        name: module name.
        parameters: the block's parameters by name; their `.grad` is the gradient of the step, unscaled and clipped.
        activation: output of the block for the last micro-batch of this process, detached; None unless the policy
            observes activations.
        similarities: inner products `(N, N)` of N training samples in the block's output, centered, float32 on the
            CPU: all that `cka` needs. The samples are the same in every step, and the model is in eval mode. None
            unless the policy observes them, and in most steps: they are read in the first step of an epoch, and as
            often within it as costs little.

    Shapes: N samples.
    """

    index: int
    name: str
    parameters: Mapping[str, nn.Parameter]
    activation: torch.Tensor | None
    similarities: torch.Tensor | None = None


class FreezePolicy(ABC):
    """A rule that says how many blocks to freeze.

    `observes` names the signals that `observe` needs: `"weights"`, `"gradients"`, `"activations"`, `"similarities"`.
    Nothing is collected for a policy that leaves it empty. `observe` must not change anything and must not draw from
    the global random generators. The main process decides for all processes. The cut never becomes smaller: if
    `decide` returns a smaller one, the present cut stays. A policy with a memory returns it from `state_dict` as JSON
    values, so that a resumed training decides as an uninterrupted one.
    """

    observes: frozenset[str] = frozenset()

    def start(self, num_blocks: int) -> None:  # noqa: B027 - schedules remember nothing
        """Called before every training: the policy forgets the previous one.

        Args:
            num_blocks: number of blocks, `len(chain)`.

        Raises:
            ValueError: if the rule does not fit this number of blocks.
        """

    def observe(self, moment: Moment, blocks: Sequence[ObservedBlock]) -> None:  # noqa: B027 - schedules do not observe
        """Called before every optimizer step if `observes` is not empty.

        Args:
            moment: the progress of the training.
            blocks: the blocks that are not frozen, in their order.
        """

    def trial_cut(self, num_blocks: int) -> int:
        """The cut that is tried before the first step of a training; 0: none.

        Args:
            num_blocks: number of blocks, `len(chain)`.
        """
        return 0

    def take_trial(self, trial: Trial | None, num_blocks: int) -> str:
        """Called before the first step of a training if there is a `trial_cut`; never when it is resumed.

        Args:
            trial: what was found; None: the training is too short for a trial.
            num_blocks: number of blocks, `len(chain)`.

        Returns:
            What the rule makes of it, as a sentence for the log.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for a trial, so it has to take it.")

    def skip_trial(self, num_blocks: int) -> str | None:
        """Called before the first step of a resumed training if there is a `trial_cut`, after `load_state_dict`.

        No trial is run then: the weights are not those of the beginning any more. The rule chooses without one, unless
        the checkpoint has told it what was chosen.

        Args:
            num_blocks: number of blocks, `len(chain)`.

        Returns:
            What the rule makes of it, as a sentence for the log; None if it had chosen before.
        """
        return None

    def choice(self) -> Choice | None:
        """What the rule has chosen for this training, for the report; None if it has nothing to choose."""
        return None

    @abstractmethod
    def decide(self, moment: Moment) -> int:
        """Called at the beginning of every epoch.

        Args:
            moment: the progress of the training.

        Returns:
            The cut from this epoch on, 0 to `moment.num_blocks`.
        """

    def next_change(self, moment: Moment) -> int | None:
        """The epoch in which the cut will change next: a store of the present cut is used until then.

        Args:
            moment: the progress of the training, with the cut that holds from now on.

        Returns:
            The epoch; None if the cut will not change, or the rule does not know.
        """
        return None

    def changes(self, num_blocks: int, num_epochs: int) -> list[tuple[int, int]] | None:
        """The whole schedule: the epochs in which the cut changes, with the cut from then on.

        Args:
            num_blocks: number of blocks, `len(chain)`.
            num_epochs: epochs of the whole training; a change may be beyond them.

        Returns:
            `(epoch, cut)` pairs; None if the rule decides as the training goes.
        """
        return None

    def coming(self, num_blocks: int, num_epochs: int) -> list[ComingFreeze] | None:
        """The freezes that are known: until they happen, learning rates of their blocks can fall (`anneal`).

        Asked at the beginning of every epoch, after `decide`. A rule with `changes` knows them all from the start.

        Args:
            num_blocks: number of blocks, `len(chain)`.
            num_epochs: epochs of the whole training; a freeze may be beyond them.

        Returns:
            The freezes, past ones included; None if the rule never knows one before it happens.
        """
        changes = self.changes(num_blocks, num_epochs)
        return None if changes is None else [ComingFreeze(cut, 0, epoch) for epoch, cut in changes]

    @property
    def name(self) -> str:
        """The rule's name, for messages."""
        return type(self).__name__

    def describe(self) -> str:
        """The rule with its settings: a checkpoint remembers it, and a resume with another rule is announced."""
        return self.name

    def state_dict(self) -> dict[str, Any]:
        """The memory of the rule, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - schedules have no memory
        """Restores the memory that `state_dict` returned."""
