"""The record of one run of a model: shapes, order of the blocks, where their main tensors enter, what runs between."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..rng import preserve_rng
from .errors import ChainError
from .layout import FeatureLayout
from .modes import eval_mode
from .stand_ins import StandIn
from .structure import argument, find_tensor, map_structure, with_argument


class Captured(Exception):
    """Stops a run of the model and carries the feature out of it."""

    def __init__(self, feature: torch.Tensor):
        self.feature = feature


@dataclass(frozen=True)
class Block:
    """One unit of the chain.

    Args:
        name: module name of the block, of its first module if there are several.
        modules: the modules that run one after the other as this block.
    """

    name: str
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class _TensorSpec:
    """Description of a tensor in a recorded output.

    Args:
        shape: of the tensor; unless `fixed`, its first entry is the number of rows per sample.
        dtype: of the tensor.
        device: of the tensor.
        fixed: whether the shape is the same for every batch size.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    fixed: bool


@dataclass
class Trace:
    """The record of one run of the model.

    Args:
        probe: the inputs of the run.
        main_input: name of the main input.
        positional: names of the arguments of the model's `forward`, in their order.
        outputs: output of every module of the blocks, tensors replaced by their descriptions.
        entries: for each block, the position or the keyword at which its main tensor is passed.
        features: for each cut, shape (without the batch) and dtype of the feature; cut 0 is the main input.
        glue: modules that run outside the blocks, each with the number of the last block that had begun by then.
        stray_parameters: parameters that belong to no block.
        grid: `(H, W)` of the image in patches; None if the configuration has no patch size.
        stray_by_cut: for cuts asked so far, the stray parameters on which the feature depends; filled by the chain.
    """

    probe: dict[str, Any]
    main_input: str
    positional: list[str]
    outputs: dict[nn.Module, Any]
    entries: list[int | str]
    features: list[tuple[tuple[int, ...], torch.dtype]]
    glue: list[tuple[nn.Module, int]]
    stray_parameters: list[nn.Parameter]
    grid: tuple[int, int] | None
    stray_by_cut: dict[int, list[nn.Parameter]] = field(default_factory=dict)

    def fits(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the main input has the shape (without the batch), dtype and device of the recorded one."""
        probe, new = self.probe[self.main_input], inputs[self.main_input]
        return (probe.shape[1:], probe.dtype, probe.device) == (new.shape[1:], new.dtype, new.device)

    def glue_before(self, cut: int) -> list[nn.Module]:
        """Modules outside the blocks that ran only before block `cut` began."""
        return [module for module, position in self.glue if position < cut]

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

    def injected(self, block: int, args: tuple, kwargs: dict) -> torch.Tensor:
        """The main tensor in a call of a block."""
        return argument(self.entries[block], args, kwargs)

    def inject(self, block: int, args: tuple, kwargs: dict, feature: torch.Tensor) -> tuple[tuple, dict]:
        """The same call with another main tensor."""
        return with_argument(self.entries[block], args, kwargs, feature)

    def layout(self, cut: int) -> FeatureLayout:
        """Shape, grid, special tokens and dtype of the feature at a cut."""
        shape, dtype = self.features[cut]
        image = self.probe[self.main_input]
        if len(shape) == 3:
            return FeatureLayout(shape=shape, grid=(shape[1], shape[2]), special_tokens=0, dtype=dtype)
        if len(shape) == 2 and image.ndim == 4:
            grid, special = token_grid(shape[0], image.shape[-2] / image.shape[-1], self.grid)
            return FeatureLayout(shape=shape, grid=grid, special_tokens=special, dtype=dtype)
        return FeatureLayout(shape=shape, grid=None, special_tokens=0, dtype=dtype)


def token_grid(
    tokens: int, aspect: float, expected: tuple[int, int] | None = None, most_special: int = 16
) -> tuple[tuple[int, int] | None, int]:
    """Splits a number of tokens into special tokens and a grid with the image's aspect ratio (height / width).

    Args:
        tokens: number of all tokens.
        aspect: height of the image divided by its width.
        expected: grid that the configuration of the model gives; None if it gives none.
        most_special: largest number of special tokens that is tried.

    Returns:
        `((height, width), special tokens)`: the expected grid if the number of tokens allows it, otherwise the grid
        with the fewest special tokens; `(None, 0)` if no grid fits.
    """
    if expected is not None and 0 <= tokens - expected[0] * expected[1] <= most_special:
        return expected, tokens - expected[0] * expected[1]
    for special in range(min(most_special, tokens - 1) + 1):
        patches = tokens - special
        height, width = round((patches * aspect) ** 0.5), round((patches / aspect) ** 0.5)
        if height * width == patches:
            return (height, width), special
    return None, 0


def run_trace(model: nn.Module, blocks: Sequence[Block], probe: dict[str, Any]) -> Trace:
    """Runs the model once in eval mode and records every block.

    Raises:
        ChainError: if the model does not run, if a block does not run exactly once, or if the blocks run in another
            order than that of the chain.
    """
    _check_checkpointing(model)
    recorder = _Recorder(model, blocks)
    try:
        with preserve_rng(), torch.no_grad(), eval_mode(model), recorder:
            model(**probe)
    except ChainError:
        raise
    except Exception as error:  # the model's own code may raise anything
        raise ChainError(f"{type(model).__name__} could not be run on a probe batch: {error!r}") from error
    name = main_input_name(model)
    main = probe[name]
    return Trace(
        probe=probe,
        main_input=name,
        positional=_argument_names(model),
        outputs=recorder.outputs,
        entries=recorder.entries,
        features=[(tuple(main.shape[1:]), main.dtype), *recorder.features(len(main))],
        glue=recorder.glue(),
        stray_parameters=recorder.stray_parameters(),
        grid=_patch_grid(model, main),
    )


def _check_checkpointing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and keywords.get("use_reentrant"):
            raise ChainError(
                f"'{name}' of {type(model).__name__} is checkpointed with use_reentrant=True, under which the blocks "
                "behind a frozen one get no gradient: use activation_checkpointing_kwargs={'use_reentrant': False}."
            )


class _Recorder(contextlib.AbstractContextManager):
    """Hooks on every module that record one run; they are removed on leaving the context."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block]):
        self.model, self.blocks = model, blocks
        self.order = [module for block in blocks for module in block.modules]
        self.first_of = {block.modules[0]: number for number, block in enumerate(blocks)}
        inside = {id(m) for module in self.order for m in module.modules()}
        around = {id(m) for m in model.modules() if any(id(b) in map(id, m.modules()) for b in self.order)} - inside
        self.outside = [m for m in model.modules() if id(m) not in inside and id(m) not in around]
        self.calls: list[nn.Module] = []
        self.inputs: list[torch.Tensor] = []
        self.entries: list[int | str] = []
        self.outputs: dict[nn.Module, Any] = {}
        self.last: torch.Tensor | None = None
        self.glue_positions: dict[nn.Module, int] = {}
        self.position = -1
        self.handles: list[RemovableHandle] = []

    def __enter__(self):
        for module in self.order:
            self.handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._end))
        for module in self.outside:
            self.handles.append(module.register_forward_pre_hook(self._between))
        return self

    def __exit__(self, kind, error, traceback):
        for handle in self.handles:
            handle.remove()
        if error is None:
            self._check()

    def _begin(self, module, args, kwargs):
        self.calls.append(module)
        if module in self.first_of:
            self.position = self.first_of[module]
            entry = _entry(args, kwargs)
            if entry is None:
                name = self.blocks[self.position].name
                raise ChainError(
                    f"block '{name}' of {type(self.model).__name__} is called without a tensor: there is "
                    "no feature to cache before it."
                )
            self.entries.append(entry)
            self.inputs.append(args[entry] if isinstance(entry, int) else kwargs[entry])

    def _end(self, module, args, output):
        batch_size = len(self.inputs[0])
        self.outputs[module] = _specification(output, batch_size)
        if module is self.order[-1]:
            self.last = find_tensor(output)
            self.position = len(self.blocks)

    def _between(self, module, args):
        self.glue_positions[module] = self.position

    def _check(self) -> None:
        names = {module: block.name for block in self.blocks for module in block.modules}
        model = type(self.model).__name__
        for module in self.order:
            count = self.calls.count(module)
            if count != 1:
                raise ChainError(f"block '{names[module]}' of {model} runs {count} times in a forward pass, not once.")
        for expected, module in zip(self.order, self.calls, strict=True):
            if expected is not module:
                raise ChainError(
                    f"the blocks of {model} do not run in the given order: '{names[module]}' ran where "
                    f"'{names[expected]}' was expected."
                )

    def features(self, batch_size: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape (without the batch) and dtype of the feature at the cuts 1 to L, the number of blocks."""
        features = []
        for cut, tensor in enumerate([*self.inputs[1:], self.last], start=1):
            if tensor is None or tensor.ndim < 2 or len(tensor) != batch_size:
                shape = None if tensor is None else tuple(tensor.shape)
                raise ChainError(
                    f"{type(self.model).__name__} cannot be cut after '{self.blocks[cut - 1].name}': its output "
                    f"({shape}) does not have one row per sample (batch of {batch_size})."
                )
            features.append((tuple(tensor.shape[1:]), tensor.dtype))
        return features

    def glue(self) -> list[tuple[nn.Module, int]]:
        return list(self.glue_positions.items())

    def stray_parameters(self) -> list[nn.Parameter]:
        owned = {id(p) for module in self.order for p in module.parameters()}
        return [p for p in self.model.parameters() if id(p) not in owned]


def _entry(args: tuple, kwargs: dict) -> int | str | None:
    for position, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            return position
    return next((name for name, value in kwargs.items() if isinstance(value, torch.Tensor)), None)


def _specification(output: Any, batch_size: int) -> Any:
    def describe(value):
        if not isinstance(value, torch.Tensor):
            return value
        fixed = value.ndim == 0 or len(value) % batch_size != 0
        # Window attention folds windows into the batch: such a tensor has a whole number of rows per sample.
        shape = tuple(value.shape) if fixed else (len(value) // batch_size, *value.shape[1:])
        return _TensorSpec(shape, value.dtype, value.device, fixed)

    return map_structure(describe, output)


def stand_ins(specification: Any, batch_size: int, stands_for: str) -> Any:
    """An output of the recorded structure for a batch; its tensors are stand-ins.

    Args:
        specification: a recorded output, as in `Trace.outputs`.
        batch_size: number of samples.
        stands_for: what the output is, for messages.
    """

    def build(value):
        if not isinstance(value, _TensorSpec):
            return value
        shape = value.shape if value.fixed else (value.shape[0] * batch_size, *value.shape[1:])
        return StandIn(shape, value.dtype, value.device, stands_for)

    return map_structure(build, specification)


def main_input_name(model: nn.Module) -> str:
    """`model.main_input_name`, or the first argument of its `forward`."""
    name = getattr(model, "main_input_name", None)
    return name if name is not None else _argument_names(model)[0]


def _argument_names(model: nn.Module) -> list[str]:
    """Names of the arguments of `forward`, from the class: an override on the instance may have lost its signature."""
    return list(inspect.signature(type(model).forward).parameters)[1:]


def _patch_grid(model: nn.Module, image: torch.Tensor) -> tuple[int, int] | None:
    size = getattr(getattr(model, "config", None), "patch_size", None)
    if size is None or image.ndim != 4:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return image.shape[-2] // height, image.shape[-1] // width


def take_rows(inputs: Mapping[str, Any], rows: int, batch_size: int) -> dict[str, Any]:
    """The first rows of every entry of a batch that has one row per sample; other entries as they are.

    Args:
        inputs: the batch.
        rows: number of rows to take.
        batch_size: number of samples in the batch.
    """

    def cut_off(value):
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch_size:
            return value[:rows]
        return value

    return {name: cut_off(value) for name, value in inputs.items()}


def synthetic_probe(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Two random images of the size in `model.config`; None if the configuration has no size."""
    config = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if channels is None or main_input_name(model) != "pixel_values":
        return None
    if size is None:
        size = 64  # the configuration of a convolutional family has no image size; the model takes any
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, channels, height, width, generator=generator)
    return {"pixel_values": pixels.to(parameter.device, parameter.dtype)}
