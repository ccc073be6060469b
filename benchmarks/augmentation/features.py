"""How much of a ViT's features follows a crop of the image: cosine with the base view, as it is and warped."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from transformers import set_seed

from hf_freezecache import BlockChain, ReplayableTransform
from hf_freezecache.augment.draws import Draw, use_draw
from hf_freezecache.augment.geometry import PROJECTIVE, decode_geometry, warp
from hf_freezecache.augment.maps import to_maps
from hf_freezecache.augment.sensitivity import channel_similarity
from hf_freezecache.model.layout import FeatureLayout

from .._images import FINISH, load_caltech_files, load_deit

FEATURES = "features"
CUTS = (4, 8)
_SIZE, _IMAGES, _BATCH = 224, 128, 32
_SCALE = (0.35, 1.0)


def feature_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cuts": list(CUTS),
        "size": _SIZE,
        "scale": list(_SCALE),
        "images": 8 if options.smoke else _IMAGES,
    }


def make_transform() -> ReplayableTransform:
    """Random resized crop and flip; as the base the centre crop of DeiT's evaluation."""
    bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
    crop = v2.RandomResizedCrop(_SIZE, scale=_SCALE, **bicubic)
    return ReplayableTransform(
        train=v2.Compose([v2.ToImage(), crop, v2.RandomHorizontalFlip(), *FINISH]),
        base=v2.Compose([v2.ToImage(), v2.Resize(_SIZE * 8 // 7, **bicubic), v2.CenterCrop(_SIZE), *FINISH]),
    )


def measure_seed(seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Cosines at every cut; every seed has images and draws of its own.

    Returns:
        By cut: mean over images and channels of the cosine between a view's map and the base view's, as it is
        (`unwarped`) and warped by the view's geometry (`warped`), over the positions that show something of the base
        view, and the share of those positions (`shown`). Each channel's mean is subtracted first.
    """
    set_seed(seed)
    chain = BlockChain.from_model(load_deit(options).eval())
    count = feature_settings(options)["images"]
    rows = load_caltech_files(options, "train").select(range(seed * count, (seed + 1) * count))
    images = [image.convert("RGB") for image in rows["image"]]
    layout = chain.layout(CUTS[0])
    base, _ = draw_view(images, Draw(seed, range(count), view=0))
    view, rows = draw_view(images, Draw(seed, range(count), view=1, geometry=(PROJECTIVE, layout.grid)))
    sources = decode_geometry(rows, PROJECTIVE, layout.grid)
    return {str(cut): compare_at(chain, cut, base, view, sources) for cut in CUTS}


def draw_view(images: list[Image.Image], wanted: Draw) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pixels `(N, 3, H, W)` of a view of every image, and the rows of its geometry, if they are wanted.

    Raises:
        RuntimeError: if the transform cannot tell the geometry.
    """
    with use_draw(wanted):
        rows = make_transform()({"image": images})
    if wanted.refused is not None:
        raise RuntimeError(wanted.refused)
    return torch.stack(rows["pixel_values"]), torch.stack(wanted.geometries) if wanted.geometries else None


def compare_at(
    chain: BlockChain, cut: int, base: torch.Tensor, view: torch.Tensor, sources: torch.Tensor
) -> dict[str, float]:
    """Cosines at one cut.

    Shapes: `base`, `view` `(N, 3, H, W)`; `sources` `(N, h, w, 2)`, (h, w) the feature grid.
    """
    base_maps, view_maps = feature_maps(chain, base, cut), feature_maps(chain, view, cut)
    mean = base_maps.mean((0, 2, 3), keepdim=True)
    deviation = (base_maps - mean).square().mean((0, 2, 3), keepdim=True).sqrt()
    base_maps, view_maps = (base_maps - mean) / deviation, (view_maps - mean) / deviation
    inside = (sources.abs() <= 1).all(-1)  # NaN is not: nothing of the base view is shown there
    rows = inside.flatten(1).any(1)
    sides = {"unwarped": base_maps, "warped": warp(base_maps, sources)}
    cosines = {
        name: channel_similarity(view_maps[rows], maps[rows], inside[rows], "cosine").mean().item()
        for name, maps in sides.items()
    }
    return {**cosines, "shown": inside.float().mean().item()}


def feature_maps(chain: BlockChain, pixels: torch.Tensor, cut: int) -> torch.Tensor:
    """Features at a cut as maps `(N, C, h, w)`, without special tokens."""
    layout: FeatureLayout = chain.layout(cut)
    features = [chain.prefix({"pixel_values": part}, cut) for part in pixels.split(_BATCH)]
    return to_maps(torch.cat(features), layout)
