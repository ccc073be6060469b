"""Texts as rows of a store: features of their tokens alone, without padding.

The user's own collator makes the model inputs of every replayed batch, from the samples, and pads them; a store of
texts holds none. It holds how many tokens a text has, and a checksum of them and of whatever else the frozen blocks
read, by which a sample that has changed since is seen.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..model.tokens import MASK, TextInputs, blank_padding, token_mask, why_not_padded
from .codec import Codec
from .names import BASE, CHECKSUM, INPUTS, PADDING, TOKENS
from .rows import BatchSplit, RowError

#: Odd numbers with bits all over, to mix tokens with their positions; as signed numbers of 64 bits.
_OF_TOKEN, _OF_POSITION, _OF_BOTH = -7046029254386353131, -4417276706812531889, 1609587929392839161


def split_texts(batch: Any, texts: TextInputs, padding: Collection[str] | None = None) -> BatchSplit:
    """Splits a collated batch of texts into its tokens and what a store holds of them besides features.

    Args:
        batch: as the collator returned it.
        texts: what the frozen blocks read of it.
        padding: sides on which padding is left out, which the store tells replays; None: it is not for a store.

    Raises:
        RowError: if the batch does not tell which positions are tokens, or lacks what the frozen blocks read.
    """
    mask = token_mask(batch, texts.main_input)
    if mask is None:
        raise RowError(
            f"the collator returned no '{MASK}' of the shape of '{texts.main_input}', as it did before: which "
            "positions are tokens must be known for all samples."
        )
    missing = sorted(texts.read - batch.keys())
    if missing:
        raise RowError(
            f"the frozen blocks read '{missing[0]}', which the collator does not return: whether it changes cannot be "
            "seen. Return it from the collator, not from `_prepare_inputs`."
        )
    columns = {TOKENS: mask.flatten(1).sum(1), CHECKSUM: checksums(batch, mask, texts)}
    constants = {}
    if padding is not None:
        constants = {PADDING: ",".join(sorted(padding)), INPUTS: ",".join(sorted(texts.read))}
    return BatchSplit(batch[texts.main_input], columns, constants, mask)


def checksums(batch: Mapping[str, Any], mask: torch.Tensor, texts: TextInputs) -> torch.Tensor:
    """A number for all that the frozen blocks read of each text, int64 `(B,)`, whatever padding is beside it.

    Args:
        batch: of texts.
        mask: bool `(B, W)` or `(B, K, W)`, where the tokens are.
        texts: what the frozen blocks read.

    Shapes: B samples, K texts of a sample, W positions, padding included.
    """
    total = torch.zeros(len(mask), dtype=torch.int64)
    if mask.ndim > 2:  # which text of a sample a token is of
        total = _checksums(mask.sum(2), torch.ones(mask.shape[:2], dtype=torch.bool))
    for name in sorted(texts.read - {MASK}):
        own = _checksums(batch[name], mask.cpu())
        total = (total ^ own ^ zlib.crc32(name.encode())) * _OF_BOTH
    return total


def _checksums(value: Any, mask: torch.Tensor) -> torch.Tensor:
    """Numbers for the rows of an entry, or one for all of them."""
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[:2] == (1, mask.shape[1]):
        value = value.expand(len(mask), *value.shape[1:])
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != len(mask):
        if isinstance(value, (list, tuple)) and len(value) == len(mask):
            return torch.tensor([_text_checksum(row) for row in value])
        return torch.tensor(_text_checksum(value))
    bits = value.detach().cpu().contiguous()
    if bits.is_floating_point():
        bits = bits.double().view(torch.int64)
    if bits.is_complex():
        bits = torch.view_as_real(bits).double().view(torch.int64)
    numbers, counted = bits.to(torch.int64).reshape(len(mask), -1), torch.ones(1, 1, dtype=torch.int64)
    positions = torch.arange(1, numbers.shape[1] + 1)[None]
    has_positions = value.ndim > 2 or (value.ndim == 2 and not value.is_floating_point())
    if has_positions and value.shape[: mask.ndim] == mask.shape:
        each = numbers.shape[1] // max(1, math.prod(mask.shape[1:]))
        counted = mask.flatten(1).to(torch.int64).repeat_interleave(each, 1)
        positions = counted.cumsum(1)
    mixed = (numbers + 1) * _OF_TOKEN + positions * _OF_POSITION
    mixed = (mixed ^ (mixed >> 29)) * _OF_BOTH
    return ((mixed ^ (mixed >> 32)) * counted).sum(1)


def _text_checksum(value: Any) -> int:
    content = value.tolist() if isinstance(value, torch.Tensor) else value
    return zlib.crc32(repr(content).encode())


def why_other_texts(codes: Mapping[str, Any], batch: Any, texts: TextInputs) -> str | None:
    """Why codes of a store are not those of the texts of a batch; None if they are.

    Args:
        codes: rows of a store of texts, and its constants.
        batch: of the samples of these rows, as the collator returned it.
        texts: what the frozen blocks read of it.

    Returns:
        The reason, as a sentence.
    """
    try:
        split = split_texts(batch, texts.of(codes[INPUTS].split(",")))
    except RowError as error:
        return str(error)
    assert split.mask is not None  # of texts
    if len(split.main) != len(codes[TOKENS]):
        return f"The collator returned {len(split.main)} rows for {len(codes[TOKENS])} samples."
    if any(not torch.equal(codes[name], split.columns[name].cpu()) for name in (TOKENS, CHECKSUM)):
        return (
            "Samples have other tokens, or other inputs beside them, than when the feature store was built: the data "
            "set, its transform or the collator has changed, or is random."
        )
    why_not = why_not_padded(split.mask, codes[PADDING].split(","))
    return None if why_not is None else f"Now {why_not}."


def place_tokens(codes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Codes of tokens, one after the other, at their positions in a padded batch; at padding is whatever was there.

    Args:
        codes: `(N, length)`.
        mask: bool `(B, W)` or `(B, K, W)`, where the N tokens are: those of a text beside each other.

    Returns:
        `(B, W, length)`; of several texts a sample `(B, K * W, length)`.
    """
    # Copied row by row, and nothing else is written: ten times as fast as by a mask, in the time of every batch.
    samples, mask = len(mask), mask.flatten(0, -2)
    placed, first = codes.new_empty(*mask.shape, codes.shape[1]), 0
    starts = mask.to(torch.uint8).argmax(1) if mask.numel() else mask.sum(1)
    for row, (start, length) in enumerate(zip(starts.tolist(), mask.sum(1).tolist(), strict=True)):
        placed[row, start : start + length] = codes[first : first + length]
        first += length
    return placed.reshape(samples, -1 if samples else 0, codes.shape[1])


def split_rows(codes: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Rows of a store of texts, as `FeatureStore.read_rows` returns them, padded on the right for decoding."""
    lengths = codes[TOKENS]
    width = int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(width) < lengths[:, None]
    return {BASE: place_tokens(codes[BASE], mask), MASK: mask}


def decode_rows(codec: Codec, codes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Decodes the base view of a batch.

    Args:
        codec: of the store.
        codes: rows of its columns; of texts padded, `(B, W, length)`, and `attention_mask`; without this mask all are
            as wide.

    Returns:
        `(B, *layout.shape)`; of texts `(B, W, C)`, with 0 at padding.

    Raises:
        ValueError: as `Codec.decode`.

    Shapes: B samples, W positions of a text, C channels.
    """
    if not codec.layout.is_token:
        return codec.decode(codes)
    tokens = codec.decode({name: codes[name].flatten(0, 1) for name in codec.columns})
    tokens = tokens.unflatten(0, codes[BASE].shape[:2])
    return blank_padding(tokens, codes[MASK]) if MASK in codes else tokens
