"""The geometry of a view: which point of the base view each of its positions shows; and warping features by it.

Coordinates are normalized: x and y run from -1 to 1 over the extent of an image, a view or a grid of features; the
centre of pixel j of W is (2j + 1) / W - 1. A position whose point is NaN, or is outside [-1, 1], shows nothing of
the base view.

| kind | row | geometry that it can express |
|---|---|---|
| `projective` | 8 float32: a homography | flips, crops, resizing, rotation, shear, perspective, in any order |
| `dense` | 2 int16 per feature position | any, at the resolution of the features |
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

PROJECTIVE = "projective"
DENSE = "dense"
GEOMETRY_KINDS = (PROJECTIVE, DENSE)

# Fixed point of a dense coordinate: steps of 1/8192, from -3.99 to 3.99.
_ONE = 8192
_FARTHEST = 32767
_OUTSIDE = -32768
# A homography that maps every position to the point (4, 4): the view shows nothing of the base view.
_NOTHING = (0.0, 0.0, 4.0, 0.0, 0.0, 4.0, 0.0, 0.0)
# Number of points per side to which a homography is fitted and by which it is judged.
_FIT_POINTS = 64
# A point up to this far beyond the border counts as on it: rounding must not decide what is outside.
_EDGE = 1e-4
# A point nearer than this share of a cell to a feature's position counts as on it.
_SNAP = 1 / 1024


def geometry_column(kind: str, grid: tuple[int, int]) -> tuple[torch.dtype, int]:
    """Dtype and length of a row of geometry.

    Args:
        kind: one of `GEOMETRY_KINDS`.
        grid: `(h, w)`, the feature grid.

    Raises:
        ValueError: if the kind is unknown.
    """
    _check_kind(kind)
    return (torch.float32, 8) if kind == PROJECTIVE else (torch.int16, 2 * grid[0] * grid[1])


def encode_geometry(points: torch.Tensor, kind: str, grid: tuple[int, int], tolerance: float) -> torch.Tensor:
    """Encodes the points that a view shows as a row.

    Args:
        points: float32 `(H, W, 2)`, for each pixel of the view the point of the base view that it shows, x and y; NaN
            where it shows nothing. Points of the image outside the base view are outside [-1, 1].
        kind: one of `GEOMETRY_KINDS`.
        grid: `(h, w)`, the feature grid.
        tolerance: for `projective`: largest error of a coordinate for which a homography is accepted; the root mean
            square of the errors may be a quarter of it.

    Returns:
        The row, see `geometry_column`. A `projective` row of NaN is a misfit: no homography gives these points, or it
        shows something of the base view where the view does not (an erased rectangle). A view that shows nothing at
        all gets the homography that maps every position to (4, 4), or is outside at every position.

    Raises:
        ValueError: if the kind is unknown.

    Shapes: H x W pixels of the view.
    """
    _check_kind(kind)
    return _encode_projective(points, tolerance) if kind == PROJECTIVE else _encode_dense(points, grid)


def decode_geometry(rows: torch.Tensor, kind: str, grid: tuple[int, int]) -> torch.Tensor:
    """Decodes rows to the point of the base view that each feature position shows.

    Args:
        rows: `(B, G)`, of the dtype and length of `geometry_column`.
        kind: one of `GEOMETRY_KINDS`.
        grid: `(h, w)`, the feature grid.

    Returns:
        float32 `(B, h, w, 2)` on the device of the rows, x and y; NaN where a position shows nothing, and at every
        position of a misfit.

    Raises:
        ValueError: if the kind is unknown or the rows do not belong to this kind and grid.

    Shapes: B rows, G numbers per row.
    """
    dtype, length = geometry_column(kind, grid)
    if rows.dtype != dtype or rows.ndim != 2 or rows.shape[1] != length:
        raise ValueError(
            f"{kind} geometry for grid {tuple(grid)} is {dtype} of shape (B, {length}), "
            f"got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if kind == PROJECTIVE:
        return map_points(F.pad(rows, (0, 1), value=1).view(-1, 1, 1, 3, 3), cell_centres(grid, rows.device))
    codes = rows.view(-1, 2, *grid)
    points = torch.where(codes == _OUTSIDE, torch.nan, codes.float() / _ONE)
    return points.permute(0, 2, 3, 1)


def warp(features: torch.Tensor, sources: torch.Tensor, outside: torch.Tensor | None = None) -> torch.Tensor:
    """Moves the features of base views to the positions at which their views show them.

    If all sources of a view are positions of features (a flip, a shift by whole cells), its features are copied bit
    for bit. Otherwise they are interpolated bilinearly.

    Args:
        features: floats `(B, C, h, w)`.
        sources: what `decode_geometry` returned, `(B, h, w, 2)`, on the device of the features.
        outside: `(C,)`, the feature at positions that show nothing of the base view; by default the nearest feature at
            the border.

    Returns:
        `(B, C, h, w)`, of the dtype of the features.

    Raises:
        ValueError: if the sources have another shape.

    Shapes: B views, C channels, (h, w) the feature grid.
    """
    if sources.ndim != 4 or len(sources) != len(features) or sources.shape[3] != 2:
        raise ValueError(
            f"features of shape {tuple(features.shape)} need sources ({len(features)}, h, w, 2), "
            f"got {tuple(sources.shape)}"
        )
    height, width = features.shape[2:]
    hidden = ~is_shown(sources)
    sources = torch.where(sources.isnan(), _towards_border(sources), sources)
    size = sources.new_tensor([width, height])
    cells = torch.minimum(((sources + 1) * size - 1) / 2, size - 1).clamp_min(0)
    nearest = cells.round()
    # Dense coordinates are rounded; where cells are small, by more than `_SNAP` of a cell.
    on_feature = ((cells - nearest).abs() <= (size / (2 * _ONE)).clamp_min(_SNAP)).all(-1)
    if outside is not None:
        on_feature |= hidden
    is_copy = on_feature.flatten(1).all(1)
    if is_copy.all():
        warped = _copy(features, nearest)
    else:
        warped = F.grid_sample(features.float(), sources, padding_mode="border", align_corners=False)
        warped = warped.to(features.dtype)
        if is_copy.any():
            warped[is_copy] = _copy(features[is_copy], nearest[is_copy])
    if outside is None:
        return warped
    return torch.where(hidden[:, None], outside.to(warped)[:, None, None], warped)


def is_shown(sources: torch.Tensor) -> torch.Tensor:
    """Whether positions of views show something of their base views: bool `(B, h, w)` for sources `(B, h, w, 2)`."""
    return (sources.abs() <= 1 + _EDGE).all(-1)


def is_mirrored(sources: torch.Tensor) -> torch.Tensor:
    """Whether each view is mirrored: bool `(B,)` for sources `(B, h, w, 2)`.

    False for grids with a single row or column and for views that show nothing of their base view: it is not defined.
    """
    right, down = (sources.diff(dim=dim).flatten(1, 2).nanmean(1) for dim in (2, 1))
    return right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0] < 0


def cell_centres(grid: tuple[int, int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Coordinates of the positions of a grid: float32 `(h, w, 2)`, x and y."""
    y, x = ((2 * torch.arange(count, device=device) + 1) / count - 1 for count in grid)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def map_points(matrix: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Applies a homography to points.

    Args:
        matrix: `(..., 3, 3)`, the homography.
        points: `(..., 2)`, x and y.

    Returns:
        `(..., 2)`; NaN for points on the horizon and behind it.
    """
    # Not a matrix product: a GPU may round the factors of one to 10 bits.
    x, y = points.unbind(-1)
    mapped = matrix[..., 0] * x[..., None] + matrix[..., 1] * y[..., None] + matrix[..., 2]
    depth = mapped[..., 2:]
    return torch.where(depth > 1e-6, mapped[..., :2] / depth, torch.nan)


def fit_affine(places: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The affine map from places to points with the least squared error: float64 `(3, 3)`.

    If the pairs do not determine a map, it is the one with the smallest entries.

    Args:
        places, points: float64 `(N, 2)`.

    Shapes: N pairs, at least one.
    """
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2] = _solve(F.pad(places, (0, 1), value=1), points).T
    return matrix


def _fit_homography(places: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """As `fit_affine`, the homography with the least algebraic error (direct linear transform, last entry 1)."""
    centre, scale = points.mean(0), points.std(0, correction=0).mean().clamp_min(1e-9)
    target = (points - centre) / scale
    ones = F.pad(places, (0, 1), value=1)
    zeros = torch.zeros_like(ones)
    equations = torch.cat(
        [
            torch.cat([ones, zeros, -places * target[:, :1]], 1),
            torch.cat([zeros, ones, -places * target[:, 1:]], 1),
        ]
    )
    solution = _solve(equations, target.T.reshape(-1, 1))
    matrix = F.pad(solution.flatten(), (0, 1), value=1).view(3, 3)
    back = torch.tensor([[scale, 0, centre[0]], [0, scale, centre[1]], [0, 0, 1]], dtype=torch.float64)
    return back @ matrix


def _solve(equations: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The smallest least squares solution."""
    # With thousands of equations for eight numbers, the normal equations are conditioned well enough in float64.
    return torch.linalg.lstsq(equations.T @ equations, equations.T @ right, driver="gelsd").solution


def _encode_projective(points: torch.Tensor, tolerance: float) -> torch.Tensor:
    rows, columns = (torch.linspace(0, size - 1, min(size, _FIT_POINTS)).round().long() for size in points.shape[:2])
    subset = rows[:, None], columns
    targets = points[subset].flatten(0, 1).double()
    places = cell_centres((points.shape[0], points.shape[1]))[subset].flatten(0, 1).double()
    valid = targets.isfinite().all(-1)
    if not valid.any():
        return torch.tensor(_NOTHING)
    # A homography takes longer to fit, but a slight perspective must not be accepted as an affine map.
    for fit, spread in ((fit_affine, tolerance / 20), (_fit_homography, tolerance / 4)):
        matrix = fit(places[valid], targets[valid])
        if _is_fit(map_points(matrix, places), targets, valid, tolerance, spread):
            return (matrix / matrix[2, 2]).flatten()[:8].float()
    return torch.full((8,), torch.nan)


def _is_fit(mapped: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor, tolerance: float, spread: float) -> bool:
    """Whether a map gives the valid targets, and no point inside the base view, but on its border, for the others."""
    errors = (mapped - targets)[valid]
    # Interpolation causes errors along borders only. Smaller errors everywhere mean a deformation.
    close = errors.abs().max() <= tolerance and errors.square().mean().sqrt() <= spread
    return bool(close) and not (mapped[~valid].abs() <= 1 - tolerance).all(-1).any()


def _encode_dense(points: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Averages points over the cells of the feature grid; a cell with points for less than half of it is outside."""
    valid = points.isfinite().all(-1, keepdim=True)
    planes = torch.cat([torch.where(valid, points, 0), valid.float()], -1).permute(2, 0, 1)[None]
    # Resized to a whole number of points per cell: a mean over pixels that cross its border is not the cell's centre.
    per_cell = [max(1, size // cells) for size, cells in zip(points.shape[:2], grid, strict=True)]
    size = [cells * count for cells, count in zip(grid, per_cell, strict=True)]
    if size != list(points.shape[:2]):
        planes = F.interpolate(planes, size, mode="bilinear")
    pooled = F.avg_pool2d(planes, per_cell)[0]
    share = pooled[2]
    codes = (pooled[:2] / share.clamp_min(1e-6) * _ONE).round().clamp(-_FARTHEST, _FARTHEST)
    return torch.where(share < 0.5, _OUTSIDE, codes).to(torch.int16).flatten()


def _towards_border(sources: torch.Tensor) -> torch.Tensor:
    """For each position, the point on the border in its direction from the centre."""
    centres = cell_centres((sources.shape[1], sources.shape[2]), sources.device)
    return centres / centres.abs().amax(-1, keepdim=True).clamp_min(1e-6)


def _copy(features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """The features at the given cells `(B, h, w, 2)`, which are whole numbers inside the grid."""
    x, y = cells.long().unbind(-1)
    index = (y * features.shape[3] + x).flatten(1)[:, None].expand(-1, features.shape[1], -1)
    return features.flatten(2).gather(2, index).unflatten(2, cells.shape[1:3])


def _check_kind(kind: str) -> None:
    if kind not in GEOMETRY_KINDS:
        raise ValueError(f"unknown kind of geometry {kind!r}; choose one of {', '.join(GEOMETRY_KINDS)}")
