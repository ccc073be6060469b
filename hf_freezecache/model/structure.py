"""Tensors in the arguments and outputs of calls: tuples, lists and mappings of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from .errors import ChainError

#: Where a tensor is in a structure: keys of mappings, positions in tuples and lists. Of a call: `(0, position)` for
#: arguments, `(1, name)` for keywords.
Path = tuple[Any, ...]


def map_structure(function: Callable, value: Any) -> Any:
    """Applies `function` to the leaves of tuples, lists and mappings, keeping their types (`ModelOutput` too)."""
    if isinstance(value, Mapping):
        return type(value)(**{key: map_structure(function, item) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_structure(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_structure(function, item) for item in value)
    return function(value)


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """All tensors in tuples, lists and mappings, each with its path: the keys that lead to it."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))


def map_leaves(function: Callable[[Path, Any], Any], value: Any, path: Path = ()) -> Any:
    """Applies `function(path, leaf)` to the leaves of tuples, lists and mappings, keeping their types."""
    if isinstance(value, Mapping):
        items = {key: map_leaves(function, item, (*path, key)) for key, item in value.items()}
        # Outputs of Transformers are data classes, which take their entries by name.
        return type(value)(**items) if dataclasses.is_dataclass(value) else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        mapped = [map_leaves(function, item, (*path, number)) for number, item in enumerate(value)]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    return function(path, value)


def argument(place: int | str, args: tuple, kwargs: dict) -> Any:
    """The argument of a call at a position or of a keyword."""
    return args[place] if isinstance(place, int) else kwargs[place]


def with_argument(place: int | str, args: tuple, kwargs: dict, value: Any) -> tuple[tuple, dict]:
    """The same call with another value at a position or of a keyword."""
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: value}


def find_tensor(output: Any) -> torch.Tensor | None:
    """The first tensor in an output of tuples, lists and mappings; None if it holds none."""
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((tensor for value in values if (tensor := find_tensor(value)) is not None), None)


def find_tensors(output: Any, name: str = "output") -> dict[str, torch.Tensor]:
    """All tensors in an output of tuples, lists and mappings, by their place in it."""
    if isinstance(output, torch.Tensor):
        return {name: output}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    return {place: tensor for key, value in items for place, tensor in find_tensors(value, f"{name}.{key}").items()}


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor in an output of tuples, lists and mappings.

    Raises:
        ChainError: if it holds none.
    """
    tensor = find_tensor(output)
    if tensor is None:
        raise ChainError(f"a tensor was expected in an output, but {type(output).__name__} holds none.")
    return tensor
