"""Samples of several widths as rows of a store that are all as wide as the widest of the data set.

The user's own collator makes the model inputs of every replayed batch, from the samples, and pads them to a width of
the batch's own; the store holds none of them. It holds features that include padding, of which a batch takes as much
as it is wide, and a checksum of all that the frozen blocks read of a sample, by which one that has changed is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .names import CHECKSUM, WIDEST
from .rows import BatchSplit, RowError, fetch, without_last


@dataclass(frozen=True)
class PaddedEntry:
    """An entry of a batch that the collator pads.

    Args:
        dim: which dimension of a row has the width.
        filling: what stands at padding.
    """

    dim: int
    filling: float


@dataclass(frozen=True)
class PaddingRule:
    """How a collator pads what the frozen blocks read, as a value for loader processes.

    Args:
        main_input: name of the model's main input.
        side: on which padding is: `right` or `left`.
        size: shape of the main input of the widest sample, which no other one exceeds.
        entries: what the frozen blocks read, the main input among it; None: an entry without a width.
    """

    main_input: str
    side: str
    size: tuple[int, ...]
    entries: Mapping[str, PaddedEntry | None]

    @property
    def constants(self) -> dict[str, str]:
        """What a store tells replays."""
        entries = {
            name: None if entry is None else [entry.dim, entry.filling] for name, entry in sorted(self.entries.items())
        }
        return {WIDEST: json.dumps([self.main_input, self.side, self.size, entries])}

    @classmethod
    def from_json(cls, text: str) -> PaddingRule:
        """Reads what `constants` has written."""
        main_input, side, size, entries = json.loads(text)
        return cls(
            main_input,
            side,
            tuple(size),
            {name: None if entry is None else PaddedEntry(*entry) for name, entry in entries.items()},
        )

    def of(self, names: frozenset[str]) -> PaddingRule:
        """The same where the frozen blocks read these entries."""
        return replace(self, entries={name: self.entries[name] for name in sorted(names & self.entries.keys())})


class BesideWidest:
    """Collates samples together with the widest one, which is dropped again: all batches have one width.

    Args:
        collator: the user's.
        dataset: of the samples.
        widest: number of the widest one.
    """

    def __init__(self, collator: Callable, dataset: Any, widest: int):
        self.collator, self.dataset, self.widest = collator, dataset, widest

    def __call__(self, samples: Any) -> Any:
        # Fetched anew for each batch: collators take entries out of samples, and change them in place.
        widest = fetch(self.dataset, [self.widest])
        if not isinstance(samples, list) or not isinstance(widest, list):
            raise RowError("the data set returns batches, not samples, so that none can be put beside them.")
        return without_last(self.collator([*samples, *widest]), len(samples) + 1)


def split_padded(batch: Any, rule: PaddingRule) -> BatchSplit:
    """Splits a collated batch into its main input and what a store holds besides features.

    Args:
        batch: as the collator returned it.
        rule: how it pads.

    Raises:
        RowError: if it lacks what the frozen blocks read.
    """
    missing = next((name for name in rule.entries if not isinstance(batch, Mapping) or name not in batch), None)
    if missing is not None:
        raise RowError(f"the collator does not return '{missing}' any more, which the frozen blocks read.")
    return BatchSplit(batch[rule.main_input], {CHECKSUM: checksums(batch, rule)}, rule.constants)


def checksums(batch: Mapping[str, Any], rule: PaddingRule) -> torch.Tensor:
    """A number for all that the frozen blocks read of each sample, int64 `(B,)`, whatever padding is beside it.

    Args:
        batch: a collated batch.
        rule: how it is padded.

    Shapes: B samples.
    """
    samples = len(batch[rule.main_input])
    contents = {
        name: _contents(batch[name], entry, rule.side, samples) for name, entry in sorted(rule.entries.items())
    }
    return digest_rows(contents, samples)


def digest_rows(contents: Mapping[str, Sequence[bytes]], samples: int) -> torch.Tensor:
    """A number for each sample, int64 `(B,)`.

    Args:
        contents: by name, what there is of each sample.
        samples: their number.

    Shapes: B samples.
    """
    digests = [hashlib.blake2b(digest_size=8) for _ in range(samples)]
    for name, rows in contents.items():
        for digest, content in zip(digests, rows, strict=True):
            digest.update(f"{name} {len(content)} ".encode())
            digest.update(content)
    return torch.tensor([int.from_bytes(digest.digest(), "big", signed=True) for digest in digests])


def whole_rows(value: Any, samples: int) -> Sequence[bytes]:
    """What an entry of a batch has of each sample, as bytes; where it is not a row for each, all of it."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == samples:
        return [_bytes(row) for row in value.detach().cpu()]
    rows = value if isinstance(value, (list, tuple)) and len(value) == samples else [value] * samples
    return [repr(row.tolist() if isinstance(row, torch.Tensor) else row).encode() for row in rows]


def _contents(value: Any, entry: PaddedEntry | None, side: str, samples: int) -> Sequence[bytes]:
    """What there is of each sample, without padding, as bytes."""
    if entry is None or not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != samples:
        return whole_rows(value, samples)
    tensor = value.detach().cpu()
    if tensor.ndim <= entry.dim + 1:
        raise RowError(f"an entry of a batch that the collator pads has rows of {tuple(tensor.shape[1:])} now.")
    tensor = tensor.movedim(entry.dim + 1, 1).contiguous()
    is_own = (tensor != entry.filling).reshape(*tensor.shape[:2], -1).any(2)
    lengths = _lengths(is_own.flip(1) if side == "left" else is_own)
    starts = [tensor.shape[1] - length if side == "left" else 0 for length in lengths]
    return [_bytes(row[s : s + n]) for row, s, n in zip(tensor, starts, lengths, strict=True)]


def _lengths(is_own: torch.Tensor) -> list[int]:
    """Where the last position lies of each row, bool `(B, W)`, that is no padding; 0 if there is none."""
    places = torch.arange(1, is_own.shape[1] + 1)
    return (is_own * places).amax(1).tolist() if is_own.shape[1] else [0] * len(is_own)


def _bytes(row: torch.Tensor) -> bytes:
    return row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def why_other_samples(constants: Mapping[str, Any], batch: Any) -> str | None:
    """Why codes of a store are not those of the samples of a batch; None if they are.

    Args:
        constants: rows of the store and its constants.
        batch: of the samples of these rows, as the collator returned it.

    Returns:
        The reason, as a sentence.
    """
    rule = PaddingRule.from_json(constants[WIDEST])
    try:
        split = split_padded(batch, rule)
    except RowError as error:
        return str(error)
    size = tuple(split.main.shape[1:])
    if len(split.main) != len(constants[CHECKSUM]):
        return f"The collator returned {len(split.main)} rows for {len(constants[CHECKSUM])} samples."
    if len(size) != len(rule.size) or any(own > most for own, most in zip(size, rule.size, strict=True)):
        return f"'{rule.main_input}' has rows of {size}, and none had more than {rule.size} before."
    if not torch.equal(constants[CHECKSUM], split.columns[CHECKSUM]):
        return (
            "Samples, or other inputs beside them, or the side of their padding are others than when the feature "
            "store was built: the data set, its transform or the collator has changed, or is random."
        )
    return None
