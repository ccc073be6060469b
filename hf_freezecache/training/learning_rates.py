"""Learning rates of blocks: annealed freezing and layer-wise decay.

Annealed freezing is FreezeOut (Brock et al. 2017, arXiv 1706.04983): the learning rate of a block falls to 0 as half a
cosine until the block freezes. Layer-wise decay counts as BEiT and MAE do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim import Optimizer

from ..config import FreezeCacheConfig
from ..model.chain import BlockChain
from ..policies import FreezePolicy, Moment
from ..policies.around import layer_factor
from ..policies.base import ComingFreeze
from .block_steps import BlockSteps, OptimizerError
from .optimizer_proof import prove_optimizer


@dataclass(frozen=True)
class Fall:
    """How the learning rate of a block falls.

    Args:
        begin: optimizer step from which on it falls.
        end: optimizer step at which it would be 0, the first one of the block's freeze.
        height: factor at `begin`.
    """

    begin: int
    end: int
    height: float = 1.0

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in a step, counted from 0."""
        if step < self.begin:
            return 1.0
        share = min((step - self.begin) / (self.end - self.begin), 1.0)
        return self.height * 0.5 * (1.0 + math.cos(math.pi * share))


class LearningRates:
    """Multiplies the learning rate of every block by a factor of its own in each step of an optimizer.

    Factors depend on the step alone, so that a resumed training goes on with those of an uninterrupted one.

    Args:
        chain: the model, traced: a parameter belongs to the first block whose freeze freezes it, and to the head if
            there is none.
        config: the settings.

    Attributes:
        step: number of optimizer steps so far.
        falls: by block.
    """

    def __init__(self, chain: BlockChain, config: FreezeCacheConfig):
        self.chain, self.config = chain, config
        self.step = 0
        self.falls: dict[int, Fall] = {}
        self._blocks: dict[torch.Tensor, int] = {}
        for cut in range(1, len(chain) + 1):
            for parameter in chain.prefix_parameters(cut).values():
                self._blocks.setdefault(parameter, cut - 1)
        self._steps: BlockSteps | None = None

    @property
    def settings(self) -> str:
        """What they depend on besides the rule."""
        names = ("anneal", "anneal_scale", "anneal_epochs", "layer_decay")
        return ", ".join(f"{name}={getattr(self.config, name)!r}" for name in names)

    def attach(self, optimizer: Any) -> None:
        """From now on, steps of an optimizer follow the factors.

        Args:
            optimizer: of the training; accelerate may have wrapped it.

        Raises:
            OptimizerError: if they would not; the message says why and what to do.
        """
        self.detach()
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        try:
            self._check_parameters(optimizer)
            prove_optimizer(optimizer, self.block_of)
        except OptimizerError as error:
            raise OptimizerError(
                f"anneal and layer_decay give blocks learning rates of their own, which does not work with "
                f"{type(optimizer).__name__}: {error}. Choose an optimizer whose `step` moves each parameter in "
                "proportion to the learning rate of its group, such as TrainingArguments(optim='adamw_torch'), or set "
                "anneal='none' and layer_decay=1.0."
            ) from error
        self._steps = BlockSteps(optimizer, self.block_of, self.factor)

    def detach(self) -> None:
        """Steps of the optimizer follow its own learning rates again."""
        if self._steps is not None:
            self._steps.remove()
            self._steps = None

    def begin_step(self, step: int) -> None:
        """To be called before every step of the optimizer.

        Args:
            step: number of optimizer steps before it.
        """
        self.step = step
        if self._steps is not None:
            self._steps.reset()  # the step before may have broken off

    def block_of(self, parameter: torch.Tensor) -> int:
        """The block that owns a parameter; `len(chain)` for the head."""
        return self._blocks.get(parameter, len(self.chain))

    def factor(self, block: int) -> float:
        """What the learning rate of a block is multiplied by in the next step."""
        factor = layer_factor(self.config.layer_decay, block, len(self.chain))
        return factor * self.falls[block].factor(self.step) if block in self.falls else factor

    def expect(self, coming: Sequence[ComingFreeze], moment: Moment, steps_per_epoch: int) -> None:
        """Takes the freezes that are known: until they happen, the learning rates of their blocks fall.

        Args:
            coming: the freezes; blocks that freeze from the start or beyond the training do not fall.
            moment: where the training stands.
            steps_per_epoch: optimizer steps of an epoch.
        """
        self.falls = {}
        if self.config.anneal == "none":
            return
        for freeze in sorted(coming, key=lambda freeze: freeze.epoch):
            if freeze.epoch >= moment.num_epochs:
                continue
            begin, end = freeze.known_since * steps_per_epoch, freeze.epoch * steps_per_epoch
            height = moment.max_steps / end if self.config.anneal_scale and not begin and end else 1.0
            for block in range(freeze.cut):
                self.falls.setdefault(block, Fall(begin, end, height))
        self.falls = {block: fall for block, fall in self.falls.items() if fall.end > fall.begin}

    def describe(self) -> str:
        """A sentence on what is done, for the log and the report."""
        parts = []
        if self.config.layer_decay != 1.0:
            blocks = [*self.chain.names, "the head"]
            factors = [layer_factor(self.config.layer_decay, block, len(self.chain)) for block in range(len(blocks))]
            listed = ", ".join(f"{name} {factor:.3g}" for name, factor in zip(blocks, factors, strict=True))
            parts.append(f"layer_decay={self.config.layer_decay} multiplies them by: {listed}")
        if self.config.anneal != "none":
            ends: dict[Fall, list[int]] = {}
            for block, fall in sorted(self.falls.items()):
                ends.setdefault(fall, []).append(block)
            falls = [_describe_fall(fall, self.chain.names[blocks[0]], len(blocks)) for fall, blocks in ends.items()]
            if self.config.anneal_epochs:
                falls.append(f"that of every other block over {self.config.anneal_epochs} epochs before it freezes")
            parts.append(f"anneal='cosine': {', '.join(falls) if falls else 'none falls'}")
        return f"Learning rates of blocks: {'; '.join(parts)}."

    def _check_parameters(self, optimizer: Any) -> None:
        if not isinstance(optimizer, Optimizer):
            raise OptimizerError("it is no `torch.optim.Optimizer`")
        if any("lr" not in group for group in optimizer.param_groups):
            raise OptimizerError("its parameter groups have no 'lr'")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.chain.model.named_parameters():
            # What is left out on purpose is not trained; what is trained elsewhere has a hook for it.
            if parameter.requires_grad and id(parameter) not in held and parameter._post_accumulate_grad_hooks:
                raise OptimizerError(f"'{name}' is updated in the backward pass, not in its `step`")


def _describe_fall(fall: Fall, name: str, count: int) -> str:
    blocks = f"that of '{name}'" if count == 1 else f"those of {count} blocks from '{name}' on"
    scaled = "" if fall.height == 1.0 else f", from {fall.height:.3g} times their own"
    return f"{blocks} to 0 by step {fall.end}{scaled}"


def check_anneal(policy: FreezePolicy, config: FreezeCacheConfig, num_blocks: int) -> None:
    """Checks that learning rates can fall before a rule freezes.

    Args:
        policy: the rule, started.
        config: the settings.
        num_blocks: `len(chain)`.

    Raises:
        ValueError: if the rule does not know its freezes before they happen; the message says what to do.
    """
    knows = policy.coming(num_blocks, 1) is not None or bool(policy.trial_cut(num_blocks))  # a trial comes first
    if config.anneal != "none" and not knows:
        raise ValueError(
            f"anneal='cosine' lets learning rates fall until a block freezes, and policy {policy.name} does not know "
            "when that is. Set anneal_epochs to the number of epochs from a decision to its freeze; or override "
            "`changes` if the rule knows its whole schedule, or `coming` if it knows a freeze before it happens."
        )
