"""Samples of several sizes as rows of a store: each has features at as many positions as its own size gives.

The user's own collator makes the model inputs of every replayed batch, from the samples; a store holds none of them.
It holds the features, and a checksum of all that the frozen blocks read of a sample, its size included: a sample that
has changed is seen, and so is one that the collator brings to another size in other company.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .names import CHECKSUM, SIZES, TOKENS
from .padded import digest_rows, whole_rows
from .rows import BatchSplit, RowError


@dataclass(frozen=True)
class SizeRule:
    """What the frozen blocks read of samples of several sizes, as a value for loader processes.

    Args:
        main_input: name of the model's main input.
        read: names of all that is read, the main input among them.
    """

    main_input: str
    read: frozenset[str]

    @property
    def constants(self) -> dict[str, str]:
        """What a store tells replays."""
        return {SIZES: json.dumps([self.main_input, sorted(self.read)])}

    @classmethod
    def from_json(cls, text: str) -> SizeRule:
        """Reads what `constants` has written."""
        main_input, read = json.loads(text)
        return cls(main_input, frozenset(read))

    def of(self, names: frozenset[str]) -> SizeRule:
        """The same where the frozen blocks read these entries."""
        return replace(self, read=frozenset(names))


@dataclass(frozen=True)
class SizedBatch:
    """Samples of several sizes, as batches of one size each.

    Args:
        parts: places of samples among all, and the batch of these samples as the user's collator returned it.
    """

    parts: Sequence[tuple[Sequence[int], Mapping[str, Any]]]

    def __len__(self) -> int:
        return sum(len(places) for places, _ in self.parts)


def parts_of(batch: Any) -> list[Mapping[str, Any]]:
    """The batches of one size each; of any other batch this one alone."""
    return [part for _, part in batch.parts] if isinstance(batch, SizedBatch) else [batch]


class BySize:
    """Collates samples that may have several sizes: those of equal size together.

    Args:
        collator: the user's.
        main_input: name of the model's main input in a batch.
        most: samples of a batch.
    """

    def __init__(self, collator: Callable, main_input: str, most: int):
        self.collator, self.main_input, self.most = collator, main_input, most

    def __call__(self, samples: Any) -> SizedBatch:
        if not isinstance(samples, list):
            raise RowError("the data set returns batches, not samples, so that they cannot be sorted by their size.")
        # Collators take entries out of samples, and change them in place.
        alone = [self.collator([copy.deepcopy(sample)]) for sample in samples]
        places: dict[tuple[int, ...], list[int]] = {}
        for place, batch in enumerate(alone):
            places.setdefault(size_of(batch, self.main_input), []).append(place)
        parts = [own[i : i + self.most] for own in places.values() for i in range(0, len(own), self.most)]
        return SizedBatch(
            [
                (part, alone[part[0]] if len(part) == 1 else self.collator([samples[place] for place in part]))
                for part in parts
            ]
        )


def size_of(batch: Any, main_input: str) -> tuple[int, ...]:
    """Shape of the main input of each sample of a batch.

    Raises:
        RowError: if it has none.
    """
    main = batch.get(main_input) if isinstance(batch, Mapping) else None
    if not isinstance(main, torch.Tensor) or not main.ndim:
        raise RowError(f"the collator returns no tensor '{main_input}'.")
    return tuple(main.shape[1:])


def split_sized(batch: SizedBatch, rule: SizeRule) -> BatchSplit:
    """Splits batches of one size each into what a store holds of their samples besides features.

    Args:
        batch: of B samples.
        rule: what is read of them.

    Returns:
        The sizes of the samples in the place of the main input. How many positions their features have is not known
        before these are: it is 0.

    Raises:
        RowError: if a batch lacks what the frozen blocks read, or has another number of rows than samples.

    Shapes: B samples.
    """
    found = torch.zeros(len(batch), dtype=torch.int64)
    sizes: list[tuple[int, ...]] = [()] * len(batch)
    for places, part in batch.parts:
        own = checksums(part, rule)
        if len(own) != len(places):
            raise RowError(f"the collator returned {len(own)} rows for {len(places)} samples: it drops or adds some")
        found[list(places)] = own
        for place in places:
            sizes[place] = size_of(part, rule.main_input)
    return BatchSplit(torch.tensor(sizes), {TOKENS: torch.zeros_like(found), CHECKSUM: found}, rule.constants)


def checksums(batch: Mapping[str, Any], rule: SizeRule) -> torch.Tensor:
    """A number for all that the frozen blocks read of each sample, and its size, int64 `(B,)`.

    Args:
        batch: of samples of one size.
        rule: what is read.

    Raises:
        RowError: if something of it is missing.

    Shapes: B samples.
    """
    size_of(batch, rule.main_input)
    missing = next((name for name in sorted(rule.read) if name not in batch), None)
    if missing is not None:
        raise RowError(
            f"the frozen blocks read '{missing}', which the collator does not return: whether it changes cannot be "
            "seen. Return it from the collator, not from `_prepare_inputs`."
        )
    samples = len(batch[rule.main_input])
    shapes = {name: str(tuple(getattr(batch[name], "shape", ())[1:])) for name in rule.read}
    contents = {f"{name} {shapes[name]}": whole_rows(batch[name], samples) for name in sorted(rule.read)}
    return digest_rows(contents, samples)


def why_other_sizes(codes: Mapping[str, Any], batch: Any) -> str | None:
    """Why codes of a store are not those of the samples of a batch; None if they are.

    Args:
        codes: rows of a store, and its constants.
        batch: of the samples of these rows, as the collator returned it.

    Returns:
        The reason, as a sentence.
    """
    try:
        found = checksums(batch, SizeRule.from_json(codes[SIZES]))
    except RowError as error:
        return str(error)
    if len(found) != len(codes[CHECKSUM]):
        return f"The collator returned {len(found)} rows for {len(codes[CHECKSUM])} samples."
    if not torch.equal(codes[CHECKSUM], found):
        return (
            "Samples, their sizes, or other inputs beside them, are others than when the feature store was built: the "
            "data set, its transform or the collator has changed, or is random; or the collator brings samples of "
            "several sizes to one."
        )
    return None
