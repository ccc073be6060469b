"""Codecs that store special tokens separately from the other values."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch

from ..names import BASE, SPECIAL
from .base import Codec, special_layout, to_fp16
from .raw import Float16Codec

# Values that are encoded at once: this bounds the memory besides the features, and allocators reuse such buffers.
_ENCODE_CHUNK = 1 << 21


class BodyCodec(Codec):
    """A codec of the *body*: all values but those of special tokens (CLS, distillation, registers).

    Special tokens are few, and most of the harm of a coarse code comes from their errors. So they are stored as
    float16 and do not take part in the fit.

    Shapes: B samples, V values of a body, N bytes of its row.
    """

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        columns = {BASE: (torch.uint8, self._body_bytes)}
        if self.layout.special_tokens:
            columns[SPECIAL] = (torch.float16, self.layout.special_tokens * self.layout.channels)
        return columns

    def for_special_tokens(self) -> Codec:
        return Float16Codec(special_layout(self.layout))

    @property
    def _values(self) -> int:
        return self.layout.positions * self.layout.channels

    def _encode(self, features: torch.Tensor, sample_ids: Sequence[int] | None) -> dict[str, torch.Tensor]:
        parts = self.layout.body(features).split(max(1, _ENCODE_CHUNK // self._values))
        packed = [self._encode_body(part) for part in parts]
        rows = {BASE: packed[0] if len(packed) == 1 else torch.cat(packed)}
        special = self.layout.special_tokens
        if special:
            rows[SPECIAL] = to_fp16(features[:, :special], sample_ids, "use the codec 'fp32'")
        return rows

    def _decode(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        base, special = rows[BASE], self.layout.special_tokens * self.layout.channels
        features = torch.empty(len(base), self.layout.values, dtype=torch.float32, device=base.device)
        self._decode_body(base, features[:, special:])
        if special:
            features[:, :special] = rows[SPECIAL]
        return features.unflatten(1, self.layout.shape).to(self.layout.dtype)

    @property
    @abstractmethod
    def _body_bytes(self) -> int:
        """Bytes of the row of a body."""

    @abstractmethod
    def _encode_body(self, body: torch.Tensor) -> torch.Tensor:
        """Encodes features without their special tokens as uint8 `(B, N)`."""

    @abstractmethod
    def _decode_body(self, base: torch.Tensor, out: torch.Tensor) -> None:
        """Decodes `base`, uint8 `(B, N)`, into `out`, float32 `(B, V)` with contiguous rows."""
