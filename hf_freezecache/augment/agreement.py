"""Whether views show what their geometry says: base images, moved by it, are compared with the views."""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Views that are compared in a process, and those that must tell something of this many.
_VIEWS, _TOLD = 96, 24
# Share of the views that may disagree a little. With right geometries at most 4 % of the views do, with wrong ones at
# least 21 % (`benchmarks/geometry_proof`).
_MOST_WRONG = 0.12
# Share of a view's variance by which another geometry is better, a little or clearly; no right one is beaten clearly.
_BETTER, _CLEARLY = 0.01, 0.1
# Two views that disagree clearly, or three that do a little, are no accident.
_FEW_CLEARLY, _FEW = 2, 3
# How far the geometry is moved to see whether another one would agree better, as a share of the sides
# of a view.
_SHIFT = 0.03
# Positions along a side of a view that are compared at most, and how many must be shown by both.
_POSITIONS, _FEWEST = 64, 32
# So many that another geometry is not clearly better by accident.
_MANY = 400
# Share by which geometries must differ for a view to tell anything.
_TELLS = 0.03


class GeometryProof:
    """Compares the first views of a process with their base images.

    Args:
        is_trusted: whether the geometry is right unless it is clearly disproved, as that of torchvision's own
            pipelines: they move images and masks alike, unless a transform of the user's is among theirs.

    Attributes:
        refused: why the geometry is not that of the views; None as long as they agree.
    """

    def __init__(self, is_trusted: bool = False) -> None:
        self._is_trusted = is_trusted
        self.judged = self.wrong = self._clearly = self._seen = 0
        self.refused: str | None = None

    @property
    def wants_more(self) -> bool:
        """Whether more views are to be compared."""
        return self._seen < _VIEWS and self.refused is None

    def add(self, view: torch.Tensor, base: torch.Tensor, points: torch.Tensor) -> None:
        """Compares a view with its base image.

        Args:
            view: `(C, H, W)`.
            base: `(C, h, w)`.
            points: `(H, W, 2)`, the point of the base image that each pixel of the view shows, see `encode_geometry`.
        """
        self._seen += 1
        shares = explained(view, base, points, _MANY if self._is_trusted else _FEWEST)
        if shares is not None and shares.max() - shares.min() >= _TELLS:
            self.judged += 1
            better = shares[1:].max() - shares[0]
            self.wrong += bool(better > _BETTER)
            self._clearly += bool(better > _CLEARLY)
        if self._is_trusted:
            if self._clearly >= max(_FEW_CLEARLY, _MOST_WRONG * self.judged):
                self.refused = (
                    f"{self._clearly} of {self.judged} views do not show what the pipeline does to masks: a transform "
                    "moves the pixels of images alone"
                )
        elif self._clearly >= _FEW_CLEARLY or self.wrong >= max(_FEW, _MOST_WRONG * self.judged):
            self.refused = (
                f"{self.wrong} of {self.judged} views do not show what the followed calls of torchvision say: "
                "something else moves the pixels"
            )
        elif self._seen >= _TOLD and not self.judged:
            self.refused = f"none of {self._seen} views shows enough of its base view to prove its geometry"


def explained(
    view: torch.Tensor, base: torch.Tensor, points: torch.Tensor, fewest: int = _FEWEST
) -> torch.Tensor | None:
    """How much of a view follows from its base image, by its geometry and by others.

    The colours of a view are fitted by those of the base image and their squares, so that changes of colours do not
    matter.

    Args:
        view, base, points: see `GeometryProof.add`.
        fewest: positions that must be shown by both.

    Returns:
        Share of the view's variance, by the geometry and by it moved left, right, up and down and mirrored in both
        directions; None if view and base image show too little in common.
    """
    height, width = view.shape[1:]
    step = max(1, -(-max(height, width) // _POSITIONS))
    # A mean over a few pixels: noise and the kind of interpolation count less.
    view = F.avg_pool2d(view[None].double(), step)[0]
    valid = points.isfinite().all(-1)
    spread = F.avg_pool2d(torch.where(valid[..., None], points, 0).permute(2, 0, 1)[None].double(), step)[0]
    shown = F.avg_pool2d(valid[None, None].double(), step)[0, 0] == 1
    scale = max(1, -(-max(base.shape[1:]) // _POSITIONS))
    base = F.avg_pool2d(base[None].double(), scale)
    sources = spread.permute(1, 2, 0)
    mirrored = [sources * sources.new_tensor(signs) for signs in ((-1, 1), (1, -1))]
    moves = [sources, *_moved(sources, shown), *mirrored]
    for moved in moves:
        shown = shown & (moved.abs() <= 1).all(-1)
    if shown.sum() < fewest:
        return None
    targets = view[:, shown].T
    targets = targets - targets.mean(0)
    whole = targets.square().sum()
    if whole < 1e-9 * targets.numel():
        return None
    return torch.stack([_explained(targets, base, moved[shown]) / whole for moved in moves])


def _moved(sources: torch.Tensor, shown: torch.Tensor) -> list[torch.Tensor]:
    """Sources `(H, W, 2)` moved by some pixels of the view."""
    height, width = shown.shape
    moved = []
    for axis, size in ((1, width), (0, height)):
        count = max(2, round(_SHIFT * size))
        for direction in (count, -count):
            rolled = sources.roll(direction, axis)
            kept = shown.roll(direction, axis).clone()
            edge = slice(0, direction) if direction > 0 else slice(direction, None)
            kept[(slice(None), edge) if axis else edge] = False
            moved.append(torch.where(kept[..., None], rolled, torch.inf))
    return moved


def _explained(targets: torch.Tensor, base: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Variance of the targets `(N, C)` that follows from the base image at the sources `(N, 2)`."""
    colours = F.grid_sample(base, sources[None, None], align_corners=False, padding_mode="border")[0, :, 0].T
    colours = (colours - colours.mean(0)) / colours.std(0).clamp_min(1e-6)
    known = torch.cat([torch.ones_like(colours[:, :1]), colours, colours.square()], 1)
    fitted = known @ torch.linalg.lstsq(known.T @ known, known.T @ targets, driver="gelsd").solution
    return targets.square().sum() - (targets - fitted).square().sum()
