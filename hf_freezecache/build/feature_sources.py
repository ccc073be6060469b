"""Where a build gets the features of ranges of samples from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..augment.maps import check_grid
from ..cache.names import TOKENS
from ..cache.padded import PaddingRule, split_padded
from ..cache.rows import BatchSplit, DrawnBatch, RowError, RowSource, split_batch
from ..cache.sized import SizedBatch, SizeRule, split_sized
from ..cache.texts import split_texts
from ..distributed import Group
from ..model.chain import BlockChain
from ..model.layout import FeatureLayout, to_positions
from ..model.stand_ins import stays_real
from ..model.tokens import why_not_padded


@dataclass(frozen=True)
class ViewRun:
    """One view of a range of samples.

    Args:
        columns: model inputs besides the main one that belong to the rows.
        constants: model inputs that are the same for every batch.
        features: `(B, *layout.shape)`; of texts those of all tokens, and of samples with sizes of their own those of
            all positions, `(N, C)`; None if they were not asked for.
        geometry: `(B, G)`, where the view looks in the base view, if it was asked for and could be told.
        refused: why it could not be told.
        mask: where the tokens of texts are that are stored without padding, as `token_mask` tells; of samples with
            sizes of their own `(B, P)`, as many positions from the left as each has; else None.

    Shapes: B samples, G values of geometry, N tokens of all texts, C channels, P most positions of a sample.
    """

    columns: dict[str, Any]
    constants: dict[str, Any]
    features: torch.Tensor | None
    geometry: torch.Tensor | None = None
    refused: str | None = None
    mask: torch.Tensor | None = None

    def need_features(self) -> torch.Tensor:
        """The features, where they were asked for.

        Raises:
            ValueError: if they were not.
        """
        if self.features is None:
            raise ValueError("the features of this view were not asked for")
        return self.features

    def samples_of(self, rows: Sequence[int]) -> Sequence[int]:
        """The sample of each of these features.

        Args:
            rows: numbers of the samples.
        """
        if self.mask is None:
            return rows
        return np.repeat(np.asarray(rows), self.mask.flatten(1).sum(1).cpu().numpy()).tolist()

    def need_geometry(self) -> torch.Tensor:
        """The geometry, where it was asked for and could be told.

        Raises:
            ValueError: if it was not, or could not.
        """
        if self.geometry is None:
            raise ValueError(f"this view has no geometry: {self.refused or 'it was not asked for'}")
        return self.geometry


class FeatureSource(Protocol):
    """Computes the features at one cut, range by range; the ranges are those of a `RowSource`."""

    def run(
        self, numbers: Sequence[int], views: int = 0, geometry: str | None = None, own_features: bool = True
    ) -> Iterator[tuple[int, list[ViewRun]]]:
        """Yields ranges in the given order, each as its number and its views, the base view first.

        Args:
            numbers: of the ranges.
            views: number of augmented views beside the base view.
            geometry: kind in which the views' geometry is returned; None for no geometry.
            own_features: whether the augmented views' features are computed.

        Raises:
            ValueError: if a feature has another size than the layout says.
        """

    def over(self, source: RowSource) -> FeatureSource:
        """The same for other ranges of the samples."""


class ImageFeatures:
    """Runs the prefix on samples.

    Args:
        chain: the model, traced and proved at `cut`.
        cut: frozen blocks.
        source: the samples.
        layout: the feature as the prefix returns it.
        model_inputs: selects the prefix's inputs from a collated batch, on the model's device.
        count_run: is told `(0, cut, samples, positions of a text)` after every run.
    """

    def __init__(
        self,
        chain: BlockChain,
        cut: int,
        source: RowSource,
        layout: FeatureLayout,
        model_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        count_run: Callable[..., None] | None = None,
    ):
        self.chain, self.cut, self.source, self.layout = chain, cut, source, layout
        self.model_inputs, self.count_run = model_inputs, count_run

    def over(self, source: RowSource) -> ImageFeatures:
        return ImageFeatures(self.chain, self.cut, source, self.layout, self.model_inputs, self.count_run)

    def run(
        self, numbers: Sequence[int], views: int = 0, geometry: str | None = None, own_features: bool = True
    ) -> Iterator[tuple[int, list[ViewRun]]]:
        kind_and_grid = None if geometry is None else (geometry, check_grid(self.layout))
        for number, batches in self.source.loader(numbers, views, kind_and_grid):
            rows = self.source.rows(number)
            runs = (self.run_view(drawn, rows, view == 0 or own_features) for view, drawn in enumerate(batches))
            yield number, list(runs)

    def run_view(self, drawn: DrawnBatch, rows: Sequence[int], own_features: bool = True) -> ViewRun:
        """A view of a range.

        Args:
            drawn: the view.
            rows: numbers of its samples.
            own_features: whether its features are computed.

        Raises:
            RowError: as `split`.
            ValueError: as `compute`.
        """
        if isinstance(drawn.batch, SizedBatch):
            return self._run_sizes(drawn.batch, rows)
        split, features = self.split(drawn.batch, rows), None
        if own_features:
            features = self.compute(self.model_inputs(drawn.batch), rows)
            features = features if split.mask is None else features[split.mask.flatten(1).to(features.device)]
        return ViewRun(split.columns, split.constants, features, drawn.geometry, drawn.refused, split.mask)

    def _run_sizes(self, batch: SizedBatch, rows: Sequence[int]) -> ViewRun:
        """Samples that have sizes of their own, each size for itself."""
        split, found = self.split(batch, rows), [torch.empty(0)] * len(rows)
        for places, part in batch.parts:
            inputs = self.model_inputs(part)
            vectors = to_positions(self.chain.prefix(inputs, self.cut))
            check_shape(vectors, self.layout, [rows[place] for place in places])
            if self.count_run is not None:
                self.count_run(0, self.cut, len(vectors), None)
            for place, own in zip(places, vectors, strict=True):
                found[place] = own
        positions = torch.tensor([len(own) for own in found])
        mask = torch.arange(int(positions.max())) < positions[:, None]
        return ViewRun({**split.columns, TOKENS: positions}, split.constants, torch.cat(found), mask=mask)

    def split(self, batch: Any, rows: Sequence[int]) -> BatchSplit:
        """A collated batch as the store holds it.

        Args:
            batch: as the collator returned it.
            rows: numbers of its samples.

        Raises:
            RowError: if it cannot be stored per row, or texts are padded where that changes their features.
        """
        split = split_samples(batch, self.chain, self.cut, self.source, self.layout)
        check_rows(len(split.main), rows)
        if split.mask is not None:
            texts = self.chain.own_trace().texts
            if split.mask[:1].numel() // max(1, split.mask.shape[-1]) != texts:
                raise RowError(f"the samples from {rows[0]} on are not {texts} texts each, as others are.")
            why_not = why_not_padded(split.mask, self.chain.padding.ignored(self.cut))
            if why_not is not None:
                raise RowError(f"among the samples from {rows[0]} on, {why_not}.")
        return split

    def compute(self, inputs: Mapping[str, Any], rows: Sequence[int]) -> torch.Tensor:
        """Runs the prefix on a batch.

        Args:
            inputs: of the prefix.
            rows: numbers of the samples.

        Returns:
            `(B, *layout.shape)`; of texts `(B, W, C)`, padding included.

        Raises:
            ValueError: if a feature has another size than the layout says.

        Shapes: B samples, W positions of a text, C channels.
        """
        features = self.chain.prefix(inputs, self.cut)
        check_shape(features, self.layout, rows)
        if self.count_run is not None:
            main = inputs[self.chain.main_input]
            self.count_run(0, self.cut, len(features), main.shape[-1] if stays_real(main) else None)
        return features


def split_samples(batch: Any, chain: BlockChain, cut: int, source: RowSource, layout: FeatureLayout) -> BatchSplit:
    """Splits a collated batch as a store of a layout holds it.

    Args:
        batch: as the collator returned it.
        chain: the model.
        cut: frozen blocks of the store.
        source: of the samples.
        layout: of the features.

    Raises:
        RowError: if it cannot be stored per row.
    """
    if isinstance(source.rule, SizeRule):
        return split_sized(batch, source.rule.of(chain.inputs_of(cut)))
    if isinstance(source.rule, PaddingRule):
        return split_padded(batch, source.rule.of(chain.inputs_of(cut)))
    if layout.is_token:
        return split_texts(batch, source.texts.of(chain.inputs_of(cut)), chain.padding.ignored(cut))
    return split_batch(batch, chain.main_input)


def one_width_only(chain: BlockChain, cut: int, source: RowSource) -> str:
    """Why samples without a common width cannot be cached at a cut, as a sentence."""
    if source.sizes:
        return (
            f"samples have several sizes, and their features at cut {cut} cannot be stored in these: "
            f"{chain.padding.why_not_trimmed(cut)}. Resize the samples to one size, or use cache='never'."
        )
    padding, main = chain.padding, chain.own_trace().probe[chain.main_input]
    why, not_trimmed = padding.why_kept(cut) or padding.why_counts(cut), padding.why_not_trimmed(cut)
    more = "" if not_trimmed is None else f", and cannot be stored as wide as the widest and trimmed: {not_trimmed}"
    what = "texts" if stays_real(main) else "samples"
    return (
        f"{what} have no common width, but the features at cut {cut} include padding ({why}){more}. Pad {what} to one "
        "length (padding='max_length'), or use cache='never'."
    )


def agree_on_padding(chain: BlockChain, cut: int, group: Group) -> bool:
    """Keeps padding at a cut on all processes where it is left out on some only: their collators may differ by now.

    Returns:
        Whether they had differed.
    """
    found = group.gather((sorted(chain.padding.ignored(cut)), chain.padding.why_kept(cut)))
    if all(sides == found[0][0] for sides, _ in found):
        return False
    chain.padding.keep(cut, next((why for _, why in found if why is not None), "texts differ between processes"))
    return True


def check_rows(count: int, rows: Sequence[int]) -> None:
    """Whether a batch has a row for each sample.

    Args:
        count: rows of the batch.
        rows: the samples' row numbers.

    Raises:
        RowError: if it has not.
    """
    if count != len(rows):
        raise RowError(
            f"the collator returned {count} rows for the {len(rows)} samples from {rows[0]} on: it drops or adds some"
        )


def check_shape(features: torch.Tensor, layout: FeatureLayout, rows: Sequence[int]) -> None:
    """Whether features are what a store of a layout holds.

    Args:
        features: of a range.
        layout: of the store.
        rows: the range's row numbers.

    Raises:
        ValueError: if they are not.
    """
    if tuple(features.shape[2 if layout.is_token else 1 :]) != layout.shape:
        raise ValueError(
            f"the feature of sample {rows[0]} and those after it has shape {tuple(features.shape[1:])} instead of "
            f"{layout.shape}: a store needs inputs of one size. {_remedy(layout)}, or use cache='never'."
        )


def _remedy(layout: FeatureLayout) -> str:
    if layout.grid is None:  # of no image
        return "Pad texts to one length (padding='max_length')"
    return "Resize the images"
