"""What a recorded run of the model tells about the cuts of its chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from .blocks import Block
from .boundaries import Boundary, Flow, Place
from .discovery import discover_blocks
from .errors import ChainError
from .inputs import argument_names, main_input_name
from .layout import FeatureLayout, token_grid
from .probes import check_checkpointing
from .record import Call, record_run
from .stand_ins import StandIn, stays_real
from .tokens import take_columns, token_mask


@dataclass(frozen=True)
class Cut:
    """A place at which the chain is cut.

    Args:
        boundary: the moment of the run.
        layout: of the feature.
        traced_shape: of the crossing tensor for one sample, the samples' own dimension left out.
        sample_dim: which dimension of the crossing tensor the samples are.
        rows: of the crossing tensor for each sample (the choices of a question).
        memory_order: its dimensions in the order in which its memory has them: a dropout draws in this order.
        block_names: names of the blocks before it, the longest first.
        has_tokens: whether the feature of a sample is a row of vectors, one for each position of its text.
    """

    boundary: Boundary
    layout: FeatureLayout
    traced_shape: tuple[int, ...]
    sample_dim: int
    rows: int
    memory_order: tuple[int, ...]
    block_names: tuple[str, ...]
    has_tokens: bool = False

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the crossing tensor is in the run; all of them hold the same."""
        return self.boundary.places[0]

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """The crossing tensor as a feature: `(B, *layout.shape)`, or `(B, W, C)` of texts of another width."""
        rows = tensor.movedim(self.sample_dim, 0)
        return rows.reshape(len(rows) // self.rows, *(rows.shape[1:] if self.has_tokens else self.layout.shape))

    def unpack(self, feature: torch.Tensor) -> torch.Tensor:
        """The feature as the tensor that crosses."""
        shape = feature.shape[1:] if self.has_tokens else self.traced_shape
        rows = feature.reshape(len(feature) * self.rows, *shape)
        inverse = sorted(range(rows.ndim), key=self.memory_order.__getitem__)
        return rows.movedim(0, self.sample_dim).permute(self.memory_order).contiguous().permute(inverse)

    def wider(self, feature: torch.Tensor) -> int:
        """By how many positions the texts of a feature are wider than those of the recorded run."""
        return feature.shape[1] - self.layout.shape[0] if self.has_tokens else 0

    def name_of(self, call: Call) -> str:
        """The block that a call belongs to; the call's own name outside blocks."""
        return next((name for name in self.block_names if f"{call.name}.".startswith(f"{name}.")), call.name)


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
        self.width = 0 if mask is None else mask.shape[1]
        narrower = take_columns(probe, self.width, slice(1, None)) if self.width > 1 else None
        self.record = record_run(model, probe, len(probe[self.main_input]), narrower)
        withheld = () if stays_real(probe[self.main_input]) else (self.main_input,)
        self.flow = Flow(model, self.record, (self.main_input,), withheld)
        self.blocks = tuple(discover_blocks(self.flow) if blocks is None else blocks)
        self._calls = self._find_calls()
        self._grid = _patch_grid(model, probe[self.main_input])
        self._cuts: dict[int, Cut] = {}
        #: See `BlockChain.needs_modes` and `ignored_padding`; filled there.
        self.moving: dict[int, bool] = {}
        self.ignored_padding: dict[int, frozenset[str]] = {}

    def fits(self, inputs: Mapping[str, Any], any_width: bool = False) -> bool:
        """Whether the main input has the shape (without the batch), dtype and device of the recorded one.

        Args:
            inputs: model inputs by name.
            any_width: texts of other widths fit, too.
        """
        probe, new = self.probe[self.main_input], inputs[self.main_input]
        if (probe.dtype, probe.device) != (new.dtype, new.device):
            return False
        return probe.shape[1:] == new.shape[1:] or (any_width and token_mask(inputs, self.main_input) is not None)

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

    def main_stand_in(self, samples: int, device: torch.device) -> StandIn:
        """A stand-in of the main input.

        Args:
            samples: of the batch.
            device: where it seems to be.
        """
        original = self.probe[self.main_input]
        return StandIn((samples, *original.shape[1:]), original.dtype, device, f"'{self.main_input}'", is_input=True)

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
        boundary = self.flow.behind(self._calls[number - 1][1], following)
        if boundary.why_not is not None:
            raise ChainError(f"{self.cannot_cut(number)} {boundary.why_not}.")
        return boundary

    def _describe(self, boundary: Boundary, names: tuple[str, ...]) -> Cut:
        spec = boundary.places[0][0].spec
        dim = spec.sample_dim
        assert dim is not None  # it can be stored
        rows = spec.per_sample[dim]
        assert rows is not None
        shape = spec.shape[:dim] + spec.shape[dim + 1 :]
        layout = self._layout((rows * shape[0], *shape[1:]) if rows > 1 else shape, spec.dtype)
        _, strides = spec.place
        order = tuple(sorted(range(len(strides)), key=lambda number: -strides[number]))
        growths = spec.per_token[:dim] + spec.per_token[dim + 1 :]
        has_tokens = rows == 1 and len(shape) == 2 and shape[0] == self.width and growths == (1, 0)
        return Cut(boundary, layout, shape, dim, rows, order, names, has_tokens)

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
