"""Texts as rows of a store: features of their tokens alone, without padding.

The user's own collator makes the model inputs of every replayed batch, from the samples, and pads them; a store of
texts holds none. It holds how many tokens a text has, and a checksum of them, by which a sample that has changed since
is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..model.tokens import MASK, blank_padding, token_mask
from .codec import Codec
from .names import BASE, CHECKSUM, TOKENS
from .rows import BatchSplit, RowError

#: Odd numbers with bits all over, to mix tokens with their positions; as signed numbers of 64 bits.
_OF_TOKEN, _OF_POSITION, _OF_BOTH = -7046029254386353131, -4417276706812531889, 1609587929392839161


def split_texts(batch: Mapping[str, Any], main_input: str) -> BatchSplit:
    """Splits a collated batch of texts into its tokens and what a store holds of them besides features.

    Args:
        batch: as the collator returned it.
        main_input: name of the tokens in it.

    Raises:
        RowError: if the batch does not tell which positions are tokens.
    """
    mask = token_mask(batch, main_input)
    if mask is None:
        raise RowError(
            f"the collator returned no '{MASK}' of the shape of '{main_input}', as it did before: which positions "
            "are tokens must be known for all samples."
        )
    main = batch[main_input]
    columns = {TOKENS: mask.sum(1), CHECKSUM: checksums(main, mask)}
    return BatchSplit(main, columns, {}, mask)


def checksums(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A number for the tokens of each text in their order, int64 `(B,)`, whatever padding is beside them.

    Args:
        tokens: integers `(B, W)`.
        mask: bool `(B, W)`, where the tokens are.

    Shapes: B texts, W positions, padding included.
    """
    mixed = (tokens.to(torch.int64) + 1) * _OF_TOKEN + mask.cumsum(1) * _OF_POSITION
    mixed = (mixed ^ (mixed >> 29)) * _OF_BOTH
    return ((mixed ^ (mixed >> 32)) * mask).sum(1)


def why_other_texts(codes: Mapping[str, Any], batch: Mapping[str, Any], main_input: str) -> str | None:
    """Why codes of a store are not those of the texts of a batch; None if they are.

    Args:
        codes: rows of a store of texts.
        batch: of the samples of these rows, as the collator returned it.
        main_input: name of the tokens in it.

    Returns:
        The reason, as a sentence.
    """
    try:
        split = split_texts(batch, main_input)
    except RowError as error:
        return str(error)
    if len(split.main) != len(codes[TOKENS]):
        return f"The collator returned {len(split.main)} rows for {len(codes[TOKENS])} samples."
    if all(torch.equal(codes[name], split.columns[name].cpu()) for name in (TOKENS, CHECKSUM)):
        return None
    return (
        "Samples have other tokens than when the feature store was built: the data set, its transform or the collator "
        "has changed, or is random."
    )


def place_tokens(codes: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Codes of tokens, one after the other, at their positions in a padded batch; 0 at padding.

    Args:
        codes: `(N, length)`.
        mask: bool `(B, W)`, where the N tokens are.

    Returns:
        `(B, W, length)`.
    """
    placed = codes.new_zeros(*mask.shape, codes.shape[1])
    placed[mask] = codes
    return placed


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
        codes: rows of its columns; of texts padded, `(B, W, length)`, and `attention_mask`.

    Returns:
        `(B, *layout.shape)`; of texts `(B, W, C)`, with 0 at padding.

    Raises:
        ValueError: as `Codec.decode`.

    Shapes: B samples, W positions of a text, C channels.
    """
    if not codec.layout.is_token:
        return codec.decode(codes)
    mask = codes[MASK]
    tokens = codec.decode({name: codes[name].flatten(0, 1) for name in codec.columns})
    return blank_padding(tokens.unflatten(0, mask.shape), mask)
