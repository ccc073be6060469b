"""Which channels do not follow the augmentation: they must be stored for every view, the others can be warped.

Per channel, the true feature of an augmented view is compared with the base view's feature, warped by the view's
geometry. Channels of the least similarity are the sensitive ones (similarity-aware channel augmentation,
arXiv 2508.15033).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..model.layout import FeatureLayout
from .channel_map import ChannelMapFit, denormalized
from .geometry import is_mirrored, warp
from .maps import check_grid, to_maps

SIMILARITIES = ("ssim", "cosine")
#: Name of the file in a store that keeps what was measured, without `.safetensors`.
SENSITIVITY = "sensitivity"

# SSIM is made for pictures from 0 to a highest value: here 6 deviations, with the channel's mean in the middle.
_DATA_RANGE = 6.0
# Mean square, in squared deviations, below which a map counts as zero for the cosine.
_COSINE_FLOOR = 1e-6
# Values compared at once: bounds the memory, of which SSIM needs about fifteen times as much; caches hold this many.
CHUNK = 1 << 18
_PREVIEW_CHANNELS = 6


@dataclass(frozen=True)
class Sensitivity:
    """How well the channels follow the augmentation.

    Args:
        similarity: float32 `(C,)`, mean over samples, in [-1, 1]; 1: warping the base feature gives the view's.
        outside: float32 `(C,)`, mean of the true features where a view shows nothing of its base view; the channel's
            mean if there was no such position.
        outside_share: share of the views' positions that show nothing of their base view.
        samples: number of views compared.
        previews: for a picture: `sample_ids` int64 `(n,)`; `channels` int64 `(k,)`, from the least to the most
            similar, at equal distances in that order; `base`, `view` and `warped`, float32 `(n, k, h, w)`, the last
            NaN where the view shows nothing of its base view.

    Shapes: C channels, n samples, k channels of the previews, (h, w) the feature grid.
    """

    similarity: Tensor
    outside: Tensor
    outside_share: float
    samples: int
    previews: dict[str, Tensor]

    def choose(self, count: int) -> Tensor:
        """The `count` least similar channels: int64, ascending. Of equal channels the first are taken.

        Raises:
            ValueError: if there are not that many channels.
        """
        if not 0 <= count <= len(self.similarity):
            raise ValueError(f"cannot choose {count} of {len(self.similarity)} channels")
        return self.ranking()[:count].sort().values

    def ranking(self) -> Tensor:
        """The channels, int64 `(C,)`, from the least to the most similar; of equal ones the first comes first."""
        return self.similarity.argsort(stable=True)

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by flat names, for a safetensors file."""
        return {
            "similarity": self.similarity,
            "outside": self.outside,
            "outside_share": torch.tensor(self.outside_share),
            "samples": torch.tensor(self.samples),
            **{f"previews.{name}": value for name, value in self.previews.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Sensitivity:
        """Restores what `tensors` returned.

        Raises:
            KeyError: if a tensor is missing.
        """
        previews = {name: tensors[f"previews.{name}"] for name in ("sample_ids", "channels", "base", "view", "warped")}
        share, samples = float(tensors["outside_share"]), int(tensors["samples"])
        return cls(tensors["similarity"], tensors["outside"], share, samples, previews)


class SensitivityMeter:
    """Accumulates, over batches, how well warped base features follow the true features of augmented views.

    Every channel is normalized by its mean and deviation over the first batch's base features, so that a few channels
    of large values do not decide. A channel that is constant there is only shifted by its mean.

    Args:
        layout: of the features; it has a grid.
        similarity: "ssim": the mean over a map of how alike its windows are in mean, contrast and structure;
            "cosine": of whole maps, after the channel's mean is taken away. A map of a single position has no
            structure: its "ssim" is the cosine.
        previews: number of samples of which some channels are kept for a picture.

    Raises:
        ValueError: if the layout has no grid or the similarity is unknown.
    """

    def __init__(self, layout: FeatureLayout, similarity: str = "ssim", previews: int = 4):
        check_grid(layout)
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity is one of {', '.join(SIMILARITIES)}, got {similarity!r}")
        self.layout, self.similarity, self.previews = layout, similarity, previews
        self._mean: Tensor | None = None
        self._deviation: Tensor | None = None
        self._samples = self._outside_count = self._positions = 0
        self._scores = torch.zeros(layout.channels, dtype=torch.float64)
        self._outside = torch.zeros(layout.channels, dtype=torch.float64)
        self._kept: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._fit_of_maps = ChannelMapFit(layout.channels, layout.grid)
        self._low, self._high = torch.full((2, layout.channels), torch.inf) * torch.tensor([[1.0], [-1.0]])

    @torch.no_grad()
    def update(self, base: Tensor, view: Tensor, sources: Tensor, sample_ids: Sequence[int]) -> None:
        """Compares a batch. Views that show nothing of their base view count only for what lies outside.

        Args:
            base: features of the base views, `(B, *layout.shape)`.
            view: features of one augmented view of each, of the same shape.
            sources: the views' geometry, `(B, h, w, 2)`, from `geometry.decode_geometry`.
            sample_ids: numbers of the B samples.

        Raises:
            ValueError: if a shape does not fit or a feature is not finite (the sample is named).

        Shapes: B samples, (h, w) the layout's grid.
        """
        base_maps, view_maps = to_maps(base, self.layout), to_maps(view, self.layout)
        grid = (*self.layout.grid, 2)
        if not len(base) == len(view) == len(sources) == len(sample_ids) or sources.shape[1:] != grid:
            raise ValueError(
                f"expected as many base features, views, sources {grid} and sample ids, got {len(base)}, {len(view)}, "
                f"{tuple(sources.shape)} and {len(sample_ids)}"
            )
        if len(base) == 0:
            return
        rows = max(1, CHUNK // base_maps[0].numel())
        bounds = [*range(0, len(base), rows), len(base)]
        if self._mean is None:
            self._fit(base_maps.split(rows))
        for first, last in pairwise(bounds):
            part = slice(first, last)
            self._add(_as_float(base_maps[part]), _as_float(view_maps[part]), sources[part], sample_ids[part])

    def result(self) -> Sensitivity:
        """What has been accumulated so far.

        Raises:
            ValueError: if no view shows anything of its base view.
        """
        if self._samples == 0:
            raise ValueError(
                "none of the views compared shows anything of its base view, so no channel can follow: "
                "check the geometric transforms of the train pipeline."
            )
        mean, deviation = self._mean.cpu(), self._deviation.cpu()
        similarity = (self._scores / self._samples).float()
        outside = mean + deviation * (self._outside / max(1, self._outside_count)).float()
        return Sensitivity(similarity, outside, self.outside_share, self._samples, self._previews_of(similarity))

    @property
    def outside_share(self) -> float:
        """Share of the positions so far that show nothing of their base view."""
        return self._outside_count / max(1, self._positions)

    def channel_maps(self, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        """How the channels of a view follow from the warped ones of its base view and those that are kept of it.

        Args:
            kept: int64 `(K,)`.

        Returns:
            Maps float32 `(2, N * C + K + 1, C)` and limits `(2, C)` for `apply_channel_map`; None if warping alone is
            as good, or too little was seen.
        """
        maps = self._fit_of_maps.solve(kept)
        if maps is None:
            return None
        limits = torch.stack([self._low, self._high])
        return denormalized(maps, kept, self._mean.cpu(), self._deviation.cpu()), limits

    def _fit(self, parts: Sequence[Tensor]) -> None:
        values = sum(part.shape[0] * part.shape[2] * part.shape[3] for part in parts)
        total = sum(_as_float(part).sum((0, 2, 3)) for part in parts)
        mean = total / values
        squares = sum((_as_float(part) - mean.view(-1, 1, 1)).square().sum((0, 2, 3)) for part in parts)
        deviation = (squares / values).sqrt()
        # What is left of a constant channel is the rounding of its mean: nothing to divide by.
        constant = deviation <= 1e-6 * mean.abs()
        self._mean, self._deviation = mean, deviation.masked_fill(constant, 1.0)

    def _add(self, base: Tensor, view: Tensor, sources: Tensor, sample_ids: Sequence[int]) -> None:
        for maps in (base, view):
            finite = maps.flatten(1).isfinite().all(1)
            if not finite.all():
                sample = sample_ids[int(finite.logical_not().nonzero()[0])]
                raise ValueError(f"feature of sample {sample} is not finite (NaN or inf)")
        # Exactly the positions that a replay fills with the channel's value are not compared.
        outside = warp(base.new_zeros(len(base), 1, *self.layout.grid), sources, base.new_ones(1))[:, 0] > 0
        inside = outside.logical_not()
        warped = warp(base, sources)
        rows = inside.flatten(1).any(1).nonzero().flatten()
        true, followed = self._normalize(view), self._normalize(warped)
        self._fit_of_maps.update(followed, true, inside, is_mirrored(sources))
        low, high = (values.cpu() for values in view.movedim(1, 0).flatten(1).aminmax(dim=1))
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._outside += (true * outside.unsqueeze(1)).sum((0, 2, 3)).cpu().double()
        self._outside_count += int(outside.sum())
        self._positions += outside.numel()
        if len(rows):
            scores = channel_similarity(true[rows], followed[rows], inside[rows], self.similarity)
            self._scores += scores.sum(0).cpu().double()
            self._samples += len(rows)
        for row in rows[: self.previews - len(self._kept)].tolist():
            missing = warped[row].masked_fill(outside[row], torch.nan)
            # `cpu` does not copy what is there already, and the maps may be the caller's own memory.
            maps = (part.detach().cpu().clone() for part in (base[row], view[row], missing))
            self._kept.append((int(sample_ids[row]), *maps))

    def _normalize(self, maps: Tensor) -> Tensor:
        return (maps - self._mean.view(-1, 1, 1)) / self._deviation.view(-1, 1, 1)

    def _previews_of(self, similarity: Tensor) -> dict[str, Tensor]:
        count = min(_PREVIEW_CHANNELS, len(similarity))
        ranks = torch.linspace(0, len(similarity) - 1, count).round().long()
        channels = similarity.argsort(stable=True)[ranks]
        previews = {"sample_ids": torch.tensor([kept[0] for kept in self._kept], dtype=torch.int64)}
        previews["channels"] = channels
        for place, name in enumerate(("base", "view", "warped"), start=1):
            maps = [kept[place][channels] for kept in self._kept]
            previews[name] = torch.stack(maps) if maps else torch.zeros(0, count, *self.layout.grid)
        return previews


def _as_float(maps: Tensor) -> Tensor:
    # In one memory order, in which sums are rounded: tokens and maps then give the same bits.
    return maps.to(torch.float32).contiguous()


def channel_similarity(true: Tensor, warped: Tensor, valid: Tensor, method: str) -> Tensor:
    """How alike two maps are, per sample and channel, over the valid positions alone.

    Args:
        true: normalized features of a view, float32 `(B, C, h, w)`.
        warped: normalized features of its base view, warped, of the same shape.
        valid: bool `(B, h, w)`, at least one position of every sample.
        method: one of `SIMILARITIES`; a map of a single position has the cosine by any.

    Returns:
        float32 `(B, C)` in [-1, 1]; 1, but for rounding, for equal maps, constant ones included.

    Shapes: B samples, C channels, (h, w) feature grid.
    """
    valid = valid.unsqueeze(1)
    count = valid.sum((2, 3))
    if method == "ssim" and true.shape[2:] != (1, 1):
        # Windows reach beyond the valid part; there both maps shall show the same.
        image = _ssim(torch.where(valid, true, warped), warped)
        return (image * valid).sum((2, 3)) / count
    true, warped = true.masked_fill(~valid, 0), warped.masked_fill(~valid, 0)
    product = (true * warped).sum((2, 3)) / count
    first, second = (maps.square().sum((2, 3)) / count for maps in (true, warped))
    cosine = (product + _COSINE_FLOOR) / ((first + _COSINE_FLOOR) * (second + _COSINE_FLOOR)).sqrt()
    return cosine.clamp(-1, 1)


def _ssim(one: Tensor, other: Tensor) -> Tensor:
    # torchmetrics takes seconds to import, most trainings never need it.
    from torchmetrics.functional.image import structural_similarity_index_measure

    # Around 0, maps of opposite signs would be alike: their means' factor is negative, as is that of their structure.
    middle = _DATA_RANGE / 2
    # The image is of the maps' size: torchmetrics pads by reflection and crops nothing.
    _, image = structural_similarity_index_measure(
        one + middle,
        other + middle,
        gaussian_kernel=True,
        sigma=[_sigma(side) for side in one.shape[2:]],
        data_range=_DATA_RANGE,
        return_full_image=True,
    )
    # Rounding can leave a covariance larger than the variances.
    return image.clamp(-1, 1)


def _sigma(side: int) -> float:
    """Deviation of the Gaussian window along one side of a map.

    torchmetrics takes a window of `2 * int(3.5 * sigma + 0.5) + 1` positions and pads by reflection, for which the
    half of the window must be shorter than the side. The window is the usual one of 11 positions, or the largest that
    the side holds; two positions get a window of 3, as one of 1 would see no contrast. Along a side of one position
    the window has one.
    """
    if side == 1:
        return 0.1
    return min(1.5, max(1, (side - 1) // 2) / 3.5)
