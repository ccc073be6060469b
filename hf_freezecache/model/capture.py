"""Running a model up to a cut: until its feature is known, and in eval mode up to there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..distributed import Announcer
from ..rng import RngState, preserve_rng
from .errors import ChainError
from .modes import ModuleStates, eval_mode, override_forward
from .record import Call
from .routing import Action, replacing
from .structure import leaves
from .trace import Trace

logger = logging.get_logger(__name__)


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
    places = [part.places[0] for part in found.parts]
    captured: dict[int, torch.Tensor] = {}
    kind = trace.probe[trace.main_input].device.type

    def keep(call: Call, structure: Any) -> None:
        tensors = dict(leaves(structure))
        trace.is_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        captured.update({number: tensors[place.path] for number, place in enumerate(places) if place.call is call})
        if len(captured) == len(places):
            raise _Captured

    def watch(call: Call) -> Action:
        def enter(original: Callable, args: tuple, kwargs: dict) -> Any:
            keep(call, (args, kwargs))
            return original(*args, **kwargs)

        def leave(original: Callable, args: tuple, kwargs: dict) -> Any:
            output = original(*args, **kwargs)
            keep(call, output)
            return output

        return leave if found.boundary.entry is None else enter

    with replacing(model, trace.record, {place.call: watch(place.call) for place in places}, skipped):
        try:
            model(**inputs)
        except _Captured:
            feature = found.pack([captured[number] for number in range(len(places))])
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


def capture_in_training(
    model: nn.Module, trace: Trace, cut: int, inputs: Mapping[str, Any], eval_before: bool
) -> torch.Tensor:
    """The feature as a training with a frozen prefix computes it; puts back what modules hold.

    Args:
        model: the model.
        trace: its record.
        cut: from 1 on.
        inputs: model inputs by name.
        eval_before: whether modules that run on behind the cut are in eval mode before it.
    """
    states = ModuleStates(model)
    with torch.no_grad(), eval_mode(model):
        model.train()
        for module in trace.flow.closed_modules(trace.cut(cut).boundary.clock):
            module.training = False
        try:
            with frozen_modes(model, trace, cut) if eval_before else contextlib.nullcontext():
                return capture(model, trace, cut, inputs)
        finally:
            states.restore()


def is_moving(model: nn.Module, trace: Trace, cut: int) -> bool:
    """Whether a feature draws random numbers, or depends on the batch, by modules that run on behind its cut.

    A model that cannot train on the recorded inputs alone (without labels) is taken for fixed; its cuts are never
    proved.

    Args:
        model: the model.
        trace: its record.
        cut: from 1 on.
    """
    with preserve_rng(), torch.no_grad():
        with eval_mode(model):
            expected = capture(model, trace, cut, trace.probe)
        generators = RngState()
        try:
            found = capture_in_training(model, trace, cut, trace.probe, eval_before=False)
        except ChainError:  # it did not come by: layers are left out at random
            return True
        except Exception as error:  # the model's own code may raise anything
            Announcer.survived(logger, f"{type(model).__name__} does not train on a probe batch", error)
            return False
        return not generators.is_current() or not torch.equal(found, expected)


class _Captured(Exception):
    """Stops a run of the model: all crossing tensors are known."""
