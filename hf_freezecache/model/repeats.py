"""Running a model for its record alone: heavy operations are left out where they repeat what was done before."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from ..rng import RngState
from .structure import leaves

#: A state of a tensor's memory: which storage, and how often it was written to before. Views share it.
Value = tuple[int, int]
#: Shape, strides, type and device of a result.
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]

#: Of the one recording that watches methods of tensors.
_LOCK = threading.RLock()
#: Methods that give away the values of a tensor without an operation.
_READS = ("tolist", "numpy", "data_ptr", "__dlpack__", "__reduce_ex__", "__repr__")
#: Operations that torch counts among those whose shapes depend on values, though only on those of integers and masks.
_SHAPED_BY_INDICES = (torch.ops.aten.index.Tensor,)


class ValueNeededError(RuntimeError):
    """Something depends on a value that was not computed."""


class Repeats:
    """Runs the operations of a model, but for heavy ones that repeat what was done before.

    Heavy are products of matrices, convolutions and attention. One that depends on the samples is done once for each
    layout (shapes, strides, types) of what it gets. Where the same comes again, its results are zeros in the layout
    that they had then, and what is computed from these has unknown values. Shapes, strides and storages are those of a
    run of everything as long as only floating-point and complex numbers in memory of the run depend on unknown values.
    Where anything else would (a number for Python, a mask, a shape, memory that was there before), the run ends with
    an error.

    Args:
        samples: values of the model's inputs. What does not depend on them is computed: a model may keep it.

    Attributes:
        why_needed: what depends on a value that was not computed; None: nothing does.
    """

    def __init__(self, samples: Collection[Value]):
        self.why_needed: str | None = None
        self.unknown: set[Value] = set()
        self._of_samples = set(samples)
        #: Storages that an operation of the run has made.
        self._own: set[int] = set()
        #: Of the results of an operation on arguments of some layout; None: it must be done.
        self._layouts: dict[tuple, list[_Layout] | None] = {}

    def run(
        self, func: Any, args: tuple, kwargs: dict, read: Mapping[Value, list[torch.Tensor]], written: Collection[int]
    ) -> tuple[Any, bool]:
        """Runs an operation, or leaves it out.

        Args:
            func: the operation.
            args, kwargs: of it.
            read: the values on which it depends, with the tensors that have them.
            written: storages to which it writes.

        Returns:
            What it returns, and whether its values are unknown.

        Raises:
            ValueNeededError: if a value would be needed that was not computed.
        """
        unknown = self.unknown & read.keys()
        if unknown:
            self._check(func, [tensor for value in unknown for tensor in read[value]], written)
        if func._overloadpacket in flop_registry and not self._of_samples.isdisjoint(read):
            output, is_unknown = self._run_once(func, args, kwargs)
        else:
            output, is_unknown = func(*args, **kwargs), False
        if unknown and not _is_made_of_tensors(output):
            self.need(f"{func} gives something else than tensors")
        return output, is_unknown or bool(unknown)

    def follow(
        self, read: Collection[Value], made: Collection[Value], is_unknown: bool, storages: Collection[int]
    ) -> None:
        """Notes what an operation has made.

        Args:
            read: values on which its results depend.
            made: those that it has made.
            is_unknown: whether these were not computed.
            storages: those that it has made.
        """
        self._own.update(storages)
        if not self._of_samples.isdisjoint(read):
            self._of_samples.update(made)
        if is_unknown:
            self.unknown.update(made)

    def need(self, why: str) -> None:
        """Ends the run.

        Args:
            why: what depends on a value that was not computed.

        Raises:
            ValueNeededError: always; `why_needed` remembers it where the model's own code catches it.
        """
        self.why_needed = why
        raise ValueNeededError(why)

    def _check(self, func: Any, unknown: list[torch.Tensor], written: Collection[int]) -> None:
        if func.namespace not in ("aten", "prims"):
            self.need(f"it is not known on what the result of {func} depends")
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if tags.intersection(func.tags) and func not in _SHAPED_BY_INDICES:
            self.need(f"{func} reads values")
        if not all(is_plain(t) and (t.is_floating_point() or t.is_complex()) for t in unknown):
            self.need(f"{func} reads something else than floating-point and complex numbers")
        if not self._own.issuperset(written):
            self.need(f"{func} writes to memory that was there before the run")

    def _run_once(self, func: Any, args: tuple, kwargs: dict) -> tuple[Any, bool]:
        """What an operation returns, and whether it was left out."""
        tensors = [tensor for _, tensor in leaves((args, kwargs))]
        if not all(map(is_plain, tensors)):
            return func(*args, **kwargs), False
        key = (func, _signature((args, kwargs)))
        layouts = self._layouts.get(key)
        if layouts is not None:
            made = [_zeros(layout) for layout in layouts]
            return (made[0] if len(made) == 1 else tuple(made)), True
        if key in self._layouts:
            return func(*args, **kwargs), False
        generators = RngState()
        output = func(*args, **kwargs)
        self._layouts[key] = _layouts(func, output, tensors) if generators.is_current() else None
        return output, False


def _layouts(func: Any, output: Any, arguments: list[torch.Tensor]) -> list[_Layout] | None:
    """Of the results of an operation; None unless each is a plain tensor with memory of its own, all of it used."""
    results = list(output) if isinstance(output, (tuple, list)) else [output]
    if any(value.alias_info is not None for value in (*func._schema.arguments, *func._schema.returns)):
        return None
    if not all(isinstance(result, torch.Tensor) and is_plain(result) for result in results):
        return None
    storages = [tensor.untyped_storage()._cdata for tensor in (*results, *arguments)]
    is_own = all(storages.count(storage) == 1 for storage in storages[: len(results)])
    if not is_own or any(result.storage_offset() for result in results):
        return None
    return [(result.shape, result.stride(), result.dtype, result.device) for result in results]


def _zeros(layout: _Layout) -> torch.Tensor:
    shape, strides, dtype, device = layout
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).zero_()


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of no class of its own, and has strides and numbers in its memory."""
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized


def _is_made_of_tensors(output: Any) -> bool:
    if isinstance(output, (tuple, list)):
        return all(map(_is_made_of_tensors, output))
    return output is None or isinstance(output, torch.Tensor) and is_plain(output)


def _signature(value: Any) -> Any:
    """What of the arguments of an operation the layout of its results depends on."""
    if isinstance(value, torch.Tensor):
        flags = value.requires_grad, value.is_conj(), value.is_neg()
        return value.shape, value.stride(), value.dtype, value.device, flags
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    if isinstance(value, Mapping):
        return tuple((name, _signature(item)) for name, item in value.items())
    return value


@contextlib.contextmanager
def watching_reads(is_unknown: Callable[[torch.Tensor], bool], need: Callable[[str], None]) -> Iterator[None]:
    """Inside, methods that give away values of tensors without an operation end the run where these are unknown.

    Args:
        is_unknown: whether the values of a tensor were not computed.
        need: ends the run; gets the reason.
    """

    def guard(name: str) -> Callable:
        original = getattr(torch.Tensor, name)

        @functools.wraps(original)
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if is_unknown(tensor):
                need(f"{name} reads values")
            return original(tensor, *args, **kwargs)

        return read

    with _LOCK:
        own = {name: vars(torch.Tensor)[name] for name in _READS if name in vars(torch.Tensor)}
        try:
            for name in _READS:
                setattr(torch.Tensor, name, guard(name))
            yield
        finally:
            for name in _READS:
                if name in own:
                    setattr(torch.Tensor, name, own[name])
                elif name in vars(torch.Tensor):
                    delattr(torch.Tensor, name)
