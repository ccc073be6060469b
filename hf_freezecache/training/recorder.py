"""What a policy observes of the live blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from ..model.chain import BlockChain
from ..policies import ObservedBlock
from ..policies.base import SIGNALS


class BlockRecorder:
    """Records the signals that a policy has asked for.

    Args:
        chain: the model.

    Attributes:
        active: whether a training step is running: what evaluations and builds compute is not recorded.
    """

    def __init__(self, chain: BlockChain):
        self.chain, self.active = chain, False
        self._activations: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def watch(self, signals: Collection[str]) -> None:
        """Records signals from now on.

        Raises:
            ValueError: if one is unknown.
        """
        unknown = sorted(set(signals) - SIGNALS)
        if unknown:
            raise ValueError(f"a policy observes {unknown}; what can be observed is {', '.join(sorted(SIGNALS))}.")
        if "activations" in signals and not self._hooks:
            for index, block in enumerate(self.chain.blocks):
                self._hooks.append(block.modules[-1].register_forward_hook(self._recording(index)))

    def blocks(self) -> list[ObservedBlock]:
        """The live blocks with what was recorded since the last call."""
        blocks = []
        for index, block in enumerate(self.chain.blocks):
            if index >= self.chain.cut:
                parameters = {
                    f"{position}.{name}": parameter
                    for position, module in enumerate(block.modules)
                    for name, parameter in module.named_parameters()
                }
                blocks.append(ObservedBlock(index, block.name, parameters, self._activations.get(index)))
        self._activations.clear()
        return blocks

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _recording(self, index: int) -> Callable:
        def record(module: nn.Module, args: tuple, output: Any) -> None:
            if self.active:
                value = output if isinstance(output, torch.Tensor) else output[0]
                self._activations[index] = value.detach()

        return record
