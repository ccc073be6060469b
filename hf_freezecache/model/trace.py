"""What a recorded run of the model tells about the cuts of its chain."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn

from .blocks import Block
from .boundaries import Boundary, Flow, Place
from .discovery import MOST_TENSORS, discover_blocks
from .errors import ChainError
from .inputs import argument_names, main_input_name
from .layout import FeatureLayout, token_grid
from .probes import check_checkpointing
from .record import Call, TensorSpec, record_run
from .rounding import tolerance_of
from .stand_ins import StandIn, stays_real
from .structure import Path
from .tokens import take_columns, token_mask


@dataclass(frozen=True)
class Part:
    """A tensor that crosses a cut.

    Args:
        places: where it is in the run; all of them hold the same.
        shape: of the tensor for one sample, the samples' own dimension left out.
        dtype: of the tensor.
        sample_dim: which dimension of the tensor the samples are.
        rows: of the tensor for each sample (the choices of a question).
        memory_order: its dimensions in the order in which its memory has them: a dropout draws in this order.
        has_tokens: whether it has a vector for each position of a text.
        extents: how far apart in memory neighbours of each dimension but the first are, in the order of memory, in
            units of the next one: more than its size where the tensor is a part of another. None: it is whole.
    """

    places: tuple[Place, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    sample_dim: int
    rows: int
    memory_order: tuple[int, ...]
    has_tokens: bool
    extents: tuple[int, ...] | None = None

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Its shape as a feature of one sample, of at most three dimensions."""
        return _feature_shape(self.shape, self.rows)

    @classmethod
    def of(cls, places: tuple[Place, ...], texts: int, width: int) -> Part:
        """Describes a tensor that can be stored.

        Args:
            places: of the tensor.
            texts: that a sample of the run has.
            width: of these texts; 0: there are none.
        """
        spec = places[0].spec
        dim = spec.sample_dim
        assert dim is not None  # it can be stored
        rows = spec.per_sample[dim]
        assert rows is not None
        shape = spec.shape[:dim] + spec.shape[dim + 1 :]
        _, strides = spec.place
        order = tuple(sorted(range(len(strides)), key=lambda number: -strides[number]))
        growths = spec.per_token[:dim] + spec.per_token[dim + 1 :]
        has_tokens = rows == texts and len(shape) == 2 and shape[0] == width and growths == (1, 0)
        extents = None if has_tokens else _extents(spec, order, dim)
        return cls(places, shape, spec.dtype, dim, rows, order, has_tokens, extents)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as a feature: `(B, *feature_shape)`; of inputs of another size that of its own shape."""
        rows = tensor.movedim(self.sample_dim, 0)
        return rows.reshape(len(rows) // self.rows, *_feature_shape(rows.shape[1:], self.rows))

    def unpack(self, feature: torch.Tensor) -> torch.Tensor:
        """The feature as the tensor that crosses."""
        shape = (-1, self.shape[-1]) if self.has_tokens else self.shape
        rows = feature.reshape(len(feature) * self.rows, *shape)
        inverse = sorted(range(rows.ndim), key=self.memory_order.__getitem__)
        ordered = rows.movedim(0, self.sample_dim).permute(self.memory_order)
        if self.extents is None:
            # Kernels look at the stride of a single row, too, which `contiguous` leaves as it is.
            return ordered.contiguous().flatten().view(ordered.shape).permute(inverse)
        # Kernels choose their order of operations by strides.
        whole = ordered.new_zeros(ordered.shape[0], *self.extents)
        part = whole[tuple(slice(size) for size in ordered.shape)]
        return part.copy_(ordered).permute(inverse)


@dataclass(frozen=True)
class Cut:
    """A place at which the chain is cut.

    Where several tensors cross it, they stand side by side in the feature: each with channels of its own where all
    have the same positions; else as the values of one vector.

    Args:
        boundary: the moment of the run.
        layout: of the feature.
        parts: the tensors that cross.
        block_names: names of the blocks before it, the longest first.
    """

    boundary: Boundary
    layout: FeatureLayout
    parts: tuple[Part, ...]
    block_names: tuple[str, ...]

    @property
    def has_tokens(self) -> bool:
        """Whether the feature of a sample is a row of vectors, one for each position of its text."""
        return all(part.has_tokens for part in self.parts)

    @property
    def _joins_channels(self) -> bool:
        return joins_channels(self.parts)

    @property
    def _dim(self) -> int:
        """The dimension of a batch of features along which parts stand side by side."""
        return 1 + (self.layout.channel_dim if self._joins_channels else 0)

    def pack(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The crossing tensors as a feature: `(B, *layout.shape)`, or `(B, W, C)` of texts of another width."""
        packed = [part.pack(tensor) for part, tensor in zip(self.parts, tensors, strict=True)]
        if len(packed) == 1:
            return packed[0]
        packed = [each.to(self.layout.dtype) for each in packed]
        return torch.cat(packed if self._joins_channels else [each.flatten(1) for each in packed], dim=self._dim)

    def unpack(self, feature: torch.Tensor) -> list[torch.Tensor]:
        """The feature as the tensors that cross."""
        if len(self.parts) == 1:
            return [self.parts[0].unpack(feature)]
        dim = self.layout.channel_dim
        sizes = [part.feature_shape[dim] if self._joins_channels else prod(part.feature_shape) for part in self.parts]
        split = feature.split(sizes, dim=self._dim)
        return [part.unpack(each.to(part.dtype)) for part, each in zip(self.parts, split, strict=True)]

    def wider(self, feature: torch.Tensor) -> int:
        """By how many positions the texts of a feature are wider than those of the recorded run."""
        return (feature.shape[1] - self.layout.shape[0]) // self.parts[0].rows if self.has_tokens else 0

    def name_of(self, call: Call) -> str:
        """The block that a call belongs to; the call's own name outside blocks."""
        return next((name for name in self.block_names if f"{call.name}.".startswith(f"{name}.")), call.name)


def _feature_shape(shape: Sequence[int], rows: int) -> tuple[int, ...]:
    """The shape of a feature of one sample, of at most three dimensions, for a tensor with so many rows for each."""
    shape = (rows * shape[0], *shape[1:]) if rows > 1 else tuple(shape)
    return shape if len(shape) <= 3 else (prod(shape[:-1]), shape[-1])


def _extents(spec: TensorSpec, order: Sequence[int], sample_dim: int) -> tuple[int, ...] | None:
    """See `Part`; None too where the samples have something between them."""
    _, strides = spec.place
    sizes = [spec.shape[dim] for dim in order]
    steps = [strides[dim] for dim in order]
    if order[0] != sample_dim or steps[-1] != 1:
        return None
    extents = []
    for number in range(1, len(order)):
        extent, rest = divmod(steps[number - 1], steps[number]) if steps[number] else (0, 1)
        # The stride of a dimension of size 1 says nothing.
        is_known = not rest and extent >= sizes[number] and sizes[number - 1] > 1
        extents.append(extent if is_known else sizes[number])
    return tuple(extents) if extents != sizes[1:] else None


def joins_channels(parts: Sequence[Part]) -> bool:
    """Whether tensors have the same positions, so that a feature can hold them as channels of these."""
    shapes = [part.feature_shape for part in parts]
    channel_dim = 0 if len(shapes[0]) == 3 else len(shapes[0]) - 1
    positions = {(len(shape), shape[:channel_dim], shape[channel_dim + 1 :]) for shape in shapes}
    return len(positions) == 1


class Trace:
    """A recorded run of a model, and the cuts of its chain in it.

    Args:
        model: the model; left as it is.
        blocks: of the chain; None: those that can be found.
        probe: inputs to run it on.

    Raises:
        ChainError: if the model does not run, a block does not run exactly once, or the blocks run in another order.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block] | None, probe: dict[str, Any]):
        check_checkpointing(model)
        self.model_name, self.probe = type(model).__name__, probe
        self.main_input, self.positional = main_input_name(model), argument_names(model)
        mask = token_mask(probe, self.main_input)
        #: Positions of the texts; 0 where the batch does not tell which of them are tokens.
        self.width = 0 if mask is None else mask.shape[-1]
        #: Texts of a sample: one, but for the choices of a question.
        self.texts = 1 if mask is None or mask.ndim == 2 else mask.shape[1]
        narrower = None
        if mask is not None and self.width > 1:
            narrower = take_columns(probe, mask.shape[1:], slice(1, None))
        self.record = record_run(model, probe, len(probe[self.main_input]), narrower)
        withheld = () if stays_real(probe[self.main_input]) else (self.main_input,)
        self.flow = Flow(model, self.record, (self.main_input,), withheld)
        self.blocks = tuple(discover_blocks(self.flow) if blocks is None else blocks)
        self._calls = self._find_calls()
        self._grid = _patch_grid(model, probe[self.main_input])
        self._cuts: dict[int, Cut] = {}
        #: See `BlockChain.needs_modes` and `Padding.ignored`; filled there.
        self.moving: dict[int, bool] = {}
        self.ignored_padding: dict[int, frozenset[str]] = {}
        #: Whether the last run up to a cut was one under autocast, as where accelerate has prepared the model for it.
        self.is_autocast = False
        #: Cuts in runs on main inputs of other sizes, by cut and size; filled by `resize`.
        self.resized: dict[tuple[int, tuple[int, ...]], Any] = {}
        #: What tells calls that give the same shapes, and the shapes that they have given; filled there as well.
        self.kinds: dict[Call, tuple[Any, ...]] = {}
        self.shapes: dict[Any, dict[Path, torch.Size]] = {}

    def tolerance(self, dtype: torch.dtype, device: torch.device) -> float:
        """The relative difference of features of the same samples that rounding explains, as the model runs now."""
        return tolerance_of(dtype, device, self.is_autocast)

    def fits(self, inputs: Mapping[str, Any], any_width: bool = False, any_size: bool = False) -> bool:
        """Whether the main input has the shape (without the batch), dtype and device of the recorded one.

        Args:
            inputs: model inputs by name.
            any_width: texts of other widths fit, too.
            any_size: all of as many dimensions do.
        """
        probe, new = self.probe[self.main_input], inputs[self.main_input]
        if (probe.dtype, probe.device) != (new.dtype, new.device):
            return False
        if probe.shape[1:] == new.shape[1:] or (any_size and probe.ndim == new.ndim):
            return True
        return any_width and probe.shape[1:-1] == new.shape[1:-1] and token_mask(inputs, self.main_input) is not None

    def cut(self, number: int) -> Cut:
        """What is known of a cut, from 1 on.

        Raises:
            ChainError: if the model cannot be cut there; the message names what crosses.
        """
        if number not in self._cuts:
            boundary = self._boundary(number)
            names = tuple(sorted((block.name for block in self.blocks[:number]), key=len, reverse=True))
            self._cuts[number] = self._describe(boundary, names)
        return self._cuts[number]

    def add_cut_before(self, parameters: Collection[str]) -> int:
        """Makes a cut of its own: before the first call behind the last block of a module that holds some parameters.

        A module that the blocks are in is called before them: what it holds itself does not move the cut.

        Args:
            parameters: their names.

        Returns:
            Its number for `cut`, beyond those of the chain.

        Raises:
            ChainError: if the model cannot be cut there; the message names what crosses.
        """
        owners = {name.rpartition(".")[0] for name in parameters}
        end = self._calls[-1][1].end
        call = next((call for call in self.record.calls if call.name in owners and call.begin > end), None)
        if call is None:
            raise ChainError(f"{self.model_name} cannot be cut before its head: it does not run.")
        found = self.flow.into(call, MOST_TENSORS)
        while found.why_not is not None and call.parent is not None and call.parent.begin > end:
            call = call.parent
            found = self.flow.into(call, MOST_TENSORS)
        if found.why_not is not None:
            raise ChainError(f"{self.model_name} cannot be cut before its head: {found.why_not}.")
        number = len(self.blocks) + 1
        names = tuple(sorted((block.name for block in self.blocks), key=len, reverse=True))
        self._cuts[number] = self._describe(found, names)
        return number

    def find_main_input(self, args: tuple, kwargs: dict) -> int | str:
        """The position or the keyword of the main input in a call of the model.

        Raises:
            ValueError: if the call has none.
        """
        if self.main_input in kwargs:
            return self.main_input
        if self.main_input in self.positional[: len(args)]:
            return self.positional.index(self.main_input)
        raise ValueError(f"a replay takes the features as '{self.main_input}'; the model was called without it.")

    def main_stand_in(self, samples: int, device: torch.device, size: Sequence[int] | None = None) -> StandIn:
        """A stand-in of the main input.

        Args:
            samples: of the batch.
            device: where it seems to be.
            size: shape of a sample; None: that of the recorded ones.
        """
        original = self.probe[self.main_input]
        shape = (samples, *(self.size if size is None else size))
        return StandIn(shape, original.dtype, device, f"'{self.main_input}'", is_input=True)

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the main input of a recorded sample."""
        return tuple(self.probe[self.main_input].shape[1:])

    def layout(self, number: int) -> FeatureLayout:
        """Shape, grid, special tokens and dtype of the feature at a cut."""
        if number:
            return self.cut(number).layout
        main = self.probe[self.main_input]
        return self._layout(tuple(main.shape[1:]), main.dtype)

    def cannot_cut(self, number: int) -> str:
        """The beginning of a sentence that says why."""
        block = self.blocks[number - 1 if number == len(self.blocks) else number]
        where = "after" if number == len(self.blocks) else "before"
        return f"{self.model_name} cannot be cut {where} '{block.name}' (cut {number}):"

    def _find_calls(self) -> list[tuple[Call, Call]]:
        """First and last call of each block."""
        of_module: dict[nn.Module, list[Call]] = {}
        for call in self.record.calls:
            of_module.setdefault(call.module, []).append(call)
        found: list[tuple[Call, Call]] = []
        before: tuple[str, Call] | None = None
        for block in self.blocks:
            calls = [of_module.get(module, []) for module in block.modules]
            for times in calls:
                if len(times) != 1:
                    raise ChainError(
                        f"block '{block.name}' of {self.model_name} runs {len(times)} times in a forward pass, not "
                        "once."
                    )
                if before is not None and times[0].begin < before[1].end:
                    raise ChainError(
                        f"the blocks of {self.model_name} do not run in the given order: '{block.name}' ran before "
                        f"'{before[0]}' had ended."
                    )
                before = block.name, times[0]
            found.append((calls[0][0], calls[-1][0]))
        return found

    def _boundary(self, number: int) -> Boundary:
        following = self._calls[number][0] if number < len(self.blocks) else None
        boundary = self.flow.behind(self._calls[number - 1][1], following, MOST_TENSORS)
        if boundary.why_not is not None:
            raise ChainError(f"{self.cannot_cut(number)} {boundary.why_not}.")
        return boundary

    def _describe(self, boundary: Boundary, names: tuple[str, ...]) -> Cut:
        parts = tuple(Part.of(places, self.texts, self.width) for places in boundary.places)
        if not all(part.has_tokens for part in parts) or not joins_channels(parts):
            parts = tuple(replace(part, has_tokens=False) for part in parts)  # there is no token of the feature
        return Cut(boundary, self.layout_of(parts), parts, names)

    def layout_of(self, parts: Sequence[Part]) -> FeatureLayout:
        """The layout of a feature in which these tensors stand side by side."""
        dtypes = {part.dtype for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # which holds each of them exactly
        shape = parts[0].feature_shape
        if len(parts) > 1:
            if joins_channels(parts):
                dim = 0 if len(shape) == 3 else len(shape) - 1
                shape = (*shape[:dim], sum(part.feature_shape[dim] for part in parts), *shape[dim + 1 :])
            else:
                shape = (sum(prod(part.feature_shape) for part in parts),)
        return self._layout(shape, dtype)

    def _layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> FeatureLayout:
        image = self.probe[self.main_input]
        if len(shape) > 3:
            shape = (prod(shape[:-1]), shape[-1])
        if len(shape) == 3:
            return FeatureLayout(shape=shape, grid=(shape[1], shape[2]), special_tokens=0, dtype=dtype)
        if len(shape) == 2 and image.ndim == 4:
            grid, special = token_grid(shape[0], image.shape[-2] / image.shape[-1], self._grid)
            return FeatureLayout(shape=shape, grid=grid, special_tokens=special, dtype=dtype)
        return FeatureLayout(shape=shape, grid=None, special_tokens=0, dtype=dtype)


def _patch_grid(model: nn.Module, image: torch.Tensor) -> tuple[int, int] | None:
    size = getattr(getattr(model, "config", None), "patch_size", None)
    if size is None or image.ndim != 4:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return image.shape[-2] // height, image.shape[-1] // width
