"""Texts of several ranges run together, sorted by length: padding that changes nothing need not be computed.

Texts that a collator pads to one width run as they are, range by range, as they do in a training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..cache.rows import BatchSplit, DrawnBatch, is_same
from ..model.tokens import MASK, padded_sides, take_columns
from .feature_sources import ImageFeatures, ViewRun

#: The shortest text of a batch, relative to its longest.
_SHORTEST = 0.75
#: An entry of a batch has a row for each sample, or one row for all of them.
_ROWS, _SHARED = "rows", "shared"


def run_by_length(
    features: ImageFeatures, numbers: Sequence[int], together: Callable[[int], Sequence[int]]
) -> Iterator[tuple[int, list[ViewRun]]]:
    """As `FeatureSource.run`, for texts that are stored without padding.

    Ranges that belong together always run together, whichever of them are asked for: the features of a sample have the
    same bits on every process.

    Args:
        features: computes them.
        numbers: of the ranges.
        together: the ranges that run together with one, itself among them; the same for each of these.
    """
    groups: list[Sequence[int]] = []
    known: set[int] = set()
    for number in numbers:
        if number not in known:
            groups.append(together(number))
            known.update(groups[-1])
    drawn = features.source.loader([number for group in groups for number in group])
    probe = features.source.probe()
    wanted, done, waiting = set(numbers), dict[int, ViewRun](), iter(groups)
    for number in numbers:
        while number not in done:
            group = next(waiting)
            batches = [next(drawn)[1][0] for _ in group]
            runs = run_together(features, [features.source.rows(each) for each in group], batches, probe)
            done |= {each: run for each, run in zip(group, runs, strict=True) if each in wanted}
        yield number, [done.pop(number)]


def run_together(
    features: ImageFeatures, rows: Sequence[Sequence[int]], drawn: Sequence[DrawnBatch], probe: Mapping[str, Any]
) -> list[ViewRun]:
    """Features of the texts of some ranges, which run in batches of like length where that can be done.

    Args:
        features: computes them.
        rows: row numbers of each range.
        drawn: each as a batch.
        probe: a batch of a few other rows: of another size, so that it tells which dimensions are those of samples and
            of positions.
    """
    splits = [features.split(each.batch, numbers) for each, numbers in zip(drawn, rows, strict=True)]
    inputs = [features.model_inputs(each.batch) for each in drawn]
    group = _sort(features, inputs, splits, features.model_inputs(probe))
    if group is None:  # each range as it is
        tokens = [
            _tokens(features.compute(batch, numbers), split.mask)
            for batch, numbers, split in zip(inputs, rows, splits, strict=True)
        ]
    else:
        tokens = group.run(features, [number for numbers in rows for number in numbers])
    return [
        ViewRun(split.columns, split.constants, own, each.geometry, each.refused, split.mask)
        for split, own, each in zip(splits, tokens, drawn, strict=True)
    ]


@dataclass(frozen=True)
class _Entry:
    """What is known of an entry of the batches of a group.

    Args:
        kind: whether it has a row for each sample.
        has_positions: whether it has a value, or a row of values, for each position of a text.
        filling: what stands at every padding of an entry with a row for each sample, in all batches.
    """

    kind: str | None
    has_positions: bool = False
    filling: torch.Tensor | None = None


@dataclass(frozen=True)
class _Group:
    """Ranges that can run in other batches than their own.

    Args:
        inputs: of the prefix, by range.
        masks: where the tokens are, as `token_mask` tells, by range.
        sides: on which the rows are padded, by range.
        entries: by name.
    """

    inputs: Sequence[Mapping[str, Any]]
    masks: Sequence[torch.Tensor]
    sides: Sequence[str]
    entries: Mapping[str, _Entry]

    def run(self, features: ImageFeatures, rows: Sequence[int]) -> list[torch.Tensor]:
        """Features of the tokens of each range, `(N, C)`.

        Args:
            features: computes them.
            rows: row numbers of all ranges, one after the other.
        """
        lengths = torch.cat([mask.flatten(1).sum(1) for mask in self.masks]).cpu().numpy()
        widths = torch.cat([mask.sum(-1).reshape(len(mask), -1).amax(1) for mask in self.masks]).cpu().numpy()
        ranges = np.repeat(np.arange(len(self.masks)), [len(mask) for mask in self.masks])
        places = np.concatenate([np.arange(len(mask)) for mask in self.masks])
        batches, tokens = self._plan(widths), []
        for chosen in batches:
            batch = self._take(ranges[chosen], places[chosen], max(1, int(widths[chosen].max())))
            found = features.compute(batch, [rows[place] for place in chosen])
            tokens.append(_tokens(found, batch[MASK] != 0))
        # Tokens lie as they were run: those of a row are beside each other.
        order = np.concatenate(batches)
        first = np.empty(len(order), np.int64)
        first[order] = np.cumsum(lengths[order]) - lengths[order]
        index = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        together = torch.cat(tokens)
        together = together[torch.from_numpy(index).to(together.device)]
        return list(together.split([int(mask.sum()) for mask in self.masks]))

    def _plan(self, widths: np.ndarray) -> list[np.ndarray]:
        mask = self.masks[0]
        most_positions = max(mask.numel() for mask in self.masks) // max(1, mask[0].numel() // max(1, mask.shape[-1]))
        is_small = all(
            entry.kind is not _ROWS or entry.has_positions or self.inputs[0][name].ndim < 2
            for name, entry in self.entries.items()
        )
        # What has no positions (an image beside a text) does not become smaller with the texts.
        most_rows = len(widths) if is_small else max(len(mask) for mask in self.masks)
        return batches_by_length(widths, most_positions, most_rows)

    def _take(self, ranges: np.ndarray, places: np.ndarray, width: int) -> dict[str, Any]:
        """Some rows of the ranges, of a width that holds their tokens."""
        parts = []
        for number in np.unique(ranges).tolist():
            own = torch.from_numpy(places[ranges == number])
            picked = {
                name: self.inputs[number][name][own.to(self.inputs[number][name].device)]
                for name, entry in self.entries.items()
                if entry.kind == _ROWS
            }
            parts.append(self._resize(picked, self.masks[number].shape[1:], width, self.sides[number]))
        widest = self._widest()
        others = {name: self.inputs[widest][name] for name, entry in self.entries.items() if entry.kind != _ROWS}
        others = self._resize(others, self.masks[widest].shape[1:], width, self.sides[widest])
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: rows[name] if name in rows else others[name] for name in self.entries}

    def _resize(self, batch: Mapping[str, Any], positions: Sequence[int], width: int, side: str) -> dict[str, Any]:
        """The batch with less or more padding on a side, of a shape of positions before and a width after."""
        cut, (*texts, before) = {n: value for n, value in batch.items() if self.entries[n].has_positions}, positions
        if width < before:
            kept = slice(0, width) if side == "right" else slice(before - width, before)
            return {**batch, **take_columns(cut, positions, kept)}
        for name, value in cut.items() if width > before else ():
            filling = self.entries[name].filling
            assert filling is not None  # of rows; what is one for all comes from the widest range
            more = filling.expand(len(value), *texts, width - before, *value.shape[1 + len(positions) :])
            cut[name] = torch.cat([value, more] if side == "right" else [more, value], len(positions))
        return {**batch, **cut}

    def _widest(self) -> int:
        return max(range(len(self.masks)), key=lambda number: self.masks[number].shape[-1])

    def shares_rows(self) -> bool:
        """Whether what is one row for all samples is the same in all ranges, as far as they are wide."""
        widest = self._widest()
        shared = [name for name, entry in self.entries.items() if entry.kind == _SHARED]
        if any(self.entries[name].has_positions for name in shared) and len(set(self.sides)) > 1:
            return False
        reference, positions = {name: self.inputs[widest][name] for name in shared}, self.masks[widest].shape[1:]
        return all(
            is_same({name: batch[name] for name in shared}, self._resize(reference, positions, mask.shape[-1], side))
            for batch, mask, side in zip(self.inputs, self.masks, self.sides, strict=True)
        )


def batches_by_length(widths: np.ndarray, most_positions: int, most_rows: int) -> list[np.ndarray]:
    """Batches of like length, the longest first.

    Args:
        widths: tokens of each text, `(B,)`; of several texts a sample those of its longest.
        most_positions: of a batch, padding included; a text that is longer stands alone.
        most_rows: of a batch.

    Returns:
        Places of texts, in ascending order, of each batch.

    Shapes: B texts.
    """
    left, batches = np.argsort(-widths, kind="stable"), []
    while len(left):
        longest = max(1, int(widths[left[0]]))
        like = int((widths[left] >= _SHORTEST * longest).sum())
        count = max(1, min(like, most_rows, most_positions // longest))
        batches.append(np.sort(left[:count]))
        left = left[count:]
    return batches


def _tokens(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    assert mask is not None  # of texts
    return features[mask.flatten(1).to(features.device)]


def _sort(
    features: ImageFeatures,
    inputs: Sequence[Mapping[str, Any]],
    splits: Sequence[BatchSplit],
    probe: Mapping[str, Any],
) -> _Group | None:
    """The ranges as a group; None if it is not known of some entry how to take some of its rows and positions."""
    main, masks, sides = features.chain.main_input, [], []
    if main not in probe or any(batch.keys() != probe.keys() for batch in inputs):
        return None
    if len({batch[main].shape[-1] for batch in [*inputs, probe]}) == 1:
        # So wide are the batches of a training, too: features have the bits that they have there.
        return None
    for batch, split in zip(inputs, splits, strict=True):
        assert split.mask is not None  # of texts
        padded, own = padded_sides(split.mask), batch.get(MASK)
        if padded is None or len(padded) > 1 or not isinstance(own, torch.Tensor) or own.shape != split.mask.shape:
            return None
        if not torch.equal(own.cpu() != 0, split.mask.cpu()):
            return None
        masks.append(split.mask)
        sides.append(next(iter(padded), ""))
    # Which side that of a range without padding is does not matter: it is only cut where no row is.
    common = next((side for side in sides if side), "right")
    sides = [side or common for side in sides]
    entries: dict[str, _Entry] = {}
    for name in inputs[0]:
        entry = _entry(name, main, [*inputs, probe])
        if entry is not None and entry.kind == _ROWS and entry.has_positions:
            entry = _with_filling(name, entry, inputs, masks)
        if entry is None:
            return None
        entries[name] = entry
    group = _Group(inputs, masks, sides, entries)
    return group if group.shares_rows() else None


def _with_filling(
    name: str, entry: _Entry, inputs: Sequence[Mapping[str, Any]], masks: Sequence[torch.Tensor]
) -> _Entry | None:
    """The entry with what stands at padding; None if batches would have to be padded, and it is not one value."""
    if len({mask.shape[-1] for mask in masks}) == 1:
        return entry  # none is padded any further
    padding = torch.cat([batch[name][~mask.to(batch[name].device)] for batch, mask in zip(inputs, masks, strict=True)])
    is_one = len(padding) and bool((padding == padding[0]).all())
    return replace(entry, filling=padding[0]) if is_one else None


def _entry(name: str, main: str, batches: Sequence[Mapping[str, Any]]) -> _Entry | None:
    """What an entry is, by batches of several sizes; None if that cannot be told, or is nothing known."""
    values = [batch.get(name) for batch in batches]
    sizes = [tuple(batch[main].shape) for batch in batches]
    if name in (main, MASK):
        fits = all(
            isinstance(value, torch.Tensor) and value.shape == size for value, size in zip(values, sizes, strict=True)
        )
        return _Entry(_ROWS, True) if fits else None
    if not all(isinstance(value, torch.Tensor) and value.ndim for value in values):
        return _Entry(None) if all(is_same(values[0], value) for value in values[1:]) else None
    shapes = [tuple(value.shape) for value in values]  # type: ignore[union-attr]  # they are tensors
    rows, widths, before = {size[0] for size in sizes}, {size[-1] for size in sizes}, len(sizes[0])
    if len({len(shape) for shape in shapes}) > 1 or len({size[1:-1] for size in sizes}) > 1:
        return None
    if all(shape[0] == size[0] for shape, size in zip(shapes, sizes, strict=True)) and len(rows) > 1:
        kind = _ROWS
    elif all(shape[0] == 1 for shape in shapes) and len(rows) > 1:
        kind = _SHARED
    else:
        return None
    has_positions = all(shape[1:before] == size[1:] for shape, size in zip(shapes, sizes, strict=True))
    own = [shape[before if has_positions else 1 :] for shape in shapes]
    # Where all batches have the same width, another dimension of that size cannot be told from positions.
    if (has_positions and len(widths) < 2) or any(size[-1] in shape for shape, size in zip(own, sizes, strict=True)):
        return None
    return _Entry(kind, has_positions) if len(set(own)) == 1 else None
