"""How a feature becomes bytes and comes back.

A codec turns a batch of features into rows of bytes (`encode`) and rows into features (`decode`). What a row contains
depends on its own sample and on the fitted tensors alone, never on the batch it was encoded in, so a store can be
written in any order and by any number of processes.

| codec | bits a value | what is lost |
|---|---|---|
| `fp32` | 32 | nothing |
| `fp16` | 16 | precision of float32 and bfloat16 features; nothing of float16 ones |
| `int8`, `int4` | 8, 4, and 16 for special tokens | precision, and a channel's tails where that lowers the error |

Lossy storage is part of what makes cached layer freezing affordable: see arXiv 2508.15033.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ..layout import FeatureLayout
from .clipping import fit_ranges

_FP16_MAX = 65504
# Values in flight while encoding: bounds the memory beside the features, and allocators keep buffers of this size.
_ENCODE_CHUNK = 1 << 21


class Codec(ABC):
    """Turns features of one layout into rows of bytes and back.

    Args:
        layout: of the features; every batch has the shape `(B, *layout.shape)` and the dtype `layout.dtype`.

    Attributes:
        name: what a config calls the codec.
        layout: as given.
    """

    name: ClassVar[str]

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
    def row_bytes(self) -> int:
        """Bytes of one row, all columns together."""
        return sum(dtype.itemsize * length for dtype, length in self.columns.values())

    @property
    def bits_per_value(self) -> float:
        """Stored bits of a row, special tokens included, over the number of values of a feature."""
        return 8 * self.row_bytes / self.layout.values

    @torch.no_grad()
    def fit(self, features: torch.Tensor, sample_ids: Sequence[int] | None = None) -> "Codec":
        """Learns what the codec must know about the features; codecs that need nothing only check them.

        Args:
            features: `(B, *layout.shape)`, at least one sample, finite.
            sample_ids: names of the B samples for error messages; their row index by default.

        Returns:
            The codec itself.

        Raises:
            ValueError: if shape or dtype are not the layout's, there is no sample, or a value is not finite.

        Shapes: B samples.
        """
        self._check_features(features, sample_ids)
        if len(features) == 0:
            raise ValueError(f"codec {self.name!r} cannot be fitted on an empty batch; give it at least one sample")
        self._fit(features)
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
    def _fit(self, features: torch.Tensor) -> None: ...

    @abstractmethod
    def _encode(self, features: torch.Tensor, sample_ids: Sequence[int] | None) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def _decode(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor: ...

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError(f"codec {self.name!r} is not fitted; call fit(features) or load_tensors(...) first")

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


class _Raw(Codec):
    """Stores every value, special tokens too, as a little-endian float."""

    _stored: ClassVar[torch.dtype]
    fitted = True

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        return {"base": (torch.uint8, self.layout.values * self._stored.itemsize)}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "Codec":
        if tensors:
            raise ValueError(f"codec {self.name!r} has no tensors, got {sorted(tensors)}")
        return self

    def narrowed(self, channels: torch.Tensor) -> "Codec":
        return type(self)(self.layout.narrowed(len(channels)))

    def for_special_tokens(self) -> "Codec":
        return type(self)(_special_layout(self.layout))

    def _fit(self, features: torch.Tensor) -> None:
        pass

    def _encode(self, features: torch.Tensor, sample_ids: Sequence[int] | None) -> dict[str, torch.Tensor]:
        if self._stored == torch.float16:
            stored = _to_fp16(features, sample_ids, "use the codec 'fp32' or 'int8'")
        else:
            stored = features.flatten(1).to(self._stored, copy=True)
        return {"base": stored.contiguous().view(torch.uint8)}

    def _decode(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # The copy aligns the bytes for the view, and keeps rows that are mapped read-only out of the model's hands.
        stored = rows["base"].clone(memory_format=torch.contiguous_format).view(self._stored)
        return stored.unflatten(1, self.layout.shape).to(self.layout.dtype)


class Float32Codec(_Raw):
    """Exact for every layout: half-precision features are widened and come back bit for bit."""

    name = "fp32"
    _stored = torch.float32


class Float16Codec(_Raw):
    """Exact for float16 layouts; finite values beyond 65504 are refused, never turned into infinities."""

    name = "fp16"
    _stored = torch.float16


class _Quantized(Codec):
    """Per-channel affine uniform quantizer with clipping that minimizes the squared error.

    Value `v` of channel `c` becomes the code `round((v - offset[c]) / scale[c])`, clipped to `0 .. 2 ** bits - 1`;
    constant channels have scale 0 and come back exactly. Special tokens are few and most of the harm of a coarse code:
    they are left out of the fit and stored as float16.

    Packing: with `k = 8 // bits` codes a byte and `N = ceil(V / k)`, byte `j` holds the codes of the values `j`,
    `j + N`, ..., the first in the lowest bits. So packing and unpacking are k large contiguous operations.

    Shapes: V values of a feature without special tokens, N bytes of a row, C channels.
    """

    bits: ClassVar[int]

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__(layout)
        self._scale: torch.Tensor | None = None
        self._offset: torch.Tensor | None = None
        self._constants: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    @property
    def fitted(self) -> bool:
        return self._scale is not None

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        per_byte = 8 // self.bits
        columns = {"base": (torch.uint8, -(-self._values // per_byte))}
        if self.layout.special_tokens:
            columns["special"] = (torch.float16, self.layout.special_tokens * self.layout.channels)
        return columns

    def tensors(self) -> dict[str, torch.Tensor]:
        self._check_fitted()
        return {"scale": self._scale.clone(), "offset": self._offset.clone()}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "Codec":
        channels = self.layout.channels
        if set(tensors) != {"scale", "offset"}:
            raise ValueError(f"codec {self.name!r} has the tensors scale and offset, got {sorted(tensors)}")
        for key, tensor in tensors.items():
            if tensor.dtype != torch.float32 or tensor.shape != (channels,) or not tensor.isfinite().all():
                raise ValueError(
                    f"{key} of codec {self.name!r} must be {channels} finite float32 values, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        if (tensors["scale"] < 0).any():
            raise ValueError(f"scale of codec {self.name!r} must not be negative")
        self._set(tensors["scale"], tensors["offset"])
        return self

    def narrowed(self, channels: torch.Tensor) -> "Codec":
        narrowed = type(self)(self.layout.narrowed(len(channels)))
        if not self.fitted:
            return narrowed
        return narrowed.load_tensors({name: tensor[channels] for name, tensor in self.tensors().items()})

    def for_special_tokens(self) -> "Codec":
        return Float16Codec(_special_layout(self.layout))

    @property
    def _values(self) -> int:
        return self.layout.positions * self.layout.channels

    @property
    def _levels(self) -> int:
        return 2**self.bits - 1

    def _set(self, scale: torch.Tensor, offset: torch.Tensor) -> None:
        self._scale, self._offset = (t.detach().to("cpu", torch.float32, copy=True) for t in (scale, offset))
        self._constants.clear()

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Returns scale, offset, 1 / scale and the lower edge of code 0's bin, shaped to broadcast over features."""
        if device not in self._constants:
            constant = self._scale == 0
            inverse = torch.where(constant, 0.0, 1 / self._scale)
            edge = self._offset - self._scale / 2
            shape = (-1, 1, 1) if len(self.layout.shape) == 3 else (-1,)
            constants = (self._scale, self._offset, inverse, edge)
            self._constants[device] = tuple(t.view(shape).to(device) for t in constants)
        return self._constants[device]

    def _fit(self, features: torch.Tensor) -> None:
        body = self.layout.body(features).movedim(self.layout.channel_dim + 1, 0).flatten(1)
        self._set(*fit_ranges(body, self._levels))

    def _encode(self, features: torch.Tensor, sample_ids: Sequence[int] | None) -> dict[str, torch.Tensor]:
        parts = self.layout.body(features).split(max(1, _ENCODE_CHUNK // self._values))
        packed = [self._pack(self._codes(part)) for part in parts]
        rows = {"base": packed[0] if len(packed) == 1 else torch.cat(packed)}
        special = self.layout.special_tokens
        if special:
            rows["special"] = _to_fp16(features[:, :special], sample_ids, "use the codec 'fp32'")
        return rows

    def _decode(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        scale, offset, _, _ = self._on(rows["base"].device)
        base, special = rows["base"], self.layout.special_tokens * self.layout.channels
        features = torch.empty(len(base), self.layout.values, dtype=torch.float32, device=base.device)
        self._unpack(base, features[:, special:])
        if special:
            features[:, :special] = rows["special"]
        features = features.unflatten(1, self.layout.shape)
        self.layout.body(features).mul_(scale).add_(offset)
        return features.to(self.layout.dtype)

    def _codes(self, body: torch.Tensor) -> torch.Tensor:
        """Returns the codes, uint8 `(B, V)`, of features without their special tokens."""
        _, _, inverse, edge = self._on(body.device)
        work = torch.empty(body.shape, dtype=torch.float32, device=body.device).copy_(body)
        # Separate, correctly rounded operations: whether a multiply-add is fused may depend on the place in the batch.
        work.sub_(edge).mul_(inverse)
        # The bins begin at whole numbers now, so that truncation to uint8 rounds to the nearest code.
        return work.clamp_(0, self._levels + 0.5).to(torch.uint8).flatten(1)

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Packs codes.

        Args:
            codes: uint8 `(B, V)`.

        Returns:
            uint8 `(B, N)`.

        Shapes: B samples, V codes of a sample, N bytes.
        """
        length = self.columns["base"][1]
        packed = codes[:, :length]
        for slot in range(1, 8 // self.bits):
            part = codes[:, slot * length : (slot + 1) * length]
            # A shifted code and the bits below it never overlap: adding is or-ing, in one pass.
            packed[:, : part.shape[1]].add_(part, alpha=1 << (slot * self.bits))
        return packed.contiguous()

    def _unpack(self, packed: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the codes of `packed`, uint8 `(B, N)`, into `out`, float32 `(B, V)`."""
        length = packed.shape[1]
        for slot in range(8 // self.bits):
            part = out[:, slot * length : (slot + 1) * length]
            codes = packed[:, : part.shape[1]]
            if slot:
                codes = codes >> (slot * self.bits)
            part.copy_(codes if (slot + 1) * self.bits == 8 else codes & self._levels)


class Int8Codec(_Quantized):
    """One byte a value."""

    name = "int8"
    bits = 8


class Int4Codec(_Quantized):
    """Two values a byte."""

    name = "int4"
    bits = 4


_CODECS: dict[str, type[Codec]] = {cls.name: cls for cls in (Float32Codec, Float16Codec, Int8Codec, Int4Codec)}
CODEC_NAMES: tuple[str, ...] = tuple(_CODECS)


def make_codec(name: str, layout: FeatureLayout) -> Codec:
    """Makes a codec by its name.

    Args:
        name: one of `CODEC_NAMES`.
        layout: of the features.

    Returns:
        The codec; `fp32` and `fp16` are ready, the others need `fit` or `load_tensors`.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in _CODECS:
        raise ValueError(f"unknown codec {name!r}; choose one of {', '.join(CODEC_NAMES)}")
    return _CODECS[name](layout)


def _special_layout(layout: FeatureLayout) -> FeatureLayout:
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


def _to_fp16(features: torch.Tensor, sample_ids: Sequence[int] | None, advice: str) -> torch.Tensor:
    """Returns finite features as float16 `(B, values)`, a copy; refuses values that float16 does not reach."""
    half = features.flatten(1).to(torch.float16, copy=True)
    row = _first_not_finite(half)
    if row is not None:
        raise ValueError(
            f"feature of sample {_sample_name(row, sample_ids)} has a value beyond {_FP16_MAX}, "
            f"the largest of float16; {advice}"
        )
    return half
