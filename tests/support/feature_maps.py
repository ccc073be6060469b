"""Feature maps of a base view and of an augmented one, and how they are compared."""

import torch

from hf_freezecache.augment.geometry import PROJECTIVE, decode_geometry
from hf_freezecache.augment.sensitivity import Sensitivity, SensitivityMeter
from hf_freezecache.model.layout import FeatureLayout
from support.images import identity_geometry


def map_layout(channels=4, grid=(7, 7), dtype=torch.float32):
    return FeatureLayout((channels, *grid), grid, 0, dtype)


def random_maps(rows=16, channels=4, grid=(7, 7), seed=0):
    return torch.randn(rows, channels, *grid, generator=torch.Generator().manual_seed(seed))


def identity(rows, grid):
    return decode_geometry(identity_geometry(rows, PROJECTIVE, grid), PROJECTIVE, grid)


def flip(rows, grid):
    sources = identity(rows, grid)
    sources[..., 0] *= -1
    return sources


def measure(base, view, sources, method="ssim", layout=None, **settings) -> Sensitivity:
    layout = map_layout(base.shape[1], tuple(base.shape[2:])) if layout is None else layout
    meter = SensitivityMeter(layout, method, **settings)
    meter.update(base, view, sources, range(len(base)))
    return meter.result()


def partly_outside(base, columns=3):
    """Sources and view of flipped maps whose first columns show nothing of the base view."""
    sources = flip(len(base), tuple(base.shape[2:]))
    sources[:, :, 0] = torch.nan
    sources[:, :, 1:columns] = 1.5
    return sources, base.flip(3)


def make_sensitivity(values) -> Sensitivity:
    return Sensitivity(torch.tensor(values), torch.zeros(len(values)), 0.0, 1, {})
