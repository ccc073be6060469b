"""The calls of a replay: blocks before the cut answer with stand-ins, the block behind it gets the feature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .stand_ins import FrozenOutputError, StandIn
from .structure import accept_feature, argument, find_tensor, with_argument
from .tracing import Block, Trace, stand_ins

#: Makes the new `forward` of a module from its present one.
Wrap = Callable[[Callable], Callable]


class Bypass:
    """What the modules of a model do instead while its prefix is bypassed.

    Args:
        trace: the record of the model.
        blocks: its blocks.
        cut: number of blocks that are not run.
        features: the feature at the cut; None: the main input of each call is the feature.
        main_input: where features are given, what the model may be called on: a stand-in of its main input, or
            integers.
    """

    def __init__(
        self,
        trace: Trace,
        blocks: Sequence[Block],
        cut: int,
        features: torch.Tensor | None = None,
        main_input: torch.Tensor | None = None,
    ):
        self.trace, self.blocks, self.cut, self.main_input = trace, blocks, cut, main_input
        self._is_given, self._features = features is not None, features
        self._inside_model = 0

    def overrides(self, model: nn.Module) -> Iterator[tuple[nn.Module, Wrap]]:
        """The modules to override, each with the wrapper of its `forward`."""
        modules = [(block.name, module) for block in self.blocks[: self.cut] for module in block.modules]
        last = modules.pop() if self.cut == len(self.blocks) else None
        yield model, self._take_input
        for name, module in modules:
            yield module, self._skip(module, name)
        if last is not None:
            yield last[1], self._leave(last[1], last[0])
        else:
            yield self.blocks[self.cut].modules[0], self._enter

    def _take_input(self, original: Callable) -> Callable:
        def forward(*args, **kwargs):
            place = self.trace.find_main_input(args, kwargs)
            value = argument(place, args, kwargs)
            if self._is_given:
                self._check(value)
            else:
                self._features = value
                args, kwargs = with_argument(place, args, kwargs, self.trace.main_stand_in(len(value), value.device))
            self._inside_model += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._inside_model -= 1

        return forward

    def _skip(self, module: nn.Module, name: str) -> Wrap:
        def forward(*args, **kwargs):
            self._check_call(module, args, kwargs)
            return self._stand_ins(module, name)

        return lambda original: forward

    def _leave(self, module: nn.Module, name: str) -> Wrap:
        def forward(*args, **kwargs):
            self._check_call(module, args, kwargs)
            return accept_feature(self._stand_ins(module, name), self._feature)

        return lambda original: forward

    def _enter(self, original: Callable) -> Callable:
        def forward(*args, **kwargs):
            args, kwargs = self.trace.inject(self.cut, args, kwargs, self._feature)
            return original(*args, **kwargs)

        return forward

    @property
    def _feature(self) -> torch.Tensor:
        if self._features is None:
            raise FrozenOutputError("a part of the model is called, not the model: the features are not known there.")
        return self._features

    def _stand_ins(self, module: nn.Module, name: str) -> Any:
        outputs = self.trace.outputs[module]
        return stand_ins(outputs, len(self._feature), f"the output of the frozen block '{name}'")

    def _check_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Where a user calls a part of the model by itself, its stem sees what that part is called on."""
        if not self._inside_model and module is self.blocks[0].modules[0]:
            self._check(find_tensor((args, kwargs)))

    def _check(self, value: Any) -> None:
        """Raises FrozenOutputError if the model is called on something else than the batch's main input."""
        if isinstance(value, StandIn):
            if value.is_input:
                return
        elif isinstance(value, torch.Tensor) and not isinstance(self.main_input, StandIn | None):
            given = self.main_input.to(value.device)
            if value is given or torch.equal(value, given):
                return
        raise FrozenOutputError(
            f"the model is called on '{self.trace.main_input}' other than those of the batch, or changed ones; in "
            "replay epochs only the features of the batch exist. Change them in the data set's transform, or use "
            "cache='never'."
        )
