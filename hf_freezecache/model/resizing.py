"""A cut in runs on inputs of another size than the recorded one's: shapes of what crosses and of what is bypassed.

Texts whose features are a vector for each token need none of it: their shapes grow with the width as in the record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..distributed import Announcer
from ..rng import preserve_rng
from .errors import ChainError
from .modes import eval_mode
from .record import Call, TensorSpec
from .routing import Action, replacing
from .stand_ins import StandIn, stays_real
from .structure import Path, leaves, map_leaves
from .trace import Cut, Part, Trace

logger = logging.get_logger(__name__)

#: Entries that a trace remembers.
_REMEMBERED = 4096


@dataclass(frozen=True)
class Resized:
    """A cut in runs on main inputs of one size.

    Args:
        cut: with the shapes that the crossing tensors have there.
        results: what the skipped calls give there.
    """

    cut: Cut
    results: Mapping[Call, Mapping[Path, TensorSpec]]

    def spec_of(self, call: Call, path: Path, recorded: TensorSpec) -> TensorSpec:
        """A tensor in the output of a skipped call.

        Args:
            call: the call.
            path: of the tensor.
            recorded: the tensor in the recorded run.
        """
        return self.results.get(call, {}).get(path, recorded)


def resize(model: nn.Module, trace: Trace, number: int, inputs: Mapping[str, Any]) -> Cut:
    """Makes replays at a cut fit inputs of this size; done once for each.

    The model runs up to the cut. Where its main input is of floating-point numbers, a stand-in takes its place: shapes
    are computed, and no values. Code that needs these gets zeros.

    Args:
        model: the model.
        trace: its record.
        number: of the cut, from 1 on.
        inputs: model inputs by name, of any number of samples; their main input may be a stand-in.

    Returns:
        The cut, with the shapes of tensors and features of this size.

    Raises:
        ChainError: if the model does not run on inputs of this size.
    """
    cut, main = trace.cut(number), inputs[trace.main_input]
    size = tuple(main.shape[1:])
    if size == trace.size:
        return cut
    if cut.has_tokens:
        grown = [replace(part, shape=(size[-1], *part.shape[1:])) for part in cut.parts]
        return replace(cut, layout=trace.layout_of(grown), parts=tuple(grown))
    key = number, size
    if key not in trace.resized:
        for memory in (trace.resized, trace.shapes):
            if len(memory) >= _REMEMBERED:
                memory.clear()
        with preserve_rng(), torch.no_grad(), eval_mode(model):
            trace.resized[key] = _measure(model, trace, cut, inputs)
    return trace.resized[key].cut


def trimmed_to(own: Cut, features: torch.Tensor, widest: Cut, side: str) -> torch.Tensor:
    """Features of a batch, from those of the same samples as wide as the widest.

    Args:
        own: the cut of inputs as wide as the batch.
        features: `(B, *widest.layout.shape)`.
        widest: the cut of inputs as wide as the widest.
        side: on which padding is, `right` or `left`: there they end earlier.

    Returns:
        `(B, *own.layout.shape)`.
    """
    if own.layout.shape == widest.layout.shape:
        return features
    tensors = []
    for tensor, before, after in zip(widest.unpack(features), widest.parts, own.parts, strict=True):
        for dim, (most, size) in enumerate(zip(before.shape, after.shape, strict=True)):
            if size < most:
                place = dim + (dim >= before.sample_dim)
                tensor = tensor.narrow(place, 0 if side == "right" else most - size, size)
        tensors.append(tensor)
    return own.pack(tensors)


def _measure(model: nn.Module, trace: Trace, cut: Cut, inputs: Mapping[str, Any]) -> Resized:
    main = inputs[trace.main_input]
    if stays_real(main):
        return _run(model, trace, cut, inputs)
    stand_in = trace.main_stand_in(len(main), main.device, main.shape[1:])
    try:
        return _run(model, trace, cut, {**inputs, trace.main_input: stand_in})
    except Exception as error:  # the model's own code may raise anything; that it reads values is what is expected
        Announcer.survived(logger, f"{type(model).__name__} does not run on shapes alone", error)
    zeros = torch.zeros(main.shape, dtype=main.dtype, device=main.device)
    try:
        return _run(model, trace, cut, {**inputs, trace.main_input: zeros})
    except Exception as error:  # the model's own code may raise anything
        raise ChainError(
            f"{type(model).__name__} does not run on inputs of shape {tuple(main.shape)}: {error}"
        ) from error


def _run(model: nn.Module, trace: Trace, cut: Cut, inputs: Mapping[str, Any]) -> Resized:
    """Runs the model until the shapes of all that is skipped, and of all that crosses, are known."""
    samples, boundary = len(inputs[trace.main_input]), cut.boundary
    places = [part.places[0] for part in cut.parts]
    shapes: dict[int, torch.Size] = {}
    results: dict[Call, Mapping[Path, TensorSpec]] = {}

    def note(call: Call, structure: Any) -> None:
        tensors = dict(leaves(structure))
        shapes.update({number: tensors[place.path].shape for number, place in enumerate(places) if place.call is call})

    def watch(call: Call) -> Action:
        def run(original: Callable, args: tuple, kwargs: dict) -> Any:
            if call is boundary.entry:
                note(call, (args, kwargs))
                raise _Known
            output = _answer(trace, call, original, args, kwargs)
            found = dict(leaves(output))
            results[call] = {
                path: _of_size(spec, found[path].shape, samples, trace.record.samples)
                for path, spec in call.results.items()
                if path in found
            }
            note(call, output)
            if boundary.entry is None and len(results) == len(boundary.skipped) and len(shapes) == len(places):
                raise _Known
            return output

        return run

    watched = {*boundary.skipped, *(place.call for place in places)}
    with replacing(model, trace.record, {call: watch(call) for call in watched}):
        try:
            model(**inputs)
        except _Known:
            parts = tuple(
                _part_of_size(part, _of_size(part.places[0].spec, shapes[number], samples, trace.record.samples))
                for number, part in enumerate(cut.parts)
            )
            return Resized(replace(cut, layout=trace.layout_of(parts), parts=parts), results)
    raise ChainError(f"{type(model).__name__} returned without running up to the cut.")


def _answer(trace: Trace, call: Call, original: Callable, args: tuple, kwargs: dict) -> Any:
    """What a call gives; where that is stand-ins, a call of its kind that got the same shapes before tells theirs."""
    if call not in trace.kinds:
        recorded = (call.arguments, call.results)
        trace.kinds[call] = (
            repr(call.module),
            *(tuple((path, s.shape) for path, s in each.items()) for each in recorded),
        )
    given = dict(leaves((args, kwargs)))
    key = trace.kinds[call], *((path, tensor.shape) for path, tensor in given.items())
    shapes = trace.shapes.get(key)
    if shapes is None or not any(isinstance(tensor, StandIn) for tensor in given.values()):
        output = original(*args, **kwargs)
        found = dict(leaves(output))
        if found.keys() == call.results.keys() and all(isinstance(tensor, StandIn) for tensor in found.values()):
            trace.shapes[key] = {path: tensor.shape for path, tensor in found.items()}
        return output

    def answer(path: Path, leaf: Any) -> Any:
        if not isinstance(leaf, TensorSpec):
            return leaf
        return StandIn(shapes[path], leaf.dtype, leaf.device, f"the output of '{call.name}'")

    return map_leaves(answer, call.output)


def _of_size(spec: TensorSpec, shape: torch.Size, samples: int, recorded: int) -> TensorSpec:
    """What is known of a tensor, with the shape that it has in a batch of some samples."""
    if len(shape) != len(spec.shape):
        raise ChainError("a tensor has another number of dimensions where the inputs have another size")
    own = spec.per_sample or (None,) * len(shape)
    per_sample = tuple(None if one is None else size // samples for one, size in zip(own, shape, strict=True))
    full = tuple(size if one is None else one * recorded for one, size in zip(per_sample, shape, strict=True))
    return replace(spec, shape=full, per_sample=spec.per_sample and per_sample)


def _part_of_size(part: Part, spec: TensorSpec) -> Part:
    shape = spec.shape[: part.sample_dim] + spec.shape[part.sample_dim + 1 :]
    extents = part.extents
    if extents is not None:  # what lies between the parts of another tensor stays, as far as is known
        places = [dim - (dim > part.sample_dim) for dim in part.memory_order if dim != part.sample_dim]
        grown = (shape[place] - part.shape[place] for place in places)
        extents = tuple(extent + more for extent, more in zip(extents, grown, strict=True))
    return replace(part, shape=shape, extents=extents)


class _Known(Exception):
    """Stops a run of the model: all shapes are known."""
