"""The codec ZFP, which arXiv 2508.15033 uses, for comparison."""

from __future__ import annotations

import numpy as np
import torch

from ...model.layout import FeatureLayout
from .base import Codec, ReadyCodec
from .special import BodyCodec

try:
    import zfpy
except ImportError:
    zfpy = None


class ZfpCodec(ReadyCodec, BodyCodec):
    """ZFP at a fixed rate (Lindstrom 2014, "Fixed-rate compressed floating-point arrays"; used by arXiv 2508.15033).

    Every sample is one array: `(H, W, C)` if both sides of the grid are multiples of 4, the side of ZFP's blocks, else
    `(positions, C)`. No other arrangement had a lower KL divergence of the logits at the same number of bits, padding
    included (`benchmarks/codecs`). ZFP runs on the CPU: features and rows are copied there and back.

    Args:
        layout: layout of the features.
        rate: bits per value as ZFP counts them: it pads arrays to whole blocks.
        name: name of the codec in a config, with the rate.

    Raises:
        ImportError: if `zfpy` is not installed.
    """

    def __init__(self, layout: FeatureLayout, rate: float, name: str) -> None:
        super().__init__(layout)
        if zfpy is None:
            raise ImportError(f"codec {name!r} needs zfpy: pip install 'hf_freezecache[zfp]', or choose 'mixed'.")
        self.name, self.rate = name, rate
        grid, channels = layout.grid, layout.channels
        self._shape: tuple[int, ...] = (layout.positions, channels)
        if grid is not None and not any(side % 4 for side in grid):
            self._shape = (*grid, channels)
        # At a fixed rate, all arrays of one shape have the same number of bytes.
        self._length = len(self._compress(np.zeros(self._shape, np.float32)))

    def narrowed(self, channels: torch.Tensor) -> Codec:
        return ZfpCodec(self.layout.narrowed(len(channels)), self.rate, self.name)

    @property
    def _body_bytes(self) -> int:
        return self._length

    def _compress(self, array: np.ndarray) -> bytes:
        return zfpy.compress_numpy(array, rate=self.rate, write_header=False)

    def _encode_body(self, body: torch.Tensor) -> torch.Tensor:
        if len(self.layout.shape) == 3:
            body = body.permute(0, 2, 3, 1)
        arrays = body.to("cpu", torch.float32).reshape(len(body), *self._shape).contiguous().numpy()
        rows = np.empty((len(arrays), self._length), np.uint8)
        for row, array in zip(rows, arrays, strict=True):
            row[:] = np.frombuffer(self._compress(array), np.uint8)
        return torch.from_numpy(rows).to(body.device)

    def _decode_body(self, base: torch.Tensor, out: torch.Tensor) -> None:
        arrays = torch.empty(len(base), *self._shape)
        kind = zfpy.dtype_to_ztype(np.dtype(np.float32))
        for row, array in zip(base.cpu().numpy(), arrays.numpy(), strict=True):
            zfpy._decompress(row.tobytes(), kind, self._shape, out=array, rate=self.rate)
        if len(self.layout.shape) == 3:
            arrays = arrays.view(len(base), *self.layout.shape[1:], self.layout.channels).permute(0, 3, 1, 2)
        out.copy_(arrays.reshape(out.shape))
