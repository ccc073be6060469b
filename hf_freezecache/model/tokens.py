"""Texts in a batch: which positions hold tokens of a sample, and which are padding.

A mask of texts is bool `(B, W)`; `(B, K, W)` where a sample is several texts, as the choices of a question are. Their
features are rows of one sample: `(B, K * W, C)`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    """Where the tokens of a batch of texts are, bool `(B, W)` or `(B, K, W)`; None if it does not tell.

    Args:
        inputs: a collated batch, or whatever a collator has returned.
        main_input: name of the model's main input in it.

    Shapes: B samples, K texts of a sample, W positions, padding included.
    """
    if not isinstance(inputs, Mapping):
        return None
    main, mask = inputs.get(main_input), inputs.get(MASK)
    if not isinstance(main, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return None
    if main.ndim not in (2, 3) or main.dtype not in (torch.int32, torch.int64):
        return None
    if mask.shape != main.shape or mask.is_floating_point():
        return None
    return mask != 0


def padded_sides(mask: torch.Tensor) -> set[str] | None:
    """On which sides rows are padded: none, `right`, `left`, or both; None if there is padding elsewhere.

    Args:
        mask: where the tokens are.
    """
    mask = mask.flatten(0, -2)
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
        mask: where the tokens are.
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


def take_columns(inputs: Mapping[str, Any], positions: Sequence[int], columns: slice | torch.Tensor) -> dict[str, Any]:
    """The same batch with some of the positions of its texts; entries without positions as they are.

    Args:
        inputs: the batch.
        positions: shape of a mask of its texts, without the samples: `(W,)` or `(K, W)`.
        columns: which of the W to take.
    """
    index = (slice(None),) * len(positions) + (columns,)

    def take(value: Any) -> Any:
        return value[index].contiguous() if _has_positions(value, positions) else value

    return {name: take(value) for name, value in inputs.items()}


def take_text(inputs: Mapping[str, Any], mask: torch.Tensor, sample: int, text: int) -> dict[str, Any]:
    """A batch of two samples that are one text of a batch, without its padding; several texts each are all this one.

    Args:
        inputs: the batch.
        mask: where its tokens are.
        sample, text: which text, of which sample.
    """
    samples, *positions = mask.shape

    def take(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape[:1] != (samples,):
            return value
        rows = value[[sample, sample]]
        if len(positions) > 1 and _has_positions(value, positions):
            return rows[:, [text] * positions[0]]
        return rows

    tokens = mask[sample].reshape(-1, positions[-1])[text]
    return take_columns({name: take(value) for name, value in inputs.items()}, positions, tokens)


def _has_positions(value: Any, positions: Sequence[int]) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape[1 : 1 + len(positions)]) == tuple(positions)


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
    texts = mask[0].numel() // mask.shape[-1]
    longest = int(mask.sum(-1).argmax())
    whole = take_text(inputs, mask, *divmod(longest, texts))
    positions = whole[main_input].shape[1:]
    width = positions[-1]
    padding = max(1, width // 3)
    if width <= padding:
        return None
    kept = slice(0, width - padding) if side == "right" else slice(padding, width)
    outside = slice(width - padding, width) if side == "right" else slice(0, padding)
    padded = {**whole, main_input: whole[main_input].clone(), MASK: whole[MASK].clone()}
    padded[main_input][..., outside] = padding_token
    padded[MASK][..., outside] = 0
    return padded, take_columns(whole, positions, kept)


def blank_padding(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A tensor with a value for each position of a batch of texts, 0 where there is no token; any other as it is.

    Args:
        tensor: `(B, W, ...)`, of several texts also `(B * K, W, ...)` and `(B, K * W, ...)`; or anything else.
        mask: where the tokens are.
    """
    for inside in (mask, mask.flatten(0, -2), mask.flatten(1)):
        if tensor.shape[: inside.ndim] == inside.shape:
            unsqueezed = inside.to(tensor.device).reshape(*inside.shape, *(1,) * (tensor.ndim - inside.ndim))
            return tensor.masked_fill(~unsqueezed, 0)
    return tensor
