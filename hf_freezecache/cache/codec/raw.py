"""Codecs that store features as floats."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ..names import BASE
from .base import Codec, ReadyCodec, special_layout, to_fp16


class _Raw(ReadyCodec):
    """Stores every value, also of special tokens, as a little-endian float."""

    _stored: ClassVar[torch.dtype]

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        return {BASE: (torch.uint8, self.layout.values * self._stored.itemsize)}

    def narrowed(self, channels: torch.Tensor) -> "Codec":
        return type(self)(self.layout.narrowed(len(channels)))

    def for_special_tokens(self) -> "Codec":
        return type(self)(special_layout(self.layout))

    def _encode(self, features: torch.Tensor, sample_ids: Sequence[int] | None) -> dict[str, torch.Tensor]:
        if self._stored == torch.float16:
            stored = to_fp16(features, sample_ids, "use the codec 'fp32' or 'int8'")
        else:
            stored = features.flatten(1).to(self._stored, copy=True)
        return {BASE: stored.contiguous().view(torch.uint8)}

    def _decode(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # The copy aligns the bytes for the view, and the model never gets memory that is mapped read-only.
        stored = rows[BASE].clone(memory_format=torch.contiguous_format).view(self._stored)
        return stored.unflatten(1, self.layout.shape).to(self.layout.dtype)


class Float32Codec(_Raw):
    """Exact for every layout: half-precision features are stored as float32 and decoded bit for bit."""

    name = "fp32"
    _stored = torch.float32


class Float16Codec(_Raw):
    """Exact for float16 layouts. Finite values beyond 65504 are an error; they never become infinities."""

    name = "fp16"
    _stored = torch.float16
