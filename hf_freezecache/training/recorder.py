"""What a policy observes of the live blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..model.chain import BlockChain
from ..model.modes import hooks_seen_by_compiled_code
from ..policies import ObservedBlock
from ..policies.base import SIGNALS
from .similarities import SampleSimilarities


class BlockRecorder:
    """Records the signals that a policy has asked for.

    Args:
        chain: the model.
        similarities: reads samples, where a policy asks for that.

    Attributes:
        active: whether a training step is running: what evaluations and builds compute is not recorded.
        step: number of optimizer steps so far.
        steps_per_epoch: optimizer steps of an epoch.
    """

    def __init__(self, chain: BlockChain, similarities: SampleSimilarities | None = None):
        self.chain, self.similarities, self.active = chain, similarities, False
        self.step, self.steps_per_epoch = 0, 1
        self._reads_samples = False
        self._activations: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._undo = contextlib.ExitStack()
        self._parameters: list[Mapping[str, nn.Parameter]] = []

    def watch(self, signals: Collection[str], is_compiled: bool = False) -> None:
        """Records signals from now on.

        Args:
            signals: their names.
            is_compiled: whether steps run compiled code.

        Raises:
            ValueError: if one is unknown, or samples are asked for that cannot be read.
        """
        unknown = sorted(set(signals) - set(SIGNALS))
        if unknown:
            raise ValueError(f"a policy observes {unknown}; what can be observed is {', '.join(SIGNALS)}.")
        # Once: a model has hundreds of them, and a step may take milliseconds.
        self._parameters = [_parameters_of(block.modules) for block in self.chain.blocks] if signals else []
        self._reads_samples = "similarities" in signals
        if self._reads_samples:
            assert self.similarities is not None  # a session has them
            self.similarities.prepare()
        if "activations" in signals and not self._hooks:
            if is_compiled:
                self._undo.enter_context(hooks_seen_by_compiled_code())
            for index, block in enumerate(self.chain.blocks):
                self._hooks.append(block.modules[-1].register_forward_hook(self._recording(index)))

    def blocks(self) -> list[ObservedBlock]:
        """The live blocks with what was recorded since the last call."""
        read: dict[int, torch.Tensor] = {}
        if self._reads_samples and self.similarities is not None:
            due = self.similarities.is_due(self.step, self.steps_per_epoch)
            read = self.similarities.read() if due else {}
        blocks = [
            ObservedBlock(index, block.name, self._parameters[index], self._activations.get(index), read.get(index))
            for index, block in enumerate(self.chain.blocks)
            if index >= self.chain.cut
        ]
        self._activations.clear()
        return blocks

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._undo.close()
        self._activations.clear()

    def _recording(self, index: int) -> Callable:
        def record(module: nn.Module, args: tuple, output: Any) -> None:
            if self.active:
                value = output if isinstance(output, torch.Tensor) else output[0]
                self._activations[index] = value.detach()

        return record


def _parameters_of(modules: tuple[nn.Module, ...]) -> dict[str, nn.Parameter]:
    return {
        f"{position}.{name}": parameter
        for position, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    }
