"""Decoding the codes of a batch: base view, warping to the views' geometry, and the sensitive channels."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..augment.channel_map import apply_channel_map
from ..augment.geometry import decode_geometry, is_mirrored, is_shown, warp
from ..augment.maps import check_grid, put_maps, to_maps
from ..cache.names import GEOMETRY, VIEW, VIEW_INDEX, VIEW_SPECIAL
from ..cache.store import FeatureStore
from ..cache.texts import decode_rows


def replay_features(store: FeatureStore, codes: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Decodes the features of a batch.

    Views that are stored whole are decoded as the base view is. Otherwise the base view is decoded and warped by the
    view's geometry, and the view's sensitive channels and special tokens replace those of the base view (arXiv
    2508.15033, similarity-aware channel augmentation, here for any geometry). Where the store has channel maps, they
    compute the other channels from the warped and the sensitive ones.

    Args:
        store: the store that holds the codes.
        codes: the batch's codes by entry, as `FeatureStore.read_rows` returns them, on the device of the model.

    Returns:
        Features `(B, *layout.shape)`; of texts `(B, W, C)`, with 0 at padding; so, too, of samples that have sizes of
        their own.

    Raises:
        ValueError: if an entry is missing or has another shape or dtype than the store's.

    Shapes: B samples, W positions of a text.
    """
    features = decode_rows(store.codec, codes)
    if VIEW_INDEX not in codes:
        return features
    rows = codes[VIEW_INDEX].nonzero().squeeze(1)
    if len(rows) == 0:
        return features
    if len(rows) == len(features):
        return _view_of(store, features, codes)
    entries = {name: codes[name][rows] for name in store.views.entries}
    return features.index_copy_(0, rows, _view_of(store, features[rows], entries))


def _view_of(store: FeatureStore, base: torch.Tensor, entries: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Features of augmented views from those of their base views, which it overwrites."""
    spec, layout = store.views.spec, store.codec.layout
    geometry, channels, outside = spec.warped
    sources = decode_geometry(entries[GEOMETRY], geometry, check_grid(layout))
    maps = warp(to_maps(base, layout), sources)
    decoded = store.views.decode(entries)
    sensitive = None
    if VIEW in decoded:
        sensitive = to_maps(decoded[VIEW], layout.narrowed(len(channels)))
    if spec.channel_maps is not None:
        assert spec.limits is not None  # they come with the maps
        channel_maps, limits = spec.channel_maps.to(base.device), spec.limits.to(base.device)
        maps = apply_channel_map(channel_maps, maps, sensitive, is_mirrored(sources), limits)
    maps = torch.where(is_shown(sources)[:, None], maps, outside.to(maps)[:, None, None])
    if sensitive is not None:
        maps = maps.index_copy(1, channels.to(base.device), sensitive)
    features = put_maps(base, maps, layout)
    if VIEW_SPECIAL in decoded:
        features[:, : layout.special_tokens] = decoded[VIEW_SPECIAL]
    return features
