"""Sensitive channels: those that do not follow the augmentation, so that they must be stored for every view.

For each channel, the true feature of an augmented view is compared with the feature of the base view, warped by the
view's geometry. The sensitive channels are those with the lowest similarity (similarity-aware channel augmentation,
arXiv 2508.15033). The others can be warped on replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from ..model.layout import FeatureLayout
from .channel_map import ChannelMapFit, denormalized
from .geometry import is_mirrored, warp
from .maps import check_grid, to_maps

Similarity = Literal["ssim", "cosine"]
SIMILARITIES = get_args(Similarity)
#: Name of the file in a store that holds the measured similarities, without `.safetensors`.
SENSITIVITY = "sensitivity"

# SSIM expects values from 0 to this one. Normalized features are shifted so that a channel's mean is in the middle.
_DATA_RANGE = 6.0
# Mean square, in squared standard deviations, below which a feature map counts as zero for the cosine.
_COSINE_FLOOR = 1e-6
# Number of values that are compared at once. It bounds the memory (SSIM needs about fifteen times as much), and
# processor caches can hold this many.
CHUNK = 1 << 18
_PREVIEW_CHANNELS = 6


@dataclass(frozen=True)
class Sensitivity:
    """How well each channel follows the augmentation.

    Args:
        similarity: float32 `(C,)` in [-1, 1], mean over samples; 1: the warped base feature equals the view's feature.
        outside: float32 `(C,)`, mean of the true features at positions that show nothing of the base view; the mean of
            the channel if there was no such position.
        outside_share: share of the views' positions that show nothing of their base view.
        samples: number of views that were compared.
        previews: feature maps to look at: `sample_ids` int64 `(n,)`; `channels` int64 `(k,)`, from the least to the
            most similar one in equal steps; `base`, `view` and `warped`, float32 `(n, k, h, w)`. `warped` is NaN where
            the view shows nothing of its base view.

    Shapes: C channels, n samples, k channels of the previews, (h, w) the feature grid.
    """

    similarity: Tensor
    outside: Tensor
    outside_share: float
    samples: int
    previews: dict[str, Tensor]

    def choose(self, count: int) -> Tensor:
        """The `count` least similar channels, int64, ascending. Of equally similar channels the first are chosen.

        Raises:
            ValueError: if there are fewer channels.
        """
        if not 0 <= count <= len(self.similarity):
            raise ValueError(f"cannot choose {count} of {len(self.similarity)} channels")
        return self.ranking()[:count].sort().values

    def ranking(self) -> Tensor:
        """All channels, int64 `(C,)`, from the least to the most similar; equally similar ones in their order."""
        return self.similarity.argsort(stable=True)

    def tensors(self) -> dict[str, Tensor]:
        """All fields as tensors by name, for a safetensors file."""
        return {
            "similarity": self.similarity,
            "outside": self.outside,
            "outside_share": torch.tensor(self.outside_share),
            "samples": torch.tensor(self.samples),
            **{f"previews.{name}": value for name, value in self.previews.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sensitivity:
        """Restores the fields that `tensors` returned.

        Raises:
            KeyError: if a tensor is missing.
        """
        previews = {name: tensors[f"previews.{name}"] for name in ("sample_ids", "channels", "base", "view", "warped")}
        share, samples = float(tensors["outside_share"]), int(tensors["samples"])
        return cls(tensors["similarity"], tensors["outside"], share, samples, previews)


class SensitivityMeter:
    """Measures, over batches, how similar warped base features are to the true features of augmented views.

    Every channel is normalized by its mean and standard deviation in the base features of the first batch, so that a
    few channels with large values do not dominate. A channel that is constant there is only shifted by its mean.

    Args:
        layout: layout of the features; it must have a grid.
        similarity: "ssim": similarity of windows in mean, contrast and structure, averaged over a feature map;
            "cosine": cosine of whole feature maps after the channel's mean is subtracted. For feature maps with a
            single position, which have no structure, "ssim" is the cosine too.
        previews: number of samples of which some channels are saved to look at.

    Raises:
        ValueError: if the layout has no grid or the similarity is unknown.
    """

    def __init__(self, layout: FeatureLayout, similarity: str = "ssim", previews: int = 4):
        self._grid = check_grid(layout)
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity is one of {', '.join(SIMILARITIES)}, got {similarity!r}")
        self.layout, self.similarity, self.previews = layout, similarity, previews
        self._statistics: tuple[Tensor, Tensor] | None = None
        self._samples = self._outside_count = self._positions = 0
        self._scores = torch.zeros(layout.channels, dtype=torch.float64)
        self._outside = torch.zeros(layout.channels, dtype=torch.float64)
        # Number of a sample, and its base, view and warped maps.
        self._preview_rows: list[tuple[int, tuple[Tensor, ...]]] = []
        self._channel_map_fit = ChannelMapFit(layout.channels, self._grid)
        self._low, self._high = torch.full((2, layout.channels), torch.inf) * torch.tensor([[1.0], [-1.0]])

    @torch.no_grad()
    def update(self, base: Tensor, view: Tensor, sources: Tensor, sample_ids: Sequence[int]) -> None:
        """Compares a batch. A view that shows nothing of its base view counts only for `outside`.

        Args:
            base: features of the base views, `(B, *layout.shape)`.
            view: features of one augmented view of each, of the same shape.
            sources: geometry of the views, `(B, h, w, 2)`, from `decode_geometry`.
            sample_ids: numbers of the samples.

        Raises:
            ValueError: if a shape does not fit, or a feature is not finite; the message names the sample.

        Shapes: B samples, (h, w) the layout's grid.
        """
        base_maps, view_maps = to_maps(base, self.layout), to_maps(view, self.layout)
        grid = (*self._grid, 2)
        if not len(base) == len(view) == len(sources) == len(sample_ids) or sources.shape[1:] != grid:
            raise ValueError(
                f"expected as many base features, views, sources {grid} and sample ids, got {len(base)}, {len(view)}, "
                f"{tuple(sources.shape)} and {len(sample_ids)}"
            )
        if len(base) == 0:
            return
        rows = max(1, CHUNK // base_maps[0].numel())
        bounds = [*range(0, len(base), rows), len(base)]
        if self._statistics is None:
            self._statistics = _mean_and_deviation(base_maps.split(rows))
        for first, last in pairwise(bounds):
            part = slice(first, last)
            self._add(_as_float(base_maps[part]), _as_float(view_maps[part]), sources[part], sample_ids[part])

    def result(self) -> Sensitivity:
        """The result of all batches so far.

        Raises:
            ValueError: if no view shows anything of its base view.
        """
        if self._samples == 0:
            raise ValueError(
                "none of the views compared shows anything of its base view, so no channel can follow: "
                "check the geometric transforms of the train pipeline."
            )
        mean, deviation = (values.cpu() for values in self._normalization)
        similarity = (self._scores / self._samples).float()
        outside = mean + deviation * (self._outside / max(1, self._outside_count)).float()
        return Sensitivity(similarity, outside, self.outside_share, self._samples, self._previews_of(similarity))

    @property
    def outside_share(self) -> float:
        """Share of the views' positions so far that show nothing of their base view."""
        return self._outside_count / max(1, self._positions)

    def channel_maps(self, sensitive: Tensor) -> tuple[Tensor, Tensor] | None:
        """Fits the maps that compute the channels of a view from warped and sensitive channels.

        Args:
            sensitive: int64 `(K,)`, the channels that are stored for every view.

        Returns:
            Channel maps, float32 `(2, N * C + K + 1, C)`, and limits, float32 `(2, C)`, for `apply_channel_map`; None
            if warping alone is as good, or there was too little data.

        Shapes: C channels, K of them sensitive, N neighbouring positions.
        """
        maps = self._channel_map_fit.solve(sensitive)
        if maps is None:
            return None
        mean, deviation = (values.cpu() for values in self._normalization)
        return denormalized(maps, sensitive, mean, deviation), torch.stack([self._low, self._high])

    @property
    def _normalization(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every channel, `(C,)` each, in the first batch."""
        if self._statistics is None:
            raise RuntimeError("nothing was compared yet: call `update` first")
        return self._statistics

    def _add(self, base: Tensor, view: Tensor, sources: Tensor, sample_ids: Sequence[int]) -> None:
        for maps in (base, view):
            finite = maps.flatten(1).isfinite().all(1)
            if not finite.all():
                sample = sample_ids[int(finite.logical_not().nonzero()[0])]
                raise ValueError(f"feature of sample {sample} is not finite (NaN or inf)")
        # The positions that a replay fills with `outside`, and only these, are not compared.
        outside = warp(base.new_zeros(len(base), 1, *self._grid), sources, base.new_ones(1))[:, 0] > 0
        inside = outside.logical_not()
        warped = warp(base, sources)
        rows = inside.flatten(1).any(1).nonzero().flatten()
        true, predicted = self._normalize(view), self._normalize(warped)
        self._channel_map_fit.update(predicted, true, inside, is_mirrored(sources))
        low, high = (values.cpu() for values in view.movedim(1, 0).flatten(1).aminmax(dim=1))
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._outside += (true * outside.unsqueeze(1)).sum((0, 2, 3)).cpu().double()
        self._outside_count += int(outside.sum())
        self._positions += outside.numel()
        if len(rows):
            scores = channel_similarity(true[rows], predicted[rows], inside[rows], self.similarity)
            self._scores += scores.sum(0).cpu().double()
            self._samples += len(rows)
        for row in rows[: self.previews - len(self._preview_rows)].tolist():
            shown = warped[row].masked_fill(outside[row], torch.nan)
            # `cpu` does not copy a tensor that is on the CPU already, and the memory may be the caller's.
            copies = tuple(part.detach().cpu().clone() for part in (base[row], view[row], shown))
            self._preview_rows.append((int(sample_ids[row]), copies))

    def _normalize(self, maps: Tensor) -> Tensor:
        mean, deviation = self._normalization
        return (maps - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)

    def _previews_of(self, similarity: Tensor) -> dict[str, Tensor]:
        count = min(_PREVIEW_CHANNELS, len(similarity))
        ranks = torch.linspace(0, len(similarity) - 1, count).round().long()
        channels = similarity.argsort(stable=True)[ranks]
        previews = {"sample_ids": torch.tensor([sample for sample, _ in self._preview_rows], dtype=torch.int64)}
        previews["channels"] = channels
        for place, name in enumerate(("base", "view", "warped")):
            maps = [copies[place][channels] for _, copies in self._preview_rows]
            previews[name] = torch.stack(maps) if maps else torch.zeros(0, count, *self._grid)
        return previews


def _mean_and_deviation(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, float32 `(C,)` each, of feature maps `(B, C, h, w)`."""
    values = sum(part.shape[0] * part.shape[2] * part.shape[3] for part in parts)
    zeros = torch.zeros(parts[0].shape[1], device=parts[0].device)
    mean = sum((_as_float(part).sum((0, 2, 3)) for part in parts), start=zeros) / values
    squares = ((_as_float(part) - mean.view(-1, 1, 1)).square().sum((0, 2, 3)) for part in parts)
    deviation = (sum(squares, start=zeros) / values).sqrt()
    # The deviation of a constant channel is only the rounding of its mean: it must not be a divisor.
    constant = deviation <= 1e-6 * mean.abs()
    return mean, deviation.masked_fill(constant, 1.0)


def _as_float(maps: Tensor) -> Tensor:
    # Always contiguous: the rounding of a sum depends on the memory order, and tokens and maps must give equal bits.
    return maps.to(torch.float32).contiguous()


def channel_similarity(true: Tensor, warped: Tensor, valid: Tensor, method: str) -> Tensor:
    """Similarity of two feature maps for each sample and channel, over the valid positions.

    Args:
        true: normalized features of a view, float32 `(B, C, h, w)`.
        warped: warped normalized features of its base view, of the same shape.
        valid: bool `(B, h, w)`, true for at least one position of every sample.
        method: one of `SIMILARITIES`; for feature maps with a single position, both give the cosine.

    Returns:
        float32 `(B, C)` in [-1, 1]; 1, up to rounding, for equal feature maps, also constant ones.

    Shapes: B samples, C channels, (h, w) the feature grid.
    """
    valid = valid.unsqueeze(1)
    count = valid.sum((2, 3))
    if method == "ssim" and true.shape[2:] != (1, 1):
        # Windows reach beyond the valid positions; there both feature maps are made equal.
        image = _ssim(torch.where(valid, true, warped), warped)
        return (image * valid).sum((2, 3)) / count
    true, warped = true.masked_fill(~valid, 0), warped.masked_fill(~valid, 0)
    product = (true * warped).sum((2, 3)) / count
    first, second = (maps.square().sum((2, 3)) / count for maps in (true, warped))
    cosine = (product + _COSINE_FLOOR) / ((first + _COSINE_FLOOR) * (second + _COSINE_FLOOR)).sqrt()
    return cosine.clamp(-1, 1)


def _ssim(one: Tensor, other: Tensor) -> Tensor:
    # The import of torchmetrics takes seconds, and most trainings never need it.
    from torchmetrics.functional.image import structural_similarity_index_measure

    # Around 0, feature maps of opposite signs would be similar: the factors of mean and structure are both negative.
    middle = _DATA_RANGE / 2
    # The image has the size of the feature maps: torchmetrics pads by reflection and crops nothing.
    _, image = structural_similarity_index_measure(
        one + middle,
        other + middle,
        gaussian_kernel=True,
        sigma=[_sigma(side) for side in one.shape[2:]],
        data_range=_DATA_RANGE,
        return_full_image=True,
    )
    # Rounding can make a covariance larger than the variances.
    return image.clamp(-1, 1)


def _sigma(side: int) -> float:
    """Standard deviation of the Gaussian window of SSIM along one side of a feature map.

    torchmetrics uses a window of `2 * int(3.5 * sigma + 0.5) + 1` positions and pads by reflection, for which half a
    window must be shorter than the side. The window has 11 positions, the usual number, or as many as fit. A side of
    two positions gets a window of 3, because a window of 1 has no contrast. A side of one position gets a window of 1.
    """
    if side == 1:
        return 0.1
    return min(1.5, max(1, (side - 1) // 2) / 3.5)
