"""Running a model up to a cut: until its feature is known, and in eval mode up to there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .errors import ChainError
from .modes import override_forward
from .record import Call
from .routing import Action, replacing
from .structure import leaves
from .trace import Trace


def capture(
    model: nn.Module, trace: Trace, cut: int, inputs: Mapping[str, Any], skipped: Sequence[Call] = ()
) -> torch.Tensor:
    """Runs a model until the feature at a cut is known, and returns it.

    Args:
        model: the model, in the mode in which it is to run.
        trace: its record.
        cut: from 1 on.
        inputs: model inputs by name.
        skipped: calls that a replay leaves out meanwhile.

    Returns:
        `(B, *layout.shape)`.

    Raises:
        ChainError: if the model returns without getting there.

    Shapes: B samples.
    """
    found = trace.cut(cut)
    place = found.places[0]

    def enter(original: Callable, args: tuple, kwargs: dict) -> Any:
        raise _Captured(dict(leaves((args, kwargs)))[place.path])

    def leave(original: Callable, args: tuple, kwargs: dict) -> Any:
        output = original(*args, **kwargs)
        raise _Captured(dict(leaves(output))[place.path])

    action: Action = leave if found.boundary.entry is None else enter
    with replacing(model, trace.record, {place.call: action}, skipped):
        try:
            model(**inputs)
        except _Captured as captured:
            feature = found.pack(captured.tensor)
            # A view that was made without gradients cannot be written to where there are some.
            return feature.clone() if feature._is_view() else feature
    raise ChainError(f"{trace.cannot_cut(cut)} the model returned without running it.")


@contextlib.contextmanager
def frozen_modes(model: nn.Module, trace: Trace, cut: int, skipped: Sequence[Call] = ()) -> Iterator[None]:
    """Inside, modules that run both before a cut and behind it are in eval mode until the run arrives at the cut.

    Args:
        model: the model, in train mode but for the modules that run before the cut only.
        trace: its record.
        cut: from 1 on.
        skipped: calls that a replay leaves out meanwhile.
    """
    boundary = trace.cut(cut).boundary
    open_modules = trace.flow.open_modules(boundary.clock)
    training: list[nn.Module] = []

    def restore() -> None:
        for module in training:
            module.training = True
        training.clear()

    def begin(original: Callable) -> Callable:
        def forward(*args, **kwargs):
            training.extend(module for module in open_modules if module.training)
            for module in training:
                module.training = False
            try:
                return original(*args, **kwargs)
            finally:
                restore()

        return forward

    def enter(original: Callable, args: tuple, kwargs: dict) -> Any:
        restore()
        return original(*args, **kwargs)

    def leave(original: Callable, args: tuple, kwargs: dict) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            restore()

    last = boundary.entry if boundary.entry is not None else trace.flow.last_before(boundary.clock)
    action: Action = leave if boundary.entry is None else enter
    with override_forward(model, begin), replacing(model, trace.record, {last: action}, skipped):
        yield


class _Captured(Exception):
    """Stops a run of the model and carries the crossing tensor out of it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
