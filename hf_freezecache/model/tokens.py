"""Texts in a batch: which positions hold tokens of a sample, and which are padding."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: The entry of a batch that says where tokens are.
MASK = "attention_mask"
#: Where padding may be, beside the tokens of a sample.
SIDES = ("right", "left")


@dataclass(frozen=True)
class TextInputs:
    """What of a batch of texts the frozen blocks read, as a value for loader processes.

    Args:
        main_input: name of the tokens.
        read: names of all that is read.
    """

    main_input: str
    read: frozenset[str]

    def of(self, names: Collection[str]) -> TextInputs:
        """The same where the frozen blocks read these entries."""
        return TextInputs(self.main_input, frozenset(names))


def token_mask(inputs: Any, main_input: str) -> torch.Tensor | None:
    """Where the tokens of a batch of texts are, bool `(B, W)`; None if the batch does not tell, or holds no texts.

    Args:
        inputs: a collated batch, or whatever a collator has returned.
        main_input: name of the model's main input in it.

    Shapes: B samples, W positions, padding included.
    """
    if not isinstance(inputs, Mapping):
        return None
    main, mask = inputs.get(main_input), inputs.get(MASK)
    if not isinstance(main, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return None
    if main.ndim != 2 or main.dtype not in (torch.int32, torch.int64):
        return None
    if mask.shape != main.shape or mask.is_floating_point():
        return None
    return mask != 0


def padded_sides(mask: torch.Tensor) -> set[str] | None:
    """On which sides rows are padded: none, `right`, `left`, or both; None if there is padding elsewhere.

    Args:
        mask: bool `(B, W)`, where the tokens are.
    """
    lengths = mask.sum(1, keepdim=True)
    positions = torch.arange(mask.shape[1], device=mask.device)
    at_left, at_right = mask == (positions < lengths), mask == (positions >= mask.shape[1] - lengths)
    at_left, at_right = at_left.all(1), at_right.all(1)
    if not (at_left | at_right).all():
        return None
    sides = {"right": not at_right.all(), "left": not at_left.all()}
    return {side for side, is_padded in sides.items() if is_padded}


def why_not_padded(mask: torch.Tensor, ignored: Collection[str]) -> str | None:
    """Why features of a batch of texts cannot be stored without its padding; None if they can.

    Args:
        mask: bool `(B, W)`, where the tokens are.
        ignored: sides on which padding changes nothing.

    Returns:
        The reason, as a clause.
    """
    sides = padded_sides(mask)
    if sides is None:
        return "the attention mask of a text hides positions between its tokens, so that they are not stored in a row"
    side = next((side for side in sorted(sides) if side not in ignored), None)
    if side is None:
        return None
    other = next(iter(ignored))
    return (
        f"texts are padded on the {side}, where padding changes the features of the tokens beside it: pad on the "
        f"{other} (tokenizer.padding_side = '{other}')"
    )


def take_columns(inputs: Mapping[str, Any], width: int, columns: slice | torch.Tensor) -> dict[str, Any]:
    """The same batch with some of the positions of its texts; entries without positions as they are.

    Args:
        inputs: the batch.
        width: number of its positions.
        columns: which to take.
    """

    def take(value: Any) -> Any:
        is_text = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == width
        return value[:, columns].contiguous() if is_text else value

    return {name: take(value) for name, value in inputs.items()}


def padded_pair(
    inputs: Mapping[str, Any], main_input: str, padding_token: int, side: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Its longest text twice: padded on one side, and without the padding; None if it is too short.

    Args:
        inputs: a batch whose `token_mask` is known.
        main_input: name of the model's main input in it.
        padding_token: what stands for padding in it.
        side: `right` or `left`.
    """
    mask = token_mask(inputs, main_input)
    assert mask is not None  # the caller knows
    samples, width = mask.shape
    longest = int(mask.sum(1).argmax())
    columns = mask[longest].nonzero().squeeze(1)
    padding = max(1, len(columns) // 3)
    if len(columns) <= padding:
        return None
    twice = {
        name: value[[longest, longest]] if isinstance(value, torch.Tensor) and value.shape[:1] == (samples,) else value
        for name, value in inputs.items()
    }
    whole = take_columns(twice, width, columns)
    kept = slice(0, len(columns) - padding) if side == "right" else slice(padding, len(columns))
    outside = slice(len(columns) - padding, len(columns)) if side == "right" else slice(0, padding)
    padded = {**whole, main_input: whole[main_input].clone(), MASK: whole[MASK].clone()}
    padded[main_input][:, outside] = padding_token
    padded[MASK][:, outside] = 0
    return padded, take_columns(whole, len(columns), kept)


def blank_padding(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A tensor with a value for each position of a batch of texts, 0 where there is no token; any other as it is.

    Args:
        tensor: `(B, W, ...)`, or anything else.
        mask: bool `(B, W)`, where the tokens are.
    """
    if tensor.shape[:2] != mask.shape:
        return tensor
    inside = mask.to(tensor.device).reshape(*mask.shape, *(1,) * (tensor.ndim - 2))
    return tensor.masked_fill(~inside, 0)
