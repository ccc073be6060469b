"""What every codec has in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ...model.layout import FeatureLayout

_FP16_MAX = 65504


class Codec(ABC):
    """Turns features of one layout into rows of bytes and back.

    Args:
        layout: of the features; every batch has the shape `(B, *layout.shape)` and the dtype `layout.dtype`.

    Attributes:
        name: what a config calls the codec.
        layout: as given.
        uses_weights: whether `fit` makes something of its `weights`.
    """

    name: str
    uses_weights: ClassVar[bool] = False

    def __init__(self, layout: FeatureLayout) -> None:
        self.layout = layout

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.layout}, fitted={self.fitted})"

    @property
    @abstractmethod
    def fitted(self) -> bool:
        """Whether `encode` and `decode` may be called."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        """The columns of a row: name -> (dtype, length)."""

    @property
    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Shapes that `weights` may have: one a channel; the last one is the finest the codec makes something of."""
        return [(self.layout.channels,)]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, all columns together."""
        return sum(dtype.itemsize * length for dtype, length in self.columns.values())

    @property
    def bits_per_value(self) -> float:
        """Stored bits of a row, special tokens included, over the number of values of a feature."""
        return 8 * self.row_bytes / self.layout.values

    @torch.no_grad()
    def fit(
        self,
        features: torch.Tensor,
        sample_ids: Sequence[int] | None = None,
        weights: torch.Tensor | None = None,
    ) -> "Codec":
        """Learns what the codec must know about the features; codecs that need nothing only check them.

        Args:
            features: `(B, *layout.shape)`, at least one sample, finite.
            sample_ids: names of the B samples for error messages; their row index by default.
            weights: float32 `(C,)`, what a squared error in a channel costs; all the same by default. Codecs that do
                not trade one channel against another (`uses_weights`) leave them alone; see also `weight_shapes`.

        Returns:
            The codec itself.

        Raises:
            ValueError: if shape or dtype are not the layout's, there is no sample, a value is not finite, or the
                weights are not C finite float32 values from 0 on.

        Shapes: B samples, C channels.
        """
        if weights is not None:
            self._check_weights(weights)
        self._check_features(features, sample_ids)
        if len(features) == 0:
            raise ValueError(f"codec {self.name!r} cannot be fitted on an empty batch; give it at least one sample")
        self._fit(features, weights)
        return self

    @torch.no_grad()
    def encode(self, features: torch.Tensor, sample_ids: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """Turns features into rows of bytes.

        Args:
            features: `(B, *layout.shape)`, of dtype `layout.dtype`, finite, on any device.
            sample_ids: names of the B samples for error messages; their row index by default.

        Returns:
            One tensor a column, on the device of the features: `base` uint8 `(B, N)` and, where a quantizing codec
            meets special tokens, `special` float16 `(B, S * C)`. They share no memory with the features.

        Raises:
            RuntimeError: if the codec is not fitted.
            ValueError: if shape or dtype are not the layout's, or a value is not finite or beyond float16 where that
                is the stored type (the sample is named).

        Shapes: B samples, N bytes of `base` (see `columns`), S special tokens, C channels.
        """
        self._check_fitted()
        self._check_features(features, sample_ids)
        return self._encode(features, sample_ids)

    @torch.no_grad()
    def decode(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Turns rows back into features, on the device of the rows.

        Args:
            rows: what `encode` returned, or any selection of such rows; other columns are ignored.

        Returns:
            Features `(B, *layout.shape)` of dtype `layout.dtype`, sharing no memory with the rows.

        Raises:
            RuntimeError: if the codec is not fitted.
            ValueError: if a column is missing or has another shape or dtype than `columns` says.

        Shapes: B rows.
        """
        self._check_fitted()
        for column, (dtype, length) in self.columns.items():
            if column not in rows:
                raise ValueError(f"codec {self.name!r} needs the column {column!r}, got {sorted(rows)}")
            got = rows[column]
            if got.dtype != dtype or got.ndim != 2 or got.shape[1] != length:
                raise ValueError(
                    f"column {column!r} of codec {self.name!r} must be {dtype} of shape (B, {length}), "
                    f"got {got.dtype} of shape {tuple(got.shape)}"
                )
        return self._decode(rows)

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """What `fit` learned: float32 tensors on the CPU; empty for codecs that learn nothing.

        Raises:
            RuntimeError: if the codec is not fitted.
        """

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "Codec":
        """Restores what `tensors` returned; the rows and the features are then the same, bit for bit.

        Returns:
            The codec itself, fitted.

        Raises:
            ValueError: if the tensors are not those of this codec and layout.
        """

    @abstractmethod
    def narrowed(self, channels: torch.Tensor) -> "Codec":
        """The same code for some channels alone, without special tokens; fitted if this codec is.

        Args:
            channels: int64 `(K,)`, at least one.
        """

    @abstractmethod
    def for_special_tokens(self) -> "Codec":
        """The code that special tokens get, as a codec of the layout `(S, C)`; it is fitted.

        Shapes: S special tokens, C channels.
        """

    @abstractmethod
    def _fit(self, features: torch.Tensor, weights: torch.Tensor | None) -> None: ...

    @abstractmethod
    def _encode(self, features: torch.Tensor, sample_ids: Sequence[int] | None) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def _decode(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor: ...

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError(f"codec {self.name!r} is not fitted; call fit(features) or load_tensors(...) first")

    def _check_weights(self, weights: torch.Tensor) -> None:
        shapes = self.weight_shapes
        if weights.dtype != torch.float32 or tuple(weights.shape) not in shapes:
            raise ValueError(
                f"weights of codec {self.name!r} must be float32 of shape {' or '.join(map(str, shapes))}, "
                f"got {weights.dtype} of shape {tuple(weights.shape)}"
            )
        if not weights.isfinite().all() or (weights < 0).any():
            raise ValueError(f"weights of codec {self.name!r} must be finite and not negative")

    def _check_features(self, features: torch.Tensor, sample_ids: Sequence[int] | None) -> None:
        if features.shape[1:] != self.layout.shape:
            expected = ", ".join(["B", *map(str, self.layout.shape)])
            raise ValueError(f"expected features of shape ({expected}), got {tuple(features.shape)}")
        if features.dtype != self.layout.dtype:
            raise ValueError(
                f"expected features of dtype {self.layout.dtype}, got {features.dtype}; "
                "the layout and the features must come from the same precision (autocast included)"
            )
        if sample_ids is not None and len(sample_ids) != len(features):
            raise ValueError(f"got {len(sample_ids)} sample ids for {len(features)} features")
        row = _first_not_finite(features)
        if row is not None:
            raise ValueError(
                f"feature of sample {_sample_name(row, sample_ids)} is not finite (NaN or inf); "
                "check that sample and the precision of the forward pass"
            )


class ReadyCodec(Codec):
    """A codec that learns nothing from features."""

    fitted = True

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "Codec":
        if tensors:
            raise ValueError(f"codec {self.name!r} has no tensors, got {sorted(tensors)}")
        return self

    def _fit(self, features: torch.Tensor, weights: torch.Tensor | None) -> None:
        pass


def special_layout(layout: FeatureLayout) -> FeatureLayout:
    return FeatureLayout((layout.special_tokens, layout.channels), None, 0, layout.dtype)


def _first_not_finite(batch: torch.Tensor) -> int | None:
    """Returns the first row with a NaN or an infinity, `None` if there is none."""
    # One reduction that reads the values once; a finite batch whose sum overflows only costs the second look.
    if batch.sum(dtype=torch.float32).isfinite():
        return None
    bad = ~batch.flatten(1).isfinite().all(dim=1)
    return int(bad.int().argmax()) if bad.any() else None


def _sample_name(row: int, sample_ids: Sequence[int] | None) -> int:
    return row if sample_ids is None else int(sample_ids[row])


def to_fp16(features: torch.Tensor, sample_ids: Sequence[int] | None, advice: str) -> torch.Tensor:
    """Returns finite features as float16 `(B, values)`, a copy; refuses values that float16 does not reach."""
    half = features.flatten(1).to(torch.float16, copy=True)
    row = _first_not_finite(half)
    if row is not None:
        raise ValueError(
            f"feature of sample {_sample_name(row, sample_ids)} has a value beyond {_FP16_MAX}, "
            f"the largest of float16; {advice}"
        )
    return half
