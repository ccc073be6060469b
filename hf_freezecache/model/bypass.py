"""The calls of a replay: what lies before the cut answers with stand-ins, what lies behind it gets the feature."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .modes import override_forward
from .record import Call, TensorSpec
from .resizing import Resized
from .routing import Action, replacing
from .stand_ins import FrozenOutputError, StandIn
from .structure import Path, argument, find_tensor, leaves, map_leaves, with_argument
from .trace import Cut, Trace


class Bypass:
    """What the calls within a model do instead while its prefix is bypassed.

    Args:
        trace: the record of the model.
        cut: where it is cut.
        features: the feature at the cut; None: the main input of each call of the model is the feature.
        main_input: where features are given, what the model may be called on: a stand-in of its main input, or
            integers.
        resized: where they are of main inputs of another size than the recorded ones, the cut there.
    """

    def __init__(
        self,
        trace: Trace,
        cut: Cut,
        features: torch.Tensor | None = None,
        main_input: torch.Tensor | None = None,
        resized: Resized | None = None,
    ):
        self.trace, self.main_input = trace, main_input
        self._resized = Resized(cut, {}) if resized is None else resized
        self.cut = self._resized.cut
        self._is_given, self._features = features is not None, features
        self._inside_model = 0

    @contextlib.contextmanager
    def active(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model runs so."""
        skipped = self.cut.boundary.skipped
        actions = {call: self._skip(call, is_first=call is skipped[0]) for call in skipped}
        if self.cut.boundary.entry is not None:
            actions[self.cut.boundary.entry] = self._enter
        with replacing(model, self.trace.record, actions, skipped), override_forward(model, self._take_input):
            yield

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

    def _skip(self, call: Call, is_first: bool) -> Action:
        is_entered = self.cut.boundary.entry is not None
        places = {} if is_entered else self._parts_in(call)
        stands_for = f"the output of the frozen block '{self.cut.name_of(call)}'"

        def skip(original: Callable, args: tuple, kwargs: dict) -> Any:
            if is_first and not self._inside_model:
                # A user has called a part of the model by itself.
                self._check(find_tensor((args, kwargs)))
            samples, wider = len(self._feature), self.cut.wider(self._feature)
            given = functools.cache(lambda: dict(leaves((args, kwargs))))  # few blocks hand something through
            tensors = self.cut.unpack(self._feature) if places else []

            def answer(path: tuple, leaf: Any) -> Any:
                if not isinstance(leaf, TensorSpec):
                    return leaf
                if path in places:
                    return tensors[places[path]]
                handed_through = next((place for place, spec in call.arguments.items() if _is_same(spec, leaf)), None)
                if handed_through is not None and handed_through in given():
                    return given()[handed_through]
                spec = self._resized.spec_of(call, path, leaf)
                return StandIn(spec.shape_for(samples, wider), spec.dtype, spec.device, stands_for)

            return map_leaves(answer, call.output)

        return skip

    def _enter(self, original: Callable, args: tuple, kwargs: dict) -> Any:
        places, tensors = self._parts_in(self.cut.boundary.entry), self.cut.unpack(self._feature)
        args, kwargs = map_leaves(lambda path, leaf: tensors[places[path]] if path in places else leaf, (args, kwargs))
        return original(*args, **kwargs)

    def _parts_in(self, call: Call | None) -> dict[Path, int]:
        """Where crossing tensors are in a call: path -> number of the tensor."""
        return {
            place.path: number
            for number, part in enumerate(self.cut.parts)
            for place in part.places
            if place.call is call
        }

    @property
    def _feature(self) -> torch.Tensor:
        if self._features is None:
            raise FrozenOutputError("a part of the model is called, not the model: the features are not known there.")
        return self._features

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


def _is_same(argument: TensorSpec, result: TensorSpec) -> bool:
    """Whether a call hands an argument through as a result."""
    return (argument.value, argument.place, argument.shape) == (result.value, result.place, result.shape)
