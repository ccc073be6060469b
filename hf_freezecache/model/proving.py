"""The proof of a cut: prefix and suffix give what the whole model gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ..distributed import Announcer
from ..rng import RngState, preserve_rng
from .errors import ChainError, PaddingError
from .modes import eval_mode
from .neutral import neutral_settings
from .probes import take_rows
from .record import answers_of
from .rounding import relative_difference
from .stand_ins import StandIn
from .structure import Path
from .tokens import blank_padding, take_text, token_mask, why_not_padded

if TYPE_CHECKING:
    from .chain import BlockChain

logger = logging.get_logger(__name__)

#: Most rows on which a cut is proved.
_ROWS = 4


def prove(chain: BlockChain, inputs: Mapping[str, Any], cut: int) -> None:
    """Proves a cut on a few rows; features of texts include padding from then on if they must.

    Args:
        chain: the model, traced.
        inputs: a batch.
        cut: from 1 on.

    Raises:
        ChainError: see `prove_cut`.
    """
    samples = len(inputs[chain.main_input])
    # Not the rows of the trace, if there are others; the first ones, if a sample among these is NaN.
    last = take_rows(inputs, slice(-min(samples, _ROWS), None), samples)
    main = last[chain.main_input]
    is_proof = not main.is_floating_point() or bool(main.isfinite().all())
    rows = last if is_proof else take_rows(inputs, slice(2), samples)
    if chain.padding.ignored(cut):
        try:
            prove_cut(chain, rows, cut)
            return
        except PaddingError as error:
            chain.padding.keep(cut, str(error))
            chain.trace_if_new(inputs, cut)
    prove_cut(chain, rows, cut)


def prove_cut(chain: BlockChain, inputs: Mapping[str, Any], cut: int) -> None:
    """Checks that prefix and suffix reproduce the model's loss and logits, bit for bit.

    Args:
        chain: the model, traced.
        inputs: a small batch, with labels where the loss is to be compared.
        cut: from 1 on.

    Raises:
        PaddingError: if they do not where the features of texts lack padding.
        ChainError: if they do not, or if in training the feature depends on random numbers or on the batch.
    """
    model, cannot = chain.model, chain.cannot_cut(cut)
    mask = _mask_of(chain, inputs, cut)
    with preserve_rng(), torch.no_grad(), eval_mode(model):
        expected = _blank(answers_of(model(**inputs)), mask)
        captured = chain.capture(inputs, cut)
        features = captured if mask is None else blank_padding(captured, mask)
        if features.isnan().any() or any(tensor.isnan().any() for tensor in expected.values()):
            raise ChainError(
                f"{cannot} features or logits are NaN, which proves nothing: the weights have diverged (lower the "
                "learning rate?), or the samples are NaN."
            )
        _check_company(chain, inputs, cut, features, mask)
        generators = RngState()
        try:
            in_training = chain.captured_in_training(inputs, cut)
        except Exception as error:  # the model's own code may raise anything
            raise ChainError(
                f"{cannot} in train mode the model fails on a probe batch with {type(error).__name__}: {error}"
            ) from error
        if not generators.is_current():
            raise ChainError(
                f"{cannot} what runs before it draws random numbers in eval mode too, so that what comes behind it "
                "would get others when it is left out."
            )
        if not torch.equal(features, in_training if mask is None else blank_padding(in_training, mask)):
            raise ChainError(
                f"{cannot} in training the feature is random or depends on the batch, though everything before the "
                "cut is in eval mode."
            )
        try:
            replayed = _blank(answers_of(chain.suffix(features, inputs, cut)), mask)
        except Exception as error:  # the model's own code may raise anything
            raise ChainError(
                f"{cannot} running the rest on the feature failed with {type(error).__name__}: {error}"
            ) from error
        stand_in = next((tensor for tensor in replayed.values() if isinstance(tensor, StandIn)), None)
        if stand_in is not None:
            raise ChainError(
                f"{cannot} what the model returns depends on {stand_in.stands_for}, which crosses it beside the "
                "feature (a skip connection, an input-dependent side channel)."
            )
        if _are_equal(expected, replayed):
            return
        # An accelerator's kernels may differ from run to run. Only then are close answers accepted.
        reproducible = _are_equal(expected, _blank(answers_of(model(**inputs)), mask))
    if reproducible or not are_close(expected, replayed):
        if mask is not None and not mask.all():
            raise PaddingError(f"{type(model).__name__} reads what is at padding behind the cut")
        raise ChainError(
            f"{cannot} the logits differ by up to {_largest_difference(expected, replayed):.3g}: something besides "
            "the feature crosses it (a skip connection, an input-dependent side channel)."
        )


def is_neutral(chain: BlockChain, inputs: Mapping[str, Any], cut: int) -> bool:
    """Whether the feature at a cut is the same, bit for bit, under `neutral_settings`.

    Frozen blocks run in eval mode, in builds and in training (see `prove_cut`), where dropout is the identity; but a
    module of the user's may read a probability, or the number of classes, whatever its mode. Then this is false. Two
    models for which it is true, and which do not differ under these settings, have the same features of these inputs:
    those that both have there. A value that counts for other inputs alone is left to the proof of reuse, which
    computes rows all over a store again.

    Args:
        chain: the model, proved at `cut`.
        inputs: a small batch.
        cut: from 1 on.
    """
    with preserve_rng():
        expected = chain.prefix(inputs, cut)
        try:
            with neutral_settings(chain.model):
                found = chain.prefix(inputs, cut)
        except Exception as error:  # the model's own code may raise anything
            Announcer.survived(logger, "The frozen blocks do not run without dropout and with two classes", error)
            return False
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return False
        if torch.equal(found, expected):
            return True
        # An accelerator's kernels may differ from run to run. Only then are close features accepted.
        is_reproducible = torch.equal(chain.prefix(inputs, cut), expected)
    tolerance = chain.own_trace().tolerance(expected.dtype, expected.device)
    return not is_reproducible and relative_difference(found, expected) <= tolerance


def answers_by_position(chain: BlockChain, inputs: Mapping[str, Any]) -> bool:
    """Whether the model answers with something for each position of the texts of a batch."""
    mask = token_mask(inputs, chain.main_input)
    if mask is None:
        return False
    with preserve_rng(), torch.no_grad(), eval_mode(chain.model):
        return any(tensor.shape[:2] == mask.shape for tensor in answers_of(chain.model(**inputs)).values())


def _mask_of(chain: BlockChain, inputs: Mapping[str, Any], cut: int) -> torch.Tensor | None:
    """Where the tokens are, if a store leaves out what is none."""
    ignored = chain.padding.ignored(cut)
    mask = token_mask(inputs, chain.main_input) if ignored else None
    if mask is None:
        return None
    why_not = why_not_padded(mask, ignored)
    if why_not is not None:
        raise PaddingError(why_not)
    return mask


def _blank(answers: dict[Path, torch.Tensor], mask: torch.Tensor | None) -> dict[Path, torch.Tensor]:
    """Answers without what they are at padding, where nothing is stored."""
    if mask is None:
        return answers
    return {
        path: tensor if isinstance(tensor, StandIn) else blank_padding(tensor, mask)
        for path, tensor in answers.items()
    }


def _check_company(
    chain: BlockChain, inputs: Mapping[str, Any], cut: int, features: torch.Tensor, mask: torch.Tensor | None
) -> None:
    """Checks that the feature of a sample is its own: that it is what a batch of this sample alone, twice, gives.

    That of a text is what it gives without padding.
    """
    samples = len(features)
    difference = 0.0
    for row in {0, samples - 1}:
        if mask is None:
            own = chain.capture(take_rows(inputs, [row, row], samples), cut)[:1]
            difference = max(difference, relative_difference(features[row : row + 1], own))
            continue
        texts = mask[row].reshape(-1, mask.shape[-1])
        for number, (tokens, text) in enumerate(zip(texts, features[row].unflatten(0, texts.shape), strict=True)):
            own = chain.capture(take_text(inputs, mask, row, number), cut)[0, : tokens.sum()]
            difference = max(difference, relative_difference(text[tokens], own))  # each token by itself
    if difference > chain.own_trace().tolerance(features.dtype, features.device):
        if mask is not None and not mask.all():
            raise PaddingError("padding changes the features of the tokens beside it")
        raise ChainError(
            f"{chain.cannot_cut(cut)} what crosses it is not one row for each sample: the row of a sample differs by "
            f"{100 * difference:.2g} % from what the sample gives without others, so that a store would mix samples "
            "up (the model reorders its batch, or computes over it)."
        )


def _are_equal(first: Mapping[Path, torch.Tensor], second: Mapping[Path, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[path], second[path]) for path in first)


def are_close(first: Mapping[Path, torch.Tensor], second: Mapping[Path, torch.Tensor]) -> bool:
    """Whether two answers of a model are the same but for rounding."""
    return first.keys() == second.keys() and all(
        first[path].shape == second[path].shape and torch.allclose(first[path], second[path], rtol=1e-3, atol=1e-4)
        for path in first
    )


def _largest_difference(first: Mapping[Path, torch.Tensor], second: Mapping[Path, torch.Tensor]) -> float:
    return max(
        (
            (first[path].double() - second[path].double()).abs().max().item()
            for path in first.keys() & second.keys()
            if first[path].shape == second[path].shape and first[path].numel()
        ),
        default=float("inf"),
    )
