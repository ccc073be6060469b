"""What a user's data set and collator remember from row to row: counters, queues, generators of their own.

Looking at the data draws rows. Afterwards the data set goes on from where it was, so that the training's own rows are
those of a plain `Trainer`. Either all of a state is put back or nothing: a file that was read on beside a counter that
was put back would give wrong rows.
"""

from __future__ import annotations

import enum
import functools
import logging
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..cache.installed import global_name_of, is_installed, is_installed_class, package_of
from ..cache.rows import RowSource
from ..rng import preserve_rng

#: Containers with more entries, and arrays beyond so many values in all, are data and no state: nothing large is
#: copied. The entries of containers with more than the second number are not looked at.
_MOST_ENTRIES, _MOST_LOOKED_AT, _MOST_VALUES = 10_000, 1000, 1 << 18
#: Objects that are looked at; more are too many to know that nothing else moves.
_MOST_OBJECTS = 20_000
#: What does not change.
_CONSTANT = (
    type(None) | bool | int | float | complex | str | bytes | frozenset | range | slice | np.generic | np.dtype,
    torch.dtype | torch.device | torch.Size | enum.Enum | re.Pattern | PurePath | type | ModuleType,
    type(threading.Lock()),
    type(threading.RLock()),
)
#: What changes in other ways than by drawing rows.
_NOT_OF_THE_DATA = (PreTrainedModel, Trainer, TrainerCallback, torch.optim.Optimizer, DataLoader, logging.Logger)
#: Packages whose objects in C do not change.
_UNCHANGING = ("pyarrow", "tokenizers")
#: Bytes of an object whose class is written in Python; what is larger has something of C code in it.
_SIZE_OF_PYTHONS = 32
#: What is put back where something else stands now; what was None and is an array or an object now was made at its
#: first use, and stays.
_NUMBERS = bool | int | float
_VALUES = _NUMBERS | complex | str | bytes | tuple | list | dict | set | frozenset | deque | np.ndarray | np.generic
_MISSING = object()


class _Unknown(Exception):
    """Something has a state that cannot be read (a file, an iterator), or there is too much of it."""


@contextmanager
def looking_at(source: RowSource) -> Iterator[None]:
    """Inside, rows may be drawn that no training asks for: on leaving, generators and data set are where they were.

    Args:
        source: the samples.
    """
    with preserve_rng(), undisturbed(source.dataset, source.collator):
        yield


@contextmanager
def undisturbed(*owners: Any) -> Iterator[bool]:
    """Puts back on leaving what the code inside has moved in some objects, and in what they refer to.

    These are numbers, containers, arrays and generators of random numbers, in attributes, closures, and in classes and
    globals of the user's code. If there is anything else that may move, all is left as it is then.

    Args:
        owners: data sets, transforms, collators, samplers.

    Yields:
        Whether all that may move is known, and is put back.
    """
    memory, is_known = _Memory(), True
    try:
        for owner in owners:
            memory.keep(owner)
    except _Unknown:
        memory.forget()
        is_known = False
    try:
        yield is_known
    finally:
        memory.put_back()


class _Memory:
    def __init__(self):
        self._seen: dict[int, Any] = {}  # the objects too: their numbers must not be given to others
        self._undo: list[Callable[[], None]] = []
        self._is_constant: list[Callable[[], bool]] = []
        self._values_left = _MOST_VALUES

    def keep(self, owner: Any) -> None:
        """Keeps the state of an object and of what it refers to.

        Raises:
            _Unknown: if not all of it can be kept.
        """
        waiting = [owner]
        while waiting:
            value = waiting.pop()
            if id(value) in self._seen or isinstance(value, (*_CONSTANT, *_NOT_OF_THE_DATA)):
                continue
            if len(self._seen) == _MOST_OBJECTS:
                raise _Unknown
            self._seen[id(value)] = value
            waiting += self._keep(value)

    def forget(self) -> None:
        """Keeps nothing."""
        self._undo, self._is_constant = [], []

    def put_back(self) -> None:
        """Puts everything back, unless something has changed that was taken for data."""
        if all(is_constant() for is_constant in self._is_constant):
            with torch.no_grad():
                for undo in self._undo:
                    undo()

    def _keep(self, value: Any) -> list[Any]:
        """Keeps an object's own state; returns what it refers to."""
        undo_generator = _generator_undo(value)
        if undo_generator is not None:
            self._undo.append(undo_generator)
            return []
        if isinstance(value, torch.Tensor):
            return self._keep_tensor(value)
        if isinstance(value, np.ndarray):
            return self._keep_array(value)
        if isinstance(value, dict):
            return self._keep_names(value, list(value), _VALUES | torch.Tensor) + self._attributes(value)
        if isinstance(value, list | deque | set):
            return self._keep_entries(value) + self._attributes(value)
        if isinstance(value, tuple):
            return list(value) if len(value) <= _MOST_LOOKED_AT else []
        if isinstance(value, MethodType):
            return [value.__self__, *([value.__func__] if isinstance(value.__func__, FunctionType) else [])]
        if isinstance(value, BuiltinFunctionType):
            return [value.__self__]
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, functools._lru_cache_wrapper):
            return [value.__wrapped__]
        if isinstance(value, FunctionType):
            return self._keep_function(value)
        if isinstance(value, datasets.Dataset):
            return [value._format_kwargs]  # its rows never change
        return self._keep_object(value)

    def _keep_object(self, value: Any) -> list[Any]:
        kinds = type(value).__mro__
        if package_of(type(value).__module__) in _UNCHANGING:
            return []
        is_open = hasattr(value, "__dict__") and not any(vars(kind).get("__slots__") for kind in kinds)
        if not is_open or kinds[0].__basicsize__ > _SIZE_OF_PYTHONS:
            raise _Unknown
        found = self._attributes(value)
        for kind in kinds:
            if not is_installed_class(kind):
                found += self._keep_class(kind)
        return found

    def _attributes(self, value: Any) -> list[Any]:
        attributes = getattr(value, "__dict__", None)
        return [] if attributes is None else self._keep_names(attributes, list(attributes), _NUMBERS)

    def _keep_class(self, kind: type) -> list[Any]:
        methods = [value for value in vars(kind).values() if isinstance(value, FunctionType)]
        before = {name: value for name, value in vars(kind).items() if isinstance(value, _VALUES)}

        def undo() -> None:
            for name, value in before.items():
                if not name.startswith("__") and vars(kind).get(name) is not value:
                    setattr(kind, name, value)

        self._undo.append(undo)
        return [*methods, *before.values()]

    def _keep_function(self, function: FunctionType) -> list[Any]:
        found: list[Any] = [function.__defaults__, function.__kwdefaults__]
        for cell in function.__closure__ or ():
            content = _content_of(cell)
            if content is not _MISSING:
                self._undo.append(functools.partial(_put_in_cell, cell, content))
                found.append(content)
        if not is_installed(global_name_of(function)):
            names = [name for name in function.__code__.co_names if name in function.__globals__]
            found += self._keep_names(function.__globals__, names, ())
        return found

    def _keep_names(self, values: dict[Any, Any], names: list[Any], new: Any) -> list[Any]:
        """Keeps entries of a dict; entries that come are taken out again if they are of the types `new`."""
        if len(names) > _MOST_ENTRIES:
            return self._take_as_data(values)
        before = {name: values[name] for name in names}

        def undo() -> None:
            for name, value in before.items():
                if isinstance(value, _VALUES) and values.get(name, _MISSING) is not value:
                    values[name] = value
            for name in [name for name in values if name not in before and isinstance(values[name], new)]:
                del values[name]

        self._undo.append(undo)
        return list(before.values()) if len(before) <= _MOST_LOOKED_AT else []

    def _keep_entries(self, values: Any) -> list[Any]:
        if len(values) > _MOST_ENTRIES:
            return self._take_as_data(values)
        before = list(values)

        def undo() -> None:
            if len(values) != len(before) or any(a is not b for a, b in zip(values, before, strict=True)):
                values.clear()
                (values.update if isinstance(values, set) else values.extend)(before)

        self._undo.append(undo)
        return before if len(before) <= _MOST_LOOKED_AT else []

    def _take_as_data(self, values: Any) -> list[Any]:
        count = len(values)
        self._is_constant.append(lambda: len(values) == count)
        return []

    def _keep_tensor(self, values: torch.Tensor) -> list[Any]:
        version = values._version
        if values.numel() > self._values_left:
            self._is_constant.append(lambda: values._version == version)
            return []
        self._values_left -= values.numel()
        before = values.detach().clone()

        def undo() -> None:
            if values._version != version and values.shape == before.shape:
                values.copy_(before)

        self._undo.append(undo)
        return []

    def _keep_array(self, values: np.ndarray) -> list[Any]:
        if values.dtype.hasobject or values.size > self._values_left or not values.flags.writeable:
            return []
        self._values_left -= values.size
        before = values.copy()

        def undo() -> None:
            if values.shape == before.shape and values.tobytes() != before.tobytes():
                values[...] = before

        self._undo.append(undo)
        return []


def _generator_undo(value: Any) -> Callable[[], Any] | None:
    """Puts a generator of random numbers back to where it is; None for anything else."""
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    return None


def _content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled in yet
        return _MISSING


def _put_in_cell(cell: CellType, content: Any) -> None:
    if isinstance(content, _VALUES) and _content_of(cell) is not content:
        cell.cell_contents = content
