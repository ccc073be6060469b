"""The base class of all codecs, with the checks that all share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ...model.layout import FeatureLayout

_FP16_MAX = 65504


class Codec(ABC):
    """Turns features of one layout into rows of bytes and back.

    Args:
        layout: layout of the features; every batch has the shape `(B, *layout.shape)` and the dtype `layout.dtype`.

    Attributes:
        name: name of the codec in a config.
        layout: layout of the features.
        uses_weights: whether `fit` uses its `weights`.

    Shapes: B samples.
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
        """Shapes that `weights` may have, the coarsest first: `(C,)`, and `(bands, C)` for codecs that use bands."""
        return [(self.layout.channels,)]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all columns."""
        return sum(dtype.itemsize * length for dtype, length in self.columns.values())

    @property
    def bits_per_value(self) -> float:
        """Bits of a row, special tokens included, divided by the number of values of a feature."""
        return 8 * self.row_bytes / self.layout.values

    @torch.no_grad()
    def fit(
        self,
        features: torch.Tensor,
        sample_ids: Sequence[int] | None = None,
        weights: torch.Tensor | None = None,
    ) -> "Codec":
        """Fits the codec to features. Codecs without tensors only check the features.

        Args:
            features: `(B, *layout.shape)`, at least one sample, finite.
            sample_ids: numbers of the samples for error messages; by default their index in the batch.
            weights: float32 `(C,)` or another of `weight_shapes`: factor of the squared error in a channel; by default
                all are equal. Codecs that do not trade one channel against another (`uses_weights`) ignore them.

        Returns:
            The codec itself.

        Raises:
            ValueError: if shape or dtype differ from the layout, there is no sample, a value is not finite, or the
                weights are not finite float32 values of 0 or more, of one of `weight_shapes`.

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
        """Encodes features as rows of bytes.

        Args:
            features: `(B, *layout.shape)`, of dtype `layout.dtype`, finite, on any device.
            sample_ids: numbers of the samples for error messages; by default their index in the batch.

        Returns:
            One tensor per column, on the device of the features: `base` uint8 `(B, N)` and, where a quantizing codec
            has special tokens to store, `special` float16 `(B, S * C)`. They share no memory with the features.

        Raises:
            RuntimeError: if the codec is not fitted.
            ValueError: if shape or dtype differ from the layout, or if a value is not finite, or is beyond the range
                of float16 where it is stored as such; the message names the sample.

        Shapes: B samples, N bytes of `base` (see `columns`), S special tokens, C channels.
        """
        self._check_fitted()
        self._check_features(features, sample_ids)
        return self._encode(features, sample_ids)

    @torch.no_grad()
    def decode(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Decodes rows to features, on the device of the rows.

        Args:
            rows: what `encode` returned, or any selection of its rows; other columns are ignored.

        Returns:
            Features `(B, *layout.shape)` of dtype `layout.dtype`, sharing no memory with the rows.

        Raises:
            RuntimeError: if the codec is not fitted.
            ValueError: if a column is missing or has another shape or dtype than in `columns`.

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
        # Models write to what they get, which they must not if it is a view that was made without gradients.
        return self._decode(rows).detach()

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """The fitted tensors by name: float32, on the CPU; empty for codecs that have none.

        Raises:
            RuntimeError: if the codec is not fitted.
        """

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "Codec":
        """Restores fitted tensors. The codec then encodes and decodes as the fitted one, bit for bit.

        Args:
            tensors: what `tensors` returned.

        Returns:
            The codec itself, fitted.

        Raises:
            ValueError: if the tensors do not belong to this codec and layout.
        """

    @abstractmethod
    def narrowed(self, channels: torch.Tensor) -> "Codec":
        """A codec that encodes some of the channels as this one does, without special tokens; fitted if this one is.

        Args:
            channels: int64 `(K,)`, at least one.

        Shapes: K channels.
        """

    @abstractmethod
    def for_special_tokens(self) -> "Codec":
        """A fitted codec of the layout `(S, C)` that encodes special tokens as this one does.

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
    """A codec without fitted tensors."""

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
    """The layout `(S, C)` of the special tokens alone."""
    return FeatureLayout((layout.special_tokens, layout.channels), None, 0, layout.dtype)


def _first_not_finite(batch: torch.Tensor) -> int | None:
    """Index of the first row with a NaN or an infinity; None if there is none."""
    # One reduction that reads the values once. If the sum of finite values overflows, they are checked a second time.
    if batch.sum(dtype=torch.float32).isfinite():
        return None
    bad = ~batch.flatten(1).isfinite().all(dim=1)
    return int(bad.int().argmax()) if bad.any() else None


def _sample_name(row: int, sample_ids: Sequence[int] | None) -> int:
    return row if sample_ids is None else int(sample_ids[row])


def to_fp16(features: torch.Tensor, sample_ids: Sequence[int] | None, advice: str) -> torch.Tensor:
    """Copies finite features to float16 `(B, values)`.

    Args:
        features: `(B, ...)`.
        sample_ids: numbers of the samples for error messages; None: their index in the batch.
        advice: end of the error message, with the remedy.

    Raises:
        ValueError: if a value is beyond the range of float16; the message names the sample.

    Shapes: B samples.
    """
    half = features.flatten(1).to(torch.float16, copy=True)
    row = _first_not_finite(half)
    if row is not None:
        raise ValueError(
            f"feature of sample {_sample_name(row, sample_ids)} has a value beyond {_FP16_MAX}, "
            f"the largest value of float16; {advice}"
        )
    return half
