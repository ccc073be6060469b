"""Whether row i of a collated batch is sample i, whatever samples stand beside it: a store of rows needs that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..cache.rows import BatchSplit, RowSource, fetch, is_same, split_batch
from ..distributed import Announcer, describe_error
from ..rng import seeded_rng
from .spread_rows import in_batches

logger = logging.get_logger(__name__)

#: Rows of a batch of the reference and of a batch of odd size; rows that are collated alone.
_SIZE, _ODD, _ALONE = 8, 5, 2
#: Seeds under which a random collator is tried: some mix only now and then.
_SEEDS = 4
#: Difference of a value, relative to the largest of its row, that comes from rounding in batches of other sizes.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class _Collated:
    """A batch of known samples."""

    rows: Sequence[int]
    split: BatchSplit

    def row(self, position: int) -> dict[str, Any]:
        main = self.split.main[position]
        if self.split.mask is not None:
            main = main[self.split.mask[position]]
        return {"": main, **{name: value[position] for name, value in self.split.columns.items()}}


class _Dependent(Exception):
    """Rows of a batch are not the samples; the message is the reason."""


class _Refused(Exception):
    """The collator itself fails on a batch of another size than the training's, which a build need not collate."""


def why_not_by_row(
    source: RowSource, rows: Sequence[int], main_input: str, split: Callable[[Any], BatchSplit] | None = None
) -> str | None:
    """Why rows of a collated batch are not the samples one by one; None if they are.

    The same samples are collated again in other company: in another order, beside others, in batches of other sizes.
    A random collator is asked under the same random numbers for the same places, with other samples in between.

    Args:
        source: the samples and the collator.
        rows: different rows that stand for the data set, in random order.
        main_input: name of the model's main input in a batch.
        split: splits a batch into what is compared of it; None: all is.

    Returns:
        The reason, as the end of a sentence.
    """
    try:
        return _why_not_by_row(source, rows, split or partial(split_batch, main_input=main_input))
    except _Dependent as reason:
        return str(reason)


def _why_not_by_row(source: RowSource, rows: Sequence[int], split: Callable[[Any], BatchSplit]) -> str | None:
    size = min(_SIZE, source.batch_size)
    company = _Company(source, rows, split, min(size, len(rows)))
    reference = []
    for chosen in in_batches(rows, size):
        first, again = company.collate(chosen), company.collate(chosen, 1)
        if not is_same(vars(first.split), vars(again.split)):
            return _compare_random(company, rows, size)
        reference.append(first)
    return _compare_exact(company, reference, size)


class _Company:
    """Collates samples that were fetched once, one by one, in any company.

    A data set that fetches batches, not samples, is asked again for every batch.

    Args:
        source: the samples and the collator.
        rows: numbers of the samples.
        split: splits a batch.
        usual: size of a batch that the collator must take.
    """

    def __init__(
        self,
        source: RowSource,
        rows: Sequence[int],
        split: Callable[[Any], BatchSplit],
        usual: int,
    ):
        self.source, self._split, self._usual = source, split, usual
        self.samples: dict[int, Any] = {}
        for row in rows:
            with seeded_rng(source.seed, "company", row):
                fetched = fetch(source.dataset, [row])
            if isinstance(fetched, list) and len(fetched) == 1:
                self.samples[row] = fetched[0]

    def collate(self, rows: Sequence[int], seed: int = 0) -> _Collated:
        """Collates some of the samples.

        Args:
            rows: their numbers.
            seed: of the collator's random numbers.

        Raises:
            _Dependent: if the batch has another number of rows.
            _Refused: if the collator fails, and the batch is smaller than usual.
            ValueError: if torch cannot collate them.
        """
        with seeded_rng(self.source.seed, "company", seed):
            if self.samples.keys() >= set(rows):
                # Collators take entries out of samples, and change them in place.
                fetched = [copy.deepcopy(self.samples[row]) for row in rows]
            else:
                fetched = fetch(self.source.dataset, rows)
            try:
                batch = self.source.collator(fetched)
            except Exception as error:  # whatever a collator raises
                if len(rows) < self._usual:
                    raise _Refused(describe_error(error)) from error
                if not isinstance(error, RuntimeError):
                    raise
                # `torch.stack` of rows of several sizes, in most cases
                raise ValueError(
                    f"samples from all over the data set cannot be collated: {describe_error(error)}. A store needs "
                    "inputs of one size: pad texts to one length (padding='max_length'), resize images."
                ) from error
        split = self._split(batch)
        if len(split.main) != len(rows):
            raise _Dependent(
                f"the collator returns {len(split.main)} rows for {len(rows)} samples: it drops or adds some"
            )
        return _Collated(rows, split)

    def why_not_last(self) -> str | None:
        """Why the last range, which may have fewer rows, cannot be collated; None if it can."""
        rows = self.source.rows(self.source.num_ranges - 1)
        try:
            self.source.collate(rows)
        except Exception as error:  # whatever a collator raises
            Announcer.survived(logger, "The collator fails for the last samples", error)
            return (
                f"the collator fails for the last {len(rows)} samples, which are fewer than a batch "
                f"({describe_error(error)})"
            )
        return None


def _compare_exact(company: _Company, reference: Sequence[_Collated], size: int) -> str | None:
    known = {row: batch.row(place) for batch in reference for place, row in enumerate(batch.rows)}
    rows = list(known)
    order = np.random.default_rng(company.source.seed).permutation(rows).tolist()
    usual, odd, alone = in_batches(order, size), in_batches(order[::-1], min(_ODD, size)), in_batches(rows[:_ALONE], 1)
    refuses = False
    for chosen in [*usual, *odd, *alone]:
        try:
            batch = company.collate(chosen)
        except _Refused as refusal:
            Announcer.survived(logger, f"The collator fails for {len(chosen)} samples", refusal)
            refuses = True
            continue
        if batch.split.constants != reference[0].split.constants:
            return "what the collator returns besides one value per sample depends on the batch"
        for place, row in enumerate(chosen):
            reason = _why_differs(known[row], batch.row(place), known)
            if reason is not None:
                return reason
    return company.why_not_last() if refuses else None


def _compare_random(company: _Company, rows: Sequence[int], size: int) -> str | None:
    """Exchanges every other sample; those that stay must not notice."""
    before, others = rows[:size], rows[size:] or rows[:size]
    for seed in range(_SEEDS):
        for kept in (0, 1):
            after = [
                row if place % 2 == kept else others[-1 - place % len(others)] for place, row in enumerate(before)
            ]
            one, other = company.collate(before, seed), company.collate(after, seed)
            for place in range(kept, len(before), 2):
                reason = _why_differs(one.row(place), other.row(place), {})
                if reason is not None:
                    return reason
    return None


def _why_differs(
    expected: Mapping[str, Any], found: Mapping[str, Any], known: Mapping[int, Mapping[str, Any]]
) -> str | None:
    if expected.keys() != found.keys():
        return "the collator returns other entries for other batches"
    differing = [name for name in expected if not _is_close(expected[name], found[name])]
    if not differing:
        return None
    if any(_is_close(found[""], row[""]) and "" in differing for row in known.values()):
        return "the collator changes the order of the rows (it sorts them?)"
    name = differing[0]
    entry = "the main input" if name == "" else f"'{name}'"
    if getattr(expected[name], "shape", None) != getattr(found[name], "shape", None):
        return (
            f"the size of a row of {entry} depends on the batch: the collator pads to the longest; pad to one length"
        )
    return (
        f"the collator's rows depend on the rest of the batch: {entry} of a sample changes with the samples beside it "
        "(it standardizes over the batch, or mixes samples?)"
    )


def _is_close(first: Any, second: Any) -> bool:
    if is_same(first, second):
        return True
    if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
        return False
    if not first.is_floating_point() or first.shape != second.shape or first.dtype != second.dtype:
        return False
    scale = first.double().nan_to_num(0).abs().max().item() if first.numel() else 0.0
    return torch.allclose(first.double(), second.double(), rtol=0.0, atol=_ROUNDING * scale, equal_nan=True)
