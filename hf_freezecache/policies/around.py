"""Rules around another rule: what it decides comes later, or some blocks are frozen in any case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from .base import ComingFreeze, FreezePolicy, Moment, ObservedBlock
from .trial import Choice, Trial


class AroundPolicy(FreezePolicy):
    """Does as another rule does.

    Args:
        policy: the other rule.
    """

    def __init__(self, policy: FreezePolicy):
        self.policy = policy
        self.observes = policy.observes

    def start(self, num_blocks: int) -> None:
        self.policy.start(num_blocks)

    def observe(self, moment: Moment, blocks: Sequence[ObservedBlock]) -> None:
        self.policy.observe(moment, blocks)

    def trial_cut(self, num_blocks: int) -> int:
        return self.policy.trial_cut(num_blocks)

    def take_trial(self, trial: Trial | None, num_blocks: int) -> str:
        return self.policy.take_trial(trial, num_blocks)

    def skip_trial(self, num_blocks: int) -> str | None:
        return self.policy.skip_trial(num_blocks)

    def choice(self) -> Choice | None:
        return self.policy.choice()

    def decide(self, moment: Moment) -> int:
        return self.policy.decide(moment)

    def next_change(self, moment: Moment) -> int | None:
        return self.policy.next_change(moment)

    def changes(self, num_blocks: int, num_epochs: int) -> list[tuple[int, int]] | None:
        return self.policy.changes(num_blocks, num_epochs)

    def coming(self, num_blocks: int, num_epochs: int) -> list[ComingFreeze] | None:
        return self.policy.coming(num_blocks, num_epochs)

    @property
    def name(self) -> str:
        return self.policy.name

    def describe(self) -> str:
        return self.policy.describe()

    def state_dict(self) -> dict[str, Any]:
        return self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state)


class DelayedPolicy(AroundPolicy):
    """Freezes some epochs after another rule has decided to, so that learning rates can fall in between.

    The other rule is told its own last decision as the cut, so that it can decide on while a freeze is coming.

    Args:
        policy: decides as the training goes.
        epochs: from a decision to its freeze, at least 1.
    """

    def __init__(self, policy: FreezePolicy, epochs: int):
        super().__init__(policy)
        self.epochs = epochs
        self._decided: list[ComingFreeze] = []

    def start(self, num_blocks: int) -> None:
        self._decided = []
        super().start(num_blocks)
        if self.policy.changes(num_blocks, 1) is not None or self.policy.trial_cut(num_blocks):
            raise ValueError(
                f"policy {self.policy.name} knows its schedule, so that learning rates fall from the start of the "
                "training: leave anneal_epochs, which is for policies that decide as the training goes, at 0."
            )

    def decide(self, moment: Moment) -> int:
        before = max([moment.cut, *(freeze.cut for freeze in self._decided)])
        answer = self.policy.decide(replace(moment, cut=before))
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer <= moment.num_blocks:
            return answer  # whoever asked says what is wrong with it
        if answer > before:
            self._decided.append(ComingFreeze(answer, moment.epoch, moment.epoch + self.epochs))
        return max([moment.cut, *(freeze.cut for freeze in self._decided if freeze.epoch <= moment.epoch)])

    def next_change(self, moment: Moment) -> int | None:
        return min((freeze.epoch for freeze in self._decided if freeze.epoch > moment.epoch), default=None)

    def changes(self, num_blocks: int, num_epochs: int) -> None:
        return None

    def coming(self, num_blocks: int, num_epochs: int) -> list[ComingFreeze]:
        return list(self._decided)

    def describe(self) -> str:
        return f"{super().describe()}, anneal_epochs={self.epochs}"

    def state_dict(self) -> dict[str, Any]:
        return {"policy": super().state_dict(), "decided": [list(astuple(freeze)) for freeze in self._decided]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "decided" not in state:  # of a training without `anneal_epochs`
            super().load_state_dict(state)
            return
        self._decided = [ComingFreeze(*values) for values in state["decided"]]
        super().load_state_dict(state["policy"])


class FrozenFromStart(AroundPolicy):
    """Freezes some blocks before the first step, and what another rule says beyond them.

    Args:
        policy: the other rule.
        cut_of: number of blocks that are frozen from the start, for a number of blocks.
        why: the setting that asks for it, for messages.
    """

    def __init__(self, policy: FreezePolicy, cut_of: Callable[[int], int], why: str):
        super().__init__(policy)
        self.cut_of, self._why = cut_of, why

    def decide(self, moment: Moment) -> int:
        answer = self.policy.decide(moment)
        if isinstance(answer, bool) or not isinstance(answer, int) or answer < 0:
            return answer  # whoever asked says what is wrong with it
        return max(answer, self.cut_of(moment.num_blocks))

    def changes(self, num_blocks: int, num_epochs: int) -> list[tuple[int, int]] | None:
        changes, cut = self.policy.changes(num_blocks, num_epochs), self.cut_of(num_blocks)
        if changes is None or not cut:
            return changes
        at_start = max([cut, *(deeper for epoch, deeper in changes if epoch <= 0)])
        return [(0, at_start), *((epoch, deeper) for epoch, deeper in changes if deeper > at_start)]

    def coming(self, num_blocks: int, num_epochs: int) -> list[ComingFreeze] | None:
        coming, cut = self.policy.coming(num_blocks, num_epochs), self.cut_of(num_blocks)
        if coming is None or not cut:
            return coming
        return [ComingFreeze(cut, 0, 0), *(freeze for freeze in coming if freeze.cut > cut)]

    @property
    def name(self) -> str:
        return f"{super().name} with {self._why}"

    def describe(self) -> str:
        return f"{super().describe()}, {self._why}"


def layer_factor(layer_decay: float, block: int, num_blocks: int) -> float:
    """What `layer_decay` multiplies the learning rate of a block by, as BEiT and MAE count: 1 for the head.

    Args:
        layer_decay: the setting.
        block: position in the chain, 0 for the stem; `num_blocks` for the head.
        num_blocks: `len(chain)`.
    """
    return layer_decay ** (num_blocks - block)
