"""Where a view looks in its base view, as a row of numbers, and moving features there.

Coordinates are normalized: x and y run from -1 to 1 over a picture's extent, pixel j of W has its centre at
(2j + 1) / W - 1, whether the picture is an image, a view or a grid of features. The geometry of a view says for each
of its positions which point of the base view it shows; NaN, or a point beyond [-1, 1], shows nothing of it.

| kind | row | what it can say |
|---|---|---|
| `projective` | 8 float32: a homography | flips, crops, resizing, rotation, shear, perspective, in any order |
| `dense` | 2 int16 a feature position | everything, at the resolution of the features |
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

PROJECTIVE = "projective"
DENSE = "dense"
GEOMETRY_KINDS = (PROJECTIVE, DENSE)

# Fixed point of a dense coordinate: 1/8192 of half a picture, up to 3.99 either way.
_ONE = 8192
_FARTHEST = 32767
_OUTSIDE = -32768
# Maps every position to the point (4, 4): nothing of the base view is shown.
_NOTHING = (0.0, 0.0, 4.0, 0.0, 0.0, 4.0, 0.0, 0.0)
# Points a side that a homography is fitted to and judged by.
_FIT_POINTS = 64
# A coordinate this far beyond the border is on it: rounding must not decide what is outside.
_EDGE = 1e-4
# Nearer than this part of a cell to a feature's position is on it.
_SNAP = 1 / 1024


def geometry_column(kind: str, grid: tuple[int, int]) -> tuple[torch.dtype, int]:
    """Dtype and length of one row.

    Args:
        kind: one of `GEOMETRY_KINDS`.
        grid: `(h, w)` of the features.

    Raises:
        ValueError: if the kind is unknown.
    """
    _check_kind(kind)
    return (torch.float32, 8) if kind == PROJECTIVE else (torch.int16, 2 * grid[0] * grid[1])


def encode_geometry(points: torch.Tensor, kind: str, grid: tuple[int, int], tolerance: float) -> torch.Tensor:
    """Turns the points that a view shows into a row.

    Args:
        points: float32 `(H, W, 2)`, x and y in the base view of what each of the view's pixels shows; NaN where it
            shows nothing. Points of the image beyond the base view lie beyond [-1, 1].
        kind: one of `GEOMETRY_KINDS`.
        grid: `(h, w)` of the features.
        tolerance: largest error of a coordinate that still counts as a fit; for `projective` alone. The root mean
            square of the errors may be a quarter of it.

    Returns:
        The row, see `geometry_column`. A `projective` row full of NaN is a misfit: no homography shows these points,
        or it shows something of the base view where the view does not (an erased rectangle). A view that shows
        nothing at all has the homography that maps everything to (4, 4), or is outside everywhere.

    Raises:
        ValueError: if the kind is unknown.

    Shapes: H x W pixels of the view.
    """
    _check_kind(kind)
    return _encode_projective(points, tolerance) if kind == PROJECTIVE else _encode_dense(points, grid)


def decode_geometry(rows: torch.Tensor, kind: str, grid: tuple[int, int]) -> torch.Tensor:
    """Turns rows into the point of the base view that each feature position shows.

    Args:
        rows: `(B, G)`, of the dtype and length of `geometry_column`.
        kind: one of `GEOMETRY_KINDS`.
        grid: `(h, w)` of the features.

    Returns:
        float32 `(B, h, w, 2)` on the device of the rows, x and y; NaN where it shows nothing, and all over for a
        misfit.

    Raises:
        ValueError: if the kind is unknown or the rows are not of this kind and grid.

    Shapes: B rows, G numbers a row.
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
    """Moves features of base views to where their views show them.

    Rows that only move features, whose sources all lie on features (a flip, a shift by whole cells), are copied bit
    by bit; others are interpolated bilinearly.

    Args:
        features: floats `(B, C, h, w)`.
        sources: what `decode_geometry` returned, `(B, h, w, 2)`, on the device of the features.
        outside: `(C,)`, what stands where nothing of the base view is shown; by default the nearest feature at the
            border does.

    Returns:
        `(B, C, h, w)`, of the dtype of the features.

    Raises:
        ValueError: if the sources are not those of as many features.

    Shapes: B views, C channels.
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
    # Dense coordinates are rounded, to more than a snap of a cell where cells are small.
    on_feature = ((cells - nearest).abs() <= (size / (2 * _ONE)).clamp_min(_SNAP)).all(-1)
    if outside is not None:
        on_feature |= hidden
    copied = on_feature.flatten(1).all(1)
    if copied.all():
        warped = _copy(features, nearest)
    else:
        warped = F.grid_sample(features.float(), sources, padding_mode="border", align_corners=False)
        warped = warped.to(features.dtype)
        if copied.any():
            warped[copied] = _copy(features[copied], nearest[copied])
    if outside is None:
        return warped
    return torch.where(hidden[:, None], outside.to(warped)[:, None, None], warped)


def is_shown(sources: torch.Tensor) -> torch.Tensor:
    """Where views show something of their base views: bool `(B, h, w)` for sources `(B, h, w, 2)`."""
    return (sources.abs() <= 1 + _EDGE).all(-1)


def is_mirrored(sources: torch.Tensor) -> torch.Tensor:
    """Which views show their base views as in a mirror: bool `(B,)` for sources `(B, h, w, 2)`.

    On grids with a single row or column, and where nothing is shown, it cannot be told: False.
    """
    right, down = (sources.diff(dim=dim).flatten(1, 2).nanmean(1) for dim in (2, 1))
    return right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0] < 0


def cell_centres(grid: tuple[int, int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Coordinates of the positions of a grid: float32 `(h, w, 2)`, x and y."""
    y, x = ((2 * torch.arange(count, device=device) + 1) / count - 1 for count in grid)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def map_points(matrix: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Applies a homography.

    Args:
        matrix: `(..., 3, 3)`.
        points: `(..., 2)`, x and y.

    Returns:
        `(..., 2)`; NaN for points on the horizon and behind it.
    """
    # Not a matrix product: a GPU may round its factors to 10 bits.
    x, y = points.unbind(-1)
    mapped = matrix[..., 0] * x[..., None] + matrix[..., 1] * y[..., None] + matrix[..., 2]
    depth = mapped[..., 2:]
    return torch.where(depth > 1e-6, mapped[..., :2] / depth, torch.nan)


def fit_affine(places: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The affine map that takes places to points with the least squared error: float64 `(3, 3)`.

    Args:
        places, points: float64 `(N, 2)`.

    Shapes: N pairs, one or more; if they do not settle a map, it is the one with the smallest numbers.
    """
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[:2] = _solve(F.pad(places, (0, 1), value=1), points).T
    return matrix


def _fit_homography(places: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The homography with the least algebraic error (direct linear transform, last entry 1); as `fit_affine`."""
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
    """The smallest of the least squares solutions."""
    # Thousands of equations for eight numbers: their normal equations are well enough conditioned in float64.
    return torch.linalg.lstsq(equations.T @ equations, equations.T @ right, driver="gelsd").solution


def _encode_projective(points: torch.Tensor, tolerance: float) -> torch.Tensor:
    rows, columns = (torch.linspace(0, size - 1, min(size, _FIT_POINTS)).round().long() for size in points.shape[:2])
    chosen = rows[:, None], columns
    seen = points[chosen].flatten(0, 1).double()
    places = cell_centres((points.shape[0], points.shape[1]))[chosen].flatten(0, 1).double()
    valid = seen.isfinite().all(-1)
    if not valid.any():
        return torch.tensor(_NOTHING)
    # A homography takes longer to fit, but a slight perspective must not pass for an affine map.
    for fit, spread in ((fit_affine, tolerance / 20), (_fit_homography, tolerance / 4)):
        matrix = fit(places[valid], seen[valid])
        if _is_fit(map_points(matrix, places), seen, valid, tolerance, spread):
            return (matrix / matrix[2, 2]).flatten()[:8].float()
    return torch.full((8,), torch.nan)


def _is_fit(mapped: torch.Tensor, seen: torch.Tensor, valid: torch.Tensor, tolerance: float, spread: float) -> bool:
    """Whether a map shows what is seen, and nothing of the base view, save its border, where nothing is."""
    errors = (mapped - seen)[valid]
    # Interpolation errs along borders only, so what errs less but everywhere is a deformation.
    close = errors.abs().max() <= tolerance and errors.square().mean().sqrt() <= spread
    return bool(close) and not (mapped[~valid].abs() <= 1 - tolerance).all(-1).any()


def _encode_dense(points: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Pools points to the features' grid; a cell with points for less than half of its pixels is outside."""
    valid = points.isfinite().all(-1, keepdim=True)
    planes = torch.cat([torch.where(valid, points, 0), valid.float()], -1).permute(2, 0, 1)[None]
    # A whole number of points a cell: the middle of pixels that a cell has only parts of is not the cell's.
    a_cell = [max(1, size // cells) for size, cells in zip(points.shape[:2], grid, strict=True)]
    size = [cells * count for cells, count in zip(grid, a_cell, strict=True)]
    if size != list(points.shape[:2]):
        planes = F.interpolate(planes, size, mode="bilinear")
    pooled = F.avg_pool2d(planes, a_cell)[0]
    share = pooled[2]
    codes = (pooled[:2] / share.clamp_min(1e-6) * _ONE).round().clamp(-_FARTHEST, _FARTHEST)
    return torch.where(share < 0.5, _OUTSIDE, codes).to(torch.int16).flatten()


def _towards_border(sources: torch.Tensor) -> torch.Tensor:
    """The border's point in the direction of each position itself, seen from the middle."""
    centres = cell_centres((sources.shape[1], sources.shape[2]), sources.device)
    return centres / centres.abs().amax(-1, keepdim=True).clamp_min(1e-6)


def _copy(features: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Picks the feature at each cell; cells `(B, h, w, 2)` are whole numbers inside the grid."""
    x, y = cells.long().unbind(-1)
    index = (y * features.shape[3] + x).flatten(1)[:, None].expand(-1, features.shape[1], -1)
    return features.flatten(2).gather(2, index).unflatten(2, cells.shape[1:3])


def _check_kind(kind: str) -> None:
    if kind not in GEOMETRY_KINDS:
        raise ValueError(f"unknown kind of geometry {kind!r}; choose one of {', '.join(GEOMETRY_KINDS)}")
