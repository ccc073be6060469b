"""Tensors of known shape and unknown values: what stands where a bypassed block would have answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

_aten = torch.ops.aten
#: Calls that turn values into something that is no tensor any more, reach for the memory, or begin a backward pass.
_READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__index__,
    torch.Tensor.__complex__,
    torch.Tensor.__contains__,
    torch.Tensor.__format__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.backward,
    torch.Tensor.__dlpack__,
    torch.Tensor.data_ptr,
    torch.Tensor.share_memory_,
    torch.Tensor.untyped_storage,
}
#: Operations after which a stand-in of the model's input still is the whole input and nothing else.
_KEEPS_INPUT = {_aten._to_copy, _aten.alias, _aten.clone, _aten.detach, _aten.lift_fresh}
#: Operations whose result depends on the shape of their first argument only.
_SHAPE_ONLY = {
    _aten.empty_like,
    _aten.full_like,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.new_full,
    _aten.new_ones,
    _aten.new_zeros,
    _aten.ones_like,
    _aten.rand_like,
    _aten.randint_like,
    _aten.randn_like,
    _aten.zeros_like,
}


class FrozenOutputError(RuntimeError):
    """Something reads what exists only on samples: an output of a bypassed block, or the samples themselves."""


class _Memory:
    """What a stand-in and its views share: whether something was written to one of them."""

    written = False


class StandIn(torch.Tensor):
    """A tensor of known shape, dtype and device, whose values are unknown: reading them is an error, not zeros.

    What is computed from it is a stand-in too, so that code which passes tensors through, reshapes them or collects
    them works. An error comes where a value is needed: a number, a branch, a backward pass, a write to a real tensor.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
        stands_for: what it stands for, for messages: "the output of the frozen block 'vit.embeddings'".
        is_input: whether it stands for the whole main input of the model, unchanged.
    """

    stands_for: str
    _is_whole_input: bool
    _memory: _Memory

    def __new__(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        stands_for: str,
        is_input: bool = False,
    ):
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made.stands_for, made._is_whole_input, made._memory = stands_for, is_input, _Memory()
        return made

    def __init__(self, *args, **kwargs):
        pass  # `__new__` has made it

    @property
    def is_input(self) -> bool:
        """Whether it still is the whole main input, and nothing was written to it."""
        return self._is_whole_input and not self._memory.written

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StandIn({self.stands_for}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _READS:
            raise _error(args, kwargs)
        if func is torch.Tensor.data.__set__ and isinstance(args[0], StandIn):  # type: ignore[attr-defined]
            args[0]._memory.written = True
        if func in (torch.Tensor.__repr__, torch.Tensor.__str__):
            return StandIn.__repr__(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # a class method
        kwargs = kwargs or {}
        operation = func.overloadpacket
        first = _first_of(args, kwargs)
        if operation in _SHAPE_ONLY:
            kwargs = {"device": first.device, "dtype": first.dtype, **kwargs}
            return func(_on_meta(args[0]), *args[1:], **kwargs)
        written = _written(func, args, kwargs)
        if any(not isinstance(tensor, StandIn) for tensor in written):
            raise _error(args, kwargs)
        if written:
            stand_ins = [tensor for tensor in written if isinstance(tensor, StandIn)]
            for tensor in stand_ins:
                tensor._memory.written = True
            return stand_ins[0] if len(stand_ins) == 1 else tuple(stand_ins)
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else first.device
        keeps_input = operation in _KEEPS_INPUT and first.is_input
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            made = StandIn(value.shape, value.dtype, device, first.stands_for, keeps_input)
            if is_view:
                made._memory = first._memory
            return made

        meta_kwargs = {name: "meta" if name == "device" else value for name, value in kwargs.items()}
        try:
            result = func(*tree_map(_on_meta, args), **tree_map(_on_meta, meta_kwargs))
        except Exception as error:  # the result depends on the values; or the call fails on samples, too
            raise _error(args, kwargs) from error
        if operation is _aten.equal or not any(isinstance(leaf, torch.Tensor) for leaf in tree_flatten(result)[0]):
            raise _error(args, kwargs)
        return tree_map(wrap, result)


def stays_real(main_input: torch.Tensor) -> bool:
    """Whether a main input stays as it is in replays: tokens, also of several texts per sample. Images do not."""
    if main_input.is_floating_point() or main_input.is_complex():
        return False
    return main_input.ndim <= 2 or main_input.ndim == 3 and main_input.dtype in (torch.int32, torch.int64)


def _on_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _first_of(args: Any, kwargs: Any) -> StandIn:
    return next(leaf for leaf in tree_flatten((args, kwargs or {}))[0] if isinstance(leaf, StandIn))


def _written(function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation changes in place."""
    written = []
    for position, argument in enumerate(function._schema.arguments):  # type: ignore[attr-defined]
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
    return written


def _error(args: Any, kwargs: Any) -> FrozenOutputError:
    return FrozenOutputError(
        f"{_first_of(args, kwargs).stands_for} is read, but in replay epochs it does not exist: frozen blocks do not "
        "run there. Compute it from what comes after the frozen blocks, or use cache='never'."
    )
