"""Codes of a batch back to features: decoding, warping the base view, and putting the sensitive channels in."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..augment.channel_map import apply_channel_map
from ..augment.geometry import decode_geometry, is_mirrored, is_shown, warp
from ..augment.maps import put_maps, to_maps
from ..cache.names import GEOMETRY, VIEW, VIEW_INDEX, VIEW_SPECIAL
from ..cache.store import FeatureStore


def replay_features(store: FeatureStore, codes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Features of the views that were drawn for a batch.

    Where views are kept whole they are decoded as the base view is. Else the base view is decoded and warped by the
    view's geometry, the sensitive channels and the special tokens are the view's own (arXiv 2508.15033,
    similarity-aware channel augmentation, for any geometry), and the other channels follow from both by a linear map
    where that comes nearer than warping alone.

    Args:
        store: where the codes come from.
        codes: the batch's codes by entry, on the device of the model.

    Returns:
        `(B, *layout.shape)` tensor.

    Shapes: B samples.
    """
    features = store.codec.decode(codes)
    if VIEW_INDEX not in codes:
        return features
    rows = codes[VIEW_INDEX].nonzero().squeeze(1)
    if len(rows) == 0:
        return features
    if len(rows) == len(features):
        return _view_of(store, features, codes)
    own = {name: codes[name][rows] for name in store.views.entries}
    return features.index_copy_(0, rows, _view_of(store, features[rows], own))


def _view_of(store: FeatureStore, base: torch.Tensor, entries: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Features of augmented views from those of their base views, which are overwritten."""
    spec, layout = store.views.spec, store.codec.layout
    sources = decode_geometry(entries[GEOMETRY], spec.geometry, layout.grid)
    maps = warp(to_maps(base, layout), sources)
    own = store.views.decode(entries)
    kept = None
    if VIEW in own:
        kept = to_maps(own[VIEW], layout.narrowed(len(spec.channels)))
    if spec.channel_maps is not None:
        linear, limits = spec.channel_maps.to(base.device), spec.limits.to(base.device)
        maps = apply_channel_map(linear, maps, kept, is_mirrored(sources), limits)
    outside = spec.outside.to(maps)[:, None, None]
    maps = torch.where(is_shown(sources)[:, None], maps, outside)
    if kept is not None:
        maps = maps.index_copy(1, spec.channels.to(base.device), kept)
    features = put_maps(base, maps, layout)
    if VIEW_SPECIAL in own:
        features[:, : layout.special_tokens] = own[VIEW_SPECIAL]
    return features
