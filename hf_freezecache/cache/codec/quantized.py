"""Codecs that quantize every channel with the same number of bits."""

from collections.abc import Mapping
from typing import ClassVar

import torch

from ...model.layout import FeatureLayout
from .base import Codec
from .clipping import fit_clip_ranges
from .packing import pack, packed_length, planes, unpack
from .special import BodyCodec


class _Quantized(BodyCodec):
    """Uniform quantizer with scale and offset per channel; its clip ranges minimize the squared error.

    Value `v` of channel `c` becomes the code `round((v - offset[c]) / scale[c])`, clipped to `0 .. 2 ** bits - 1`.
    Constant channels have scale 0 and are decoded exactly.

    Shapes: C channels.
    """

    bits: ClassVar[int]

    def __init__(self, layout: FeatureLayout) -> None:
        super().__init__(layout)
        self._tables: dict[str, torch.Tensor] = {}
        self._constants: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    @property
    def fitted(self) -> bool:
        return bool(self._tables)

    def tensors(self) -> dict[str, torch.Tensor]:
        self._check_fitted()
        return {name: table.clone() for name, table in self._tables.items()}

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

    @property
    def _body_bytes(self) -> int:
        return packed_length(self._values, self.bits)

    @property
    def _levels(self) -> int:
        return 2**self.bits - 1

    def _set(self, scale: torch.Tensor, offset: torch.Tensor) -> None:
        tables = {"scale": scale, "offset": offset}
        self._tables = {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in tables.items()}
        self._constants.clear()

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Scale, offset, 1 / scale and the lower edge of the bin of code 0, in shapes that broadcast over features."""
        if device not in self._constants:
            scale, offset = self._tables["scale"], self._tables["offset"]
            inverse = torch.where(scale == 0, 0.0, 1 / scale)
            edge = offset - scale / 2
            shape = (-1, 1, 1) if len(self.layout.shape) == 3 else (-1,)
            self._constants[device] = tuple(t.view(shape).to(device) for t in (scale, offset, inverse, edge))
        return self._constants[device]

    def _fit(self, features: torch.Tensor, weights: torch.Tensor | None) -> None:
        body = self.layout.body(features).movedim(self.layout.channel_dim + 1, 0).flatten(1)
        self._set(*fit_clip_ranges(body, self._levels))

    def _encode_body(self, body: torch.Tensor) -> torch.Tensor:
        _, _, inverse, edge = self._on(body.device)
        work = torch.empty(body.shape, dtype=torch.float32, device=body.device).copy_(body)
        # Separate, correctly rounded operations: whether a multiply-add is fused can depend on the place in the batch.
        work.sub_(edge).mul_(inverse)
        # The bins now begin at whole numbers: truncation to uint8 rounds to the nearest code.
        return pack(work.clamp_(0, self._levels + 0.5).to(torch.uint8).flatten(1), self.bits)

    def _decode_body(self, base: torch.Tensor, out: torch.Tensor) -> None:
        scale, offset, _, _ = self._on(base.device)
        if len(planes(self.bits)) == 1:
            unpack(base, self.bits, out)
        else:
            codes = torch.empty(out.shape, dtype=torch.uint8, device=base.device)
            unpack(base, self.bits, codes)
            out.copy_(codes)
        layout = self.layout.narrowed(self.layout.channels)
        out.unflatten(1, layout.shape).mul_(scale).add_(offset)


class Int8Codec(_Quantized):
    """One byte per value."""

    name = "int8"
    bits = 8


class Int4Codec(_Quantized):
    """Two values per byte."""

    name = "int4"
    bits = 4


class Int3Codec(_Quantized):
    """Eight values in three bytes."""

    name = "int3"
    bits = 3


class Int2Codec(_Quantized):
    """Four values per byte."""

    name = "int2"
    bits = 2
