"""What a store keeps of augmented views, beside the base view.

A view is kept *whole*, by the codec that keeps the base view; or only its *sensitive channels*, its special tokens and
its geometry are, and the other channels are the base view's, warped on replay (arXiv 2508.15033, similarity-aware
channel augmentation, for any geometry).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..augment.geometry import geometry_column
from ..model.layout import FeatureLayout
from .codec import Codec
from .names import BASE, GEOMETRY, SPECIAL, VIEW, VIEW_INDEX, VIEW_SPECIAL, view_column, view_tensor

#: Fields of a `ViewSpec` that are tensors.
VIEW_TENSORS = ("channels", "outside", "channel_maps", "limits")


@dataclass(frozen=True)
class ViewSpec:
    """Which views a store holds, and what of them.

    Args:
        count: augmented views beside the base view.
        geometry: kind of geometry that is kept; None: whole views are.
        channels: int64 `(K,)`, the sensitive channels, ascending; None for whole views.
        outside: float32 `(C,)`, a channel's value where a view shows nothing of the base view; None for whole views.
        channel_maps: float32 `(2, N * C + K + 1, C)`, how the other channels follow from all warped ones, N positions
            of each, and the sensitive ones, for views that are not mirrored and for those that are; None: each is its
            base view's, warped.
        limits: float32 `(2, C)`, the smallest and the largest value of a channel; None without channel maps.
        own_inputs: whether a view has model inputs of its own (labels that a collator draws).

    Shapes: C channels, K sensitive ones.
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
        """Whether views are kept whole."""
        return self.geometry is None

    def needs_features(self, layout: FeatureLayout) -> bool:
        """Whether anything of a view's features is kept; with its geometry alone the prefix need not run on it."""
        return self.whole or len(self.channels) > 0 or layout.special_tokens > 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """What of it is a tensor, by name."""
        tensors = {view_tensor(name): getattr(self, name) for name in VIEW_TENSORS}
        return {name: value for name, value in tensors.items() if value is not None}


class ViewColumns:
    """The columns of a store's views.

    Columns of view v are `view_<v>` (codes), `view_special_<v>` (special tokens) and `geometry_<v>`. A batch that was
    read has one view per row; its entries are named without the number.

    Args:
        spec: what is kept.
        codec: of the base view, fitted.
    """

    def __init__(self, spec: ViewSpec, codec: Codec):
        self.spec, self.codec = spec, codec
        self._parts: dict[str, Codec] = {}
        if spec.whole:
            return
        if len(spec.channels):
            self._parts[VIEW] = codec.narrowed(spec.channels)
        if codec.layout.special_tokens:
            self._parts[VIEW_SPECIAL] = codec.for_special_tokens()

    @property
    def entries(self) -> dict[str, tuple[torch.dtype, int]]:
        """What a row of a view consists of: name without the number -> (dtype, length)."""
        if not self.spec.count:
            return {}
        if self.spec.whole:
            return {_WHOLE[name]: column for name, column in self.codec.columns.items()}
        entries = {name: part.columns[BASE] for name, part in self._parts.items()}
        return {**entries, GEOMETRY: geometry_column(self.spec.geometry, self.codec.layout.grid)}

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        """All columns of all views: name -> (dtype, length)."""
        views = range(1, self.spec.count + 1)
        return {view_column(name, view): column for view in views for name, column in self.entries.items()}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, all views together."""
        return sum(dtype.itemsize * length for dtype, length in self.columns.values())

    def encode(
        self, view: int, features: torch.Tensor | None, geometry: torch.Tensor | None, sample_ids: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Columns of one view.

        Args:
            view: its number, from 1.
            features: `(B, *layout.shape)`, the view's own; None if nothing of them is kept.
            geometry: `(B, G)`; None for whole views.
            sample_ids: names of the B samples for error messages.

        Raises:
            ValueError: if a value is not finite or beyond what the codec keeps.
        """
        if self.spec.whole:
            rows = {_WHOLE[name]: value for name, value in self.codec.encode(features, sample_ids).items()}
        else:
            layout = self.codec.layout
            rows = {GEOMETRY: geometry}
            for name, part in self._parts.items():
                if name == VIEW:
                    channels = self.spec.channels.to(features.device)
                    values = layout.body(features).index_select(layout.channel_dim + 1, channels)
                else:
                    values = features[:, : layout.special_tokens]
                rows[name] = part.encode(values, sample_ids)[BASE]
        return {view_column(name, view): value for name, value in rows.items()}

    def decode(self, entries: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sensitive channels and special tokens of views, one a row.

        Args:
            entries: `view` and `view_special` as `pick` returned them.

        Returns:
            `view`: `(B, P, K)` or `(B, K, H, W)`; `view_special`: `(B, S, C)`; each only if there is any.
        """
        return {name: part.decode({BASE: entries[name]}) for name, part in self._parts.items()}

    def pick(
        self,
        base: Mapping[str, np.ndarray],
        views: np.ndarray,
        take: Callable[[str, np.ndarray], np.ndarray],
    ) -> dict[str, np.ndarray]:
        """One view of every row.

        Args:
            base: the rows of the base view; whole views take their places there.
            views: int64 `(B,)`, 0 for the base view.
            take: reads a column: `take(name, positions)` -> the rows of the batch at these positions.

        Returns:
            The entries of the batch; where a row's view is the base one, codes and geometry of a view are 0.
        """
        if self.spec.whole:
            picked, entries = dict(base), {name: _WHOLE[name] for name in base}
        else:
            picked = {
                name: np.zeros((len(views), length), _numpy(dtype)) for name, (dtype, length) in self.entries.items()
            }
            entries = {name: name for name in picked}
        for view in np.unique(views[views > 0]):
            positions = np.flatnonzero(views == view)
            for name, entry in entries.items():
                picked[name][positions] = take(view_column(entry, view), positions)
        return picked if self.spec.whole else {**base, **picked, VIEW_INDEX: views.astype(np.int64)}


#: Column of the base view -> entry of a whole view.
_WHOLE = {BASE: VIEW, SPECIAL: VIEW_SPECIAL}


def _numpy(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
