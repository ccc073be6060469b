"""Whether functions of rows combine the rows of a call: mix their images, standardize over them, compare them.

A data set gives the function of `with_transform` all rows of a batch at once. What a function that combines rows
returns for a row depends on the others. Called for one row at a time it does something else, and a store cannot hold
what it returns. It is found by calling it again with other rows beside the same ones, under the same random numbers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.utils import logging

from ..augment.altered import BRIGHT, DARK, INVERSE, altered
from ..augment.drawing import generator_states
from ..augment.draws import RowCall, watch_calls
from ..augment.transforms import ReplayableTransform
from ..build.function_pairs import transform_of
from ..build.spread_rows import spread_rows
from ..cache.rows import RowSource, fetch, is_same
from ..distributed import Announcer, Group
from ..rng import seeded_rng
from .data_state import looking_at, undisturbed

logger = logging.get_logger(__name__)

#: Rows that are fetched at least; rows of a small call, and of a large one at most.
_ROWS, _FEW, _MANY = 24, 4, 32
#: Pairs of calls with as many rows as a batch has, and with a few: some functions combine rows only now and then.
_LARGE_CALLS, _SMALL_CALLS = 4, 32
#: Of a function without random numbers, whose calls all do the same.
_CALLS_OF_BASE = 2
#: Times that a pair of calls is repeated before what differs is believed.
_AGAIN = 3
#: Pairs of calls of a function whose random numbers cannot be repeated, and standard errors that are no accident.
_SHIFTS, _NO_ACCIDENT = 32, 6.0


def settle_combining(source: RowSource, group: Group, may_store: bool) -> None:
    """Finds out on the main process whether samples are combined, for all processes.

    Args:
        source: the samples; `combined` is set.
        group: the processes.
        may_store: whether features may be stored: a function that is not wrapped is of interest then alone, as live
            epochs leave it to the data set anyway.
    """

    def look() -> str:
        with looking_at(source):
            return find_combined(source, may_store)

    source.combined = group.on_main(look)
    if source.combined:
        Announcer(group, logger).warning(
            f"{source.combined[0].upper()}{source.combined[1:]}. It gets whole batches in every epoch, as under a "
            "plain `Trainer`, and no features are stored."
        )


def find_combined(source: RowSource, plain: bool = True) -> str:
    """Why samples depend on the others that are fetched with them, as the end of a sentence; empty if they do not.

    The functions of a `ReplayableTransform`, or that of `with_transform` or `set_transform`, are called with rows from
    all over the data set, and once more under the same random numbers with other pixels in every second row, or with
    other rows behind the first. Rows that stay must be returned as before, bit for bit. Where a call draws more random
    numbers than the other one, only the first row counts: those behind an exchanged row may get other numbers.

    Args:
        source: the samples.
        plain: whether to look at a function that is not in a `ReplayableTransform`, too.
    """
    if source.batch_size == 1 or not getattr(source.dataset, "__getitems__", None):
        return ""
    for call in _calls_of(source) or (_call_of_plain(source) if plain else []):
        size = min(source.batch_size, len(call.rows[call.column]))
        for name, function in call.functions.items():
            if size == 1:
                continue
            trials = _Trials(function, call, source.seed)
            is_random = name == "train" or (not name and trials.draws())
            if trials.combines(min(size, _MANY), is_random):
                whose = f"function `{name}` of the data set's ReplayableTransform" if name else "data set's function"
                return (
                    f"the {whose} combines rows: what it returns for a row changes with the other rows of its batch "
                    "(it mixes images, or standardizes over the batch?)"
                )
    return ""


def _calls_of(source: RowSource) -> list[RowCall]:
    """Calls of functions of rows in a fetch of rows from all over the data set."""
    rows = spread_rows(source.dataset, max(_ROWS, min(source.batch_size, _MANY)), source.seed)
    for chosen in (rows[:2], rows):
        with seeded_rng("combining", source.seed), watch_calls() as calls:
            fetch(source.dataset, chosen)
        if not calls:
            break
    return calls


def _call_of_plain(source: RowSource) -> list[RowCall]:
    """A call of the function that a data set of images has been given; none if it has none."""
    function = transform_of(source.dataset)
    if function is None or isinstance(function, ReplayableTransform):  # of a pipeline, which gets single images
        return []
    rows = spread_rows(source.dataset, max(_ROWS, min(source.batch_size, _MANY)), source.seed)
    asked_for = set(source.dataset.format["columns"])
    columns = {
        name: values for name, values in source.dataset.with_format(None)[list(rows)].items() if name in asked_for
    }
    images = [name for name, values in columns.items() if isinstance(values[0], PIL.Image.Image)]
    return [RowCall({"": function}, images[0], columns)] if images else []


@dataclass(frozen=True)
class _Pair:
    """Two calls of which some rows are the same.

    Args:
        first, second: rows of the calls.
        kept: places of the rows that are the same.
        same_sizes: whether the images have the same sizes in both calls.
    """

    first: Mapping[str, Sequence[Any]]
    second: Mapping[str, Sequence[Any]]
    kept: Sequence[int]
    same_sizes: bool


@dataclass(frozen=True)
class _Returned:
    """What a call returned, and the states of the global generators after it."""

    columns: Mapping[str, Any]
    generators: tuple

    def row(self, place: int) -> dict[str, Any]:
        return {name: values[place] for name, values in self.columns.items() if place < len(values)}

    def differs(self, other: _Returned, places: Iterable[int]) -> bool:
        """Whether one of these rows does."""
        return any(not is_same(self.row(place), other.row(place)) for place in places)


class _Fails(Exception):
    """The function fails for rows that a training may never give it together; the cause says how."""


class _Trials:
    """Calls of one function with rows of a call.

    Args:
        function: the function.
        call: has its rows.
        seed: of the training.
    """

    def __init__(self, function: Callable, call: RowCall, seed: int):
        self._function, self._seed = function, seed
        self._rows, self._column = call.rows, call.column

    def draws(self) -> bool:
        """Whether a call draws random numbers, or returns something else when it is repeated."""
        rows = self._take(self._places(0)[:_FEW])
        with seeded_rng("combining", self._seed, 0):
            before = generator_states()
        try:
            first, second = self._call(rows, 0, restored=False), self._call(rows, 0, restored=False)
        except _Fails:  # the pairs of calls tell it
            return True
        return first.generators != before or first.differs(second, range(_FEW))

    def combines(self, size: int, is_random: bool) -> bool:
        """Whether the function combines rows.

        Args:
            size: rows of a large call.
            is_random: whether it may draw random numbers.
        """
        sizes = [size] * _LARGE_CALLS + [min(size, _FEW)] * _SMALL_CALLS if is_random else [size] * _CALLS_OF_BASE
        for restored in (False, True):
            found = self._compare(sizes, restored)
            if found is not None:
                return found
        return self._shifts(min(size, _FEW))

    def _compare(self, sizes: Sequence[int], restored: bool) -> bool | None:
        """Whether kept rows change in a pair; None if they change from one call to the next.

        Args:
            sizes: rows of each pair.
            restored: whether generators of the function's own are put back after each call.
        """
        for number, size in enumerate(sizes):
            pair = self._pair(number, size)
            if restored and not pair.same_sizes:  # how much it draws from generators of its own is not known
                continue
            call = partial(self._call, number=number, restored=restored)
            try:
                first, second = call(pair.first), call(pair.second)
                if not self._differ(first, second, pair):
                    continue
                for _ in range(_AGAIN):
                    if first.differs(call(pair.first), range(size)) or second.differs(call(pair.second), range(size)):
                        return None
                if first.generators != second.generators or self._is_proof(pair, first, call):
                    return True
            except _Fails as failure:
                _tell(failure, size)
        return False

    def _differ(self, first: _Returned, second: _Returned, pair: _Pair) -> bool:
        """Whether a kept row differs that nothing but the other rows can have changed."""
        kept = pair.kept
        if first.generators != second.generators:  # by then other random numbers are drawn, but not for the first row
            kept = [0] if 0 in kept and pair.same_sizes else []
        return first.differs(second, kept)

    def _is_proof(self, pair: _Pair, first: _Returned, call: Callable[[Mapping], _Returned]) -> bool:
        """Whether kept rows have not got the random numbers of others: an image that draws more, another one less.

        Rows are exchanged one by one: one row that draws as many numbers as before moves nobody else's.
        """
        if not pair.same_sizes:  # the first row alone was compared
            return True
        are_steady = True
        for place in set(range(len(pair.first[self._column]))).difference(pair.kept):
            images = list(pair.first[self._column])
            images[place] = pair.second[self._column][place]
            returned = call({**pair.first, self._column: images})
            if returned.generators != first.generators:
                are_steady = False
            elif first.differs(returned, pair.kept):
                return True
        return are_steady

    def _pair(self, number: int, size: int) -> _Pair:
        places = self._places(number)
        first = self._take(places[:size])
        if number % 4 != 3:
            kept = range(number % 2, size, 2)
            second = self._with_others(first, kept, INVERSE)
            if second is not None:
                return _Pair(first, second, kept, True)
        others = places[size:] or places[:1]
        row_numbers = [places[0], *(others[place % len(others)] for place in range(size - 1))]
        return _Pair(first, self._take(row_numbers), [0], False)

    def _shifts(self, size: int) -> bool:
        """Whether rows get brighter where the others are, more than by accident."""
        shifts: list[float] = []
        for number in range(_SHIFTS):
            rows, kept = self._take(self._places(number)[:size]), range(number % 2, size, 2)
            darker, brighter = (self._with_others(rows, kept, how) for how in (DARK, BRIGHT))
            if darker is None or brighter is None:
                return False
            try:
                dark, bright = (self._brightness(one, kept, number) for one in (darker, brighter))
            except _Fails as failure:
                _tell(failure, size)
                return False
            shifts += [high - low for low, high in zip(dark, bright, strict=True)]
        if not np.isfinite(shifts).all():
            return True
        return bool(abs(np.mean(shifts)) > _NO_ACCIDENT * np.std(shifts) / len(shifts) ** 0.5)

    def _brightness(self, rows: Mapping[str, Sequence[Any]], kept: Sequence[int], number: int) -> list[float]:
        returned = self._call(rows, number, restored=False)
        return [_brightness_of(returned.row(place)) for place in kept]

    def _places(self, number: int) -> list[int]:
        count = len(self._rows[self._column])
        return np.random.default_rng([self._seed, number]).permutation(count).tolist()

    def _take(self, places: Sequence[int]) -> dict[str, list[Any]]:
        return {name: [values[place] for place in places] for name, values in self._rows.items()}

    def _with_others(
        self, rows: Mapping[str, Sequence[Any]], kept: Sequence[int], how: str
    ) -> Mapping[str, Sequence[Any]] | None:
        """The rows with other pixels in those that are not kept; None if an image is of an unknown kind."""
        images = [image if place in kept else altered(image, how) for place, image in enumerate(rows[self._column])]
        return None if any(image is None for image in images) else {**rows, self._column: images}

    def _call(self, rows: Mapping[str, Sequence[Any]], number: int, restored: bool) -> _Returned:
        kept = undisturbed(self._function) if restored else contextlib.nullcontext()
        copies = copy.deepcopy(dict(rows))  # some functions change images in place
        with seeded_rng("combining", self._seed, number), kept:
            try:
                columns = dict(self._function(copies))
            except Exception as error:  # whatever a function of the user's raises
                raise _Fails from error
            return _Returned(columns, generator_states())


def _brightness_of(row: Mapping[str, Any]) -> float:
    """The sum of the means of all images that a function has returned for a row, whatever they are called."""
    images = [np.asarray(value) if isinstance(value, PIL.Image.Image) else value for value in row.values()]
    return sum(
        value.double().mean().item() if isinstance(value, torch.Tensor) else float(value.mean())
        for value in images
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim > 1
    )


def _tell(failure: _Fails, size: int) -> None:
    cause = failure.__cause__
    assert isinstance(cause, Exception)  # see `_Trials._call`
    Announcer.survived(logger, f"A function of rows fails for {size} rows of several batches", cause)
