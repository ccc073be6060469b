"""The columns in which a store holds augmented views, beside the base view.

A view is stored in one of two ways. *Whole*: all its channels, by the codec of the base view. Or only its *sensitive
channels*, its special tokens and its geometry: replay warps the other channels of the base view (arXiv 2508.15033,
similarity-aware channel augmentation, here for any geometry).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..augment.geometry import geometry_column
from ..augment.maps import check_grid
from ..model.layout import FeatureLayout
from .codec import Codec
from .names import BASE, GEOMETRY, SPECIAL, VIEW, VIEW_INDEX, VIEW_SPECIAL, view_column, view_tensor

#: Fields of a `ViewSpec` that are tensors.
VIEW_TENSORS = ("channels", "outside", "channel_maps", "limits")


class WarpedViews(NamedTuple):
    """What a `ViewSpec` says of views that are not stored whole: its fields of the same names, none of them None."""

    geometry: str
    channels: torch.Tensor
    outside: torch.Tensor


@dataclass(frozen=True)
class ViewSpec:
    """Number of views in a store, and what is stored of each.

    Args:
        count: number of augmented views beside the base view.
        geometry: kind of geometry that is stored; None: views are stored whole.
        channels: int64 `(K,)`, the sensitive channels, ascending; None for whole views.
        outside: float32 `(C,)`, value of a channel where a view shows nothing of the base view; None for whole views.
        channel_maps: float32 `(2, N * C + K + 1, C)`, linear maps that give the other channels from the warped and
            the sensitive ones, see `apply_channel_map`; None: a channel is only warped.
        limits: float32 `(2, C)`, smallest and largest value of a channel; None without channel maps.
        own_inputs: whether each view has model inputs for itself, e.g. labels that a collator draws.

    Shapes: C channels, K of them sensitive, N neighbouring positions.
    """

    count: int = 0
    geometry: str | None = None
    channels: torch.Tensor | None = None
    outside: torch.Tensor | None = None
    channel_maps: torch.Tensor | None = None
    limits: torch.Tensor | None = None
    own_inputs: bool = False

    @property
    def whole(self) -> bool:
        """Whether views are stored whole."""
        return self.geometry is None

    @property
    def warped(self) -> WarpedViews:
        """What is stored of views that are not whole.

        Raises:
            ValueError: if views are stored whole, or a field is missing.
        """
        if self.geometry is None or self.channels is None or self.outside is None:
            raise ValueError("views without geometry, channels and values outside can only be stored whole")
        return WarpedViews(self.geometry, self.channels, self.outside)

    def needs_features(self, layout: FeatureLayout) -> bool:
        """Whether any feature of a view is stored. If only its geometry is, the prefix does not run on the view."""
        return self.whole or len(self.warped.channels) > 0 or layout.special_tokens > 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are tensors, by their names in the codec's file."""
        tensors = {view_tensor(name): getattr(self, name) for name in VIEW_TENSORS}
        return {name: value for name, value in tensors.items() if value is not None}


class ViewColumns:
    """The columns of a store's views.

    View v has the columns `view_<v>` (codes), `view_special_<v>` (special tokens) and `geometry_<v>`. A batch has one
    view per row, and its entries have these names without the number.

    Args:
        spec: what is stored of each view.
        codec: fitted codec of the base view.
    """

    def __init__(self, spec: ViewSpec, codec: Codec):
        self.spec, self.codec = spec, codec
        self._parts: dict[str, Codec] = {}
        if spec.whole:
            return
        channels = spec.warped.channels
        if len(channels):
            self._parts[VIEW] = codec.narrowed(channels)
        if codec.layout.special_tokens:
            self._parts[VIEW_SPECIAL] = codec.for_special_tokens()

    @property
    def entries(self) -> dict[str, tuple[torch.dtype, int]]:
        """Columns of one view: name without the number -> (dtype, length)."""
        if not self.spec.count:
            return {}
        if self.spec.whole:
            return {_WHOLE[name]: column for name, column in self.codec.columns.items()}
        entries = {name: part.columns[BASE] for name, part in self._parts.items()}
        return {**entries, GEOMETRY: geometry_column(self.spec.warped.geometry, check_grid(self.codec.layout))}

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        """All columns of all views: name -> (dtype, length)."""
        views = range(1, self.spec.count + 1)
        return {view_column(name, view): column for view in views for name, column in self.entries.items()}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all views."""
        return sum(dtype.itemsize * length for dtype, length in self.columns.values())

    def encode(
        self, view: int, features: torch.Tensor | None, geometry: torch.Tensor | None, sample_ids: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Encodes one view of some samples.

        Args:
            view: number of the view, from 1.
            features: `(B, *layout.shape)`, features of the view; None if no feature is stored (`needs_features`).
            geometry: `(B, G)`, its geometry; None for whole views.
            sample_ids: numbers of the samples, for error messages.

        Returns:
            Column -> codes or geometry, one row per sample.

        Raises:
            ValueError: if a value is not finite or beyond the range of the codec, or if features or geometry are
                missing.

        Shapes: B samples, G numbers of a view's geometry.
        """
        rows = {}
        if not self.spec.whole:
            if geometry is None:
                raise ValueError(f"view {view} is not stored whole: its geometry is needed")
            rows[GEOMETRY] = geometry
        if self.spec.whole or self._parts:
            if features is None:
                raise ValueError(f"features of view {view} are stored: they are needed")
            rows.update(self._encode_features(features, sample_ids))
        return {view_column(name, view): value for name, value in rows.items()}

    def encode_features(self, view: int, features: torch.Tensor, sample_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Encodes the features of one view of some samples, without its geometry; see `encode`."""
        rows = self._encode_features(features, sample_ids)
        return {view_column(name, view): value for name, value in rows.items()}

    def _encode_features(self, features: torch.Tensor, sample_ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Codes of a view by entry, without its geometry."""
        if self.spec.whole:
            return {_WHOLE[name]: value for name, value in self.codec.encode(features, sample_ids).items()}
        values = self.parts(features)
        return {name: part.encode(values[name], sample_ids)[BASE] for name, part in self._parts.items()}

    def parts(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored of a view's features, by entry: the sensitive channels and the special tokens; or all of it.

        Args:
            features: `(B, *layout.shape)`.

        Shapes: B samples.
        """
        if self.spec.whole:
            return {VIEW: features}
        layout, parts = self.codec.layout, {}
        for name in self._parts:
            if name == VIEW:
                channels = self.spec.warped.channels.to(features.device)
                parts[name] = layout.body(features).index_select(layout.channel_dim + 1, channels)
            else:
                parts[name] = features[:, : layout.special_tokens]
        return parts

    def decode_view(self, columns: Mapping[str, torch.Tensor], view: int) -> dict[str, torch.Tensor]:
        """Decodes what `encode_features` returned, or the same columns as stored.

        Returns:
            Values by entry, as in `parts`.
        """
        if self.spec.whole:
            return {
                VIEW: self.codec.decode(
                    {name: columns[view_column(_WHOLE[name], view)] for name in self.codec.columns}
                )
            }
        return self.decode({name: columns[view_column(name, view)] for name in self._parts})

    def decode(self, entries: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Decodes sensitive channels and special tokens, one view per row.

        Args:
            entries: `view` and `view_special` as `pick` returned them.

        Returns:
            `view`: `(B, P, K)` or `(B, K, H, W)`; `view_special`: `(B, S, C)`; each only if the store has it.

        Shapes: B rows, P positions, K sensitive channels, S special tokens, C channels, H x W positions of a feature
        map.
        """
        return {name: part.decode({BASE: entries[name]}) for name, part in self._parts.items()}

    def pick(
        self,
        base: Mapping[str, np.ndarray],
        views: np.ndarray,
        take: Callable[[str, np.ndarray], np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Picks one view for every row of a batch.

        Args:
            base: columns of the base view. Whole views replace their rows.
            views: int64 `(B,)`, view of each row, 0 for the base view.
            take: reads a column: `take(name, positions)` returns its rows for these positions of the batch.

        Returns:
            The entries of the batch. For stores of sensitive channels these are the columns of the base view, the
            entries of the views, which are 0 in rows that have the base view, and `view_index`, which holds `views`.

        Shapes: B rows.
        """
        if self.spec.whole:
            batch, entries = dict(base), {name: _WHOLE[name] for name in base}
        else:
            batch = {
                name: np.zeros((len(views), length), _numpy(dtype)) for name, (dtype, length) in self.entries.items()
            }
            entries = {name: name for name in batch}
        for view in np.unique(views[views > 0]):
            positions = np.flatnonzero(views == view)
            for name, entry in entries.items():
                batch[name][positions] = take(view_column(entry, view), positions)
        return batch if self.spec.whole else {**base, **batch, VIEW_INDEX: views.astype(np.int64)}


#: Column of the base view -> entry in which a whole view has the same.
_WHOLE = {BASE: VIEW, SPECIAL: VIEW_SPECIAL}


def _numpy(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
