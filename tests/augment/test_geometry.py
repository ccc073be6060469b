import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import identity_geometry

from hf_freezecache.augment.geometry import (
    DENSE,
    GEOMETRY_KINDS,
    PROJECTIVE,
    cell_centres,
    decode_geometry,
    encode_geometry,
    geometry_column,
    map_points,
    warp,
)

EXAMPLES = settings(max_examples=25, deadline=None)
TOLERANCE = 0.05
# Half a step of a dense coordinate, and float32 rounding.
STEP = 0.51 / 8192


def homography(*entries):
    return torch.tensor([*entries, 1.0]).view(3, 3)


@st.composite
def homographies(draw):
    """Mild ones: the horizon stays away from the view."""

    def near(value, spread):
        return draw(st.floats(value - spread, value + spread))

    flip = draw(st.sampled_from([1, -1]))
    return homography(
        flip * near(0.8, 0.4), near(0, 0.3), near(0, 0.5), near(0, 0.3), near(0.8, 0.4), near(0, 0.5),
        near(0, 0.2), near(0, 0.2),
    )  # fmt: skip


def grids(most=9):
    return st.tuples(st.integers(1, most), st.integers(1, most))


def seen_by(matrix, size=(40, 56)):
    """The points that a view shows, NaN beyond the base view's border."""
    points = map_points(matrix, cell_centres(size))
    return torch.where((points.abs() <= 1).all(-1, keepdim=True), points, torch.nan)


def features_of(count, grid, channels=3, dtype=torch.float32, seed=0):
    return torch.randn(count, channels, *grid, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_points(got, expected, tolerance):
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.allclose(got, expected, rtol=0, atol=tolerance, equal_nan=True)


@EXAMPLES
@given(homographies(), grids())
def test_projective_row_gives_back_its_homography(matrix, grid):
    row = encode_geometry(seen_by(matrix), PROJECTIVE, grid, 1e-3)
    dtype, length = geometry_column(PROJECTIVE, grid)
    assert row.dtype == dtype and row.shape == (length,)
    if seen_by(matrix).isfinite().sum() < 200:
        return
    assert torch.allclose(row, matrix.flatten()[:8], atol=1e-3)
    decoded = decode_geometry(row[None], PROJECTIVE, grid)
    same_points(decoded, map_points(matrix, cell_centres(grid))[None], 1e-2)


@EXAMPLES
@given(homographies(), grids())
def test_dense_row_gives_back_points_at_its_own_resolution(matrix, grid):
    points = map_points(matrix, cell_centres(grid))
    points[0, 0] = torch.nan
    row = encode_geometry(points, DENSE, grid, TOLERANCE)
    dtype, length = geometry_column(DENSE, grid)
    assert row.dtype == dtype and row.shape == (length,)
    same_points(decode_geometry(row[None], DENSE, grid)[0], points.clamp(-32767 / 8192, 32767 / 8192), STEP)


def test_dense_pools_the_valid_points_of_a_cell():
    points = cell_centres((8, 8)) * 0.5
    points[:4, :2] = torch.nan
    points[4:, :3] = torch.nan
    decoded = decode_geometry(encode_geometry(points, DENSE, (2, 2), TOLERANCE)[None], DENSE, (2, 2))[0]
    assert decoded[1, 0].isnan().all(), "a quarter of the cell's points are valid"
    assert torch.allclose(decoded[0, 0], points[:4, 2:4].mean((0, 1)), atol=STEP)
    assert torch.allclose(decoded[0, 1], torch.tensor([0.25, -0.25]), atol=STEP)


def test_points_beyond_the_base_view_are_kept():
    matrix = homography(1.5, 0, 0.2, 0, 1.5, 0, 0, 0)
    points = map_points(matrix, cell_centres((32, 32)))
    for kind, tolerance in ((PROJECTIVE, 1e-5), (DENSE, STEP)):
        decoded = decode_geometry(encode_geometry(points, kind, (8, 8), TOLERANCE)[None], kind, (8, 8))[0]
        assert decoded[0, 0, 0] < -1.1
        same_points(decoded, map_points(matrix, cell_centres((8, 8))), tolerance)


def test_view_with_padding_is_projective():
    shift = homography(1, 0, 0.5, 0, 1, 0, 0, 0)
    row = encode_geometry(seen_by(shift), PROJECTIVE, (4, 4), TOLERANCE)
    assert torch.allclose(row, shift.flatten()[:8], atol=1e-5)


def erased(points):
    points[10:16, 10:20] = torch.nan
    return points


def reflected(points):
    points[:, :4] = points[:, 4:8].flip(1)
    return points


def rippled(points):
    return points + 0.04 * (9 * points).sin().flip(-1)


@pytest.mark.parametrize("damage", [erased, reflected, rippled])
def test_what_no_homography_shows_is_a_projective_misfit_and_dense(damage):
    points = damage(cell_centres((40, 40)))
    row = encode_geometry(points, PROJECTIVE, (40, 40), TOLERANCE)
    assert row.shape == (8,) and row.isnan().all()
    assert decode_geometry(row[None], PROJECTIVE, (40, 40)).isnan().all()
    dense = decode_geometry(encode_geometry(points, DENSE, (40, 40), TOLERANCE)[None], DENSE, (40, 40))[0]
    same_points(dense, points, STEP)


@pytest.mark.parametrize("kind", GEOMETRY_KINDS)
def test_view_that_shows_nothing_is_outside_everywhere(kind):
    row = encode_geometry(torch.full((16, 16, 2), torch.nan), kind, (4, 4), TOLERANCE)
    sources = decode_geometry(row[None], kind, (4, 4))
    warped = warp(features_of(1, (4, 4)), sources, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(warped, torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand(1, 3, 4, 4))
    assert warp(features_of(1, (4, 4)), sources).isfinite().all()


def test_positions_behind_the_horizon_are_outside():
    matrix = homography(1, 0, 0, 0, 1, 0, 2, 0)
    mapped = map_points(matrix, torch.tensor([[-0.9, 0.0], [-0.5, 0.0], [0.0, 0.0]]))
    assert mapped[:2].isnan().all() and torch.equal(mapped[2], torch.zeros(2))


@pytest.mark.parametrize("kind", GEOMETRY_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EXAMPLES
@given(grid=grids(64), axes=st.sampled_from([(), (0,), (1,), (0, 1)]))
def test_identity_and_flips_copy_bit_by_bit_at_any_size(kind, dtype, grid, axes):
    features = features_of(2, grid, dtype=dtype)
    rows = identity_geometry(2, kind, grid)
    if axes:
        rows = encode_geometry(cell_centres(grid).flip(axes), kind, grid, TOLERANCE).repeat(2, 1)
    sources = decode_geometry(rows, kind, grid)
    for outside in (None, torch.zeros(3)):
        warped = warp(features, sources, outside)
        assert warped.dtype == dtype
        assert torch.equal(warped, features.flip([axis + 2 for axis in axes]))


@pytest.mark.parametrize("kind", GEOMETRY_KINDS)
@EXAMPLES
@given(down=st.integers(-3, 3), right=st.integers(-3, 3))
def test_shift_by_whole_cells_copies_and_fills(kind, down, right):
    grid = (5, 6)
    points = cell_centres((20, 24)) + torch.tensor([2 * right / 6, 2 * down / 5])
    points[(points.abs() > 1).any(-1)] = torch.nan
    sources = decode_geometry(encode_geometry(points, kind, grid, TOLERANCE)[None], kind, grid)
    features = features_of(1, grid)
    padded = torch.full((1, 3, 11, 12), 7.0)
    padded[:, :, 3:8, 3:9] = features
    expected = padded[:, :, 3 + down : 8 + down, 3 + right : 9 + right]
    assert torch.equal(warp(features, sources, torch.full((3,), 7.0)), expected)


def test_shift_by_whole_cells_without_a_value_repeats_the_border():
    sources = cell_centres((4, 4))[None] + torch.tensor([0.5, 0.0])
    features = features_of(1, (4, 4))
    assert torch.equal(warp(features, sources), features[..., [1, 2, 3, 3]])
    sources[:, :, 3] = torch.nan
    warped = warp(features, sources)
    assert warped.isfinite().all()
    assert torch.allclose(warped[:, :, 1:3, :3], features[:, :, 1:3, 1:], atol=1e-5)
    assert torch.allclose(warped[:, :, 0, 3], features[:, :, 0, 3], atol=1e-5)


@EXAMPLES
@given(homographies(), grids(), st.integers(0, 100))
def test_warp_is_linear_in_features_and_outside(matrix, grid, seed):
    sources = map_points(matrix, cell_centres(grid))[None]
    first, second = features_of(1, grid, seed=seed), features_of(1, grid, seed=seed + 1)
    left, right = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.5, 4.0])
    together = warp(2 * first - 3 * second, sources, 2 * left - 3 * right)
    apart = 2 * warp(first, sources, left) - 3 * warp(second, sources, right)
    assert torch.allclose(together, apart, atol=1e-4)


@EXAMPLES
@given(homographies(), grids(12))
def test_warp_of_a_ramp_is_the_source_coordinates(matrix, grid):
    sources = map_points(matrix, cell_centres(grid))
    ramp = cell_centres(grid).permute(2, 0, 1)[None]
    warped = warp(ramp, sources[None], torch.full((2,), torch.nan))[0].permute(1, 2, 0)
    last = 1 - 1 / torch.tensor([grid[1], grid[0]])
    inside = (sources.abs() <= 1).all(-1, keepdim=True)
    expected = torch.where(inside, torch.maximum(torch.minimum(sources, last), -last), torch.nan)
    # On the border itself rounding decides whether a point is shown.
    border = ((sources.abs() - 1).abs() < 1e-5).any(-1)
    warped[border] = expected[border] = 0.0
    same_points(warped, expected, 1e-4)


def test_rows_are_warped_alone():
    grid = (6, 6)
    turn = homography(0.8, 0.3, 0.1, -0.3, 0.8, 0, 0, 0)
    sources = torch.stack([cell_centres(grid), map_points(turn, cell_centres(grid)), cell_centres(grid).flip(1)])
    features = features_of(3, grid)
    together = warp(features, sources, torch.zeros(3))
    for number in range(3):
        alone = warp(features[number : number + 1], sources[number : number + 1], torch.zeros(3))
        assert torch.equal(together[number : number + 1], alone)
    assert torch.equal(together[0], features[0])
    assert torch.equal(together[2], features[2].flip(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_interpolated_in_float32(dtype):
    sources = cell_centres((8, 8))[None] * 0.77
    features = features_of(1, (8, 8), dtype=dtype)
    assert torch.equal(warp(features, sources), warp(features.float(), sources).to(dtype))


def test_wrong_arguments_say_what_is_expected():
    for call in (
        lambda: geometry_column("affine", (2, 2)),
        lambda: encode_geometry(torch.zeros(2, 2, 2), "affine", (2, 2), 0.1),
        lambda: decode_geometry(torch.zeros(1, 8), "affine", (2, 2)),
    ):
        with pytest.raises(ValueError, match="unknown kind of geometry 'affine'; choose one of projective, dense"):
            call()
    with pytest.raises(ValueError, match=r"float32 of shape \(B, 8\), got torch.float32 of shape \(1, 9\)"):
        decode_geometry(torch.zeros(1, 9), PROJECTIVE, (2, 2))
    with pytest.raises(ValueError, match=r"int16 of shape \(B, 8\), got torch.float32"):
        decode_geometry(torch.zeros(1, 8), DENSE, (2, 2))
    with pytest.raises(ValueError, match=r"need sources \(2, h, w, 2\), got \(1, 4, 4, 2\)"):
        warp(torch.zeros(2, 3, 4, 4), torch.zeros(1, 4, 4, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", GEOMETRY_KINDS)
def test_device_and_cpu_agree(kind):
    points = seen_by(homography(0.9, 0.2, 0.1, -0.2, 0.8, 0.1, 0.1, 0.05))
    rows = torch.stack([encode_geometry(points, kind, (7, 9), TOLERANCE), identity_geometry(1, kind, (7, 9))[0]])
    here, there = decode_geometry(rows, kind, (7, 9)), decode_geometry(rows.cuda(), kind, (7, 9))
    assert there.is_cuda
    same_points(there.cpu(), here, 1e-6)
    features, outside = features_of(2, (7, 9)), torch.ones(3)
    warped = warp(features.cuda(), there, outside).cpu()
    assert torch.allclose(warped, warp(features, here, outside), atol=1e-5)
    assert torch.equal(warped[1], features[1])
