"""A codec with a mean rate whose bits go to the channels that affect the loss most."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from ...model.layout import FeatureLayout
from .allocation import allocate
from .base import Codec
from .clipping import fit_rates
from .haar import band_count, from_bands, to_bands
from .packing import WIDTHS, pack_plane, plane_length, planes, unpack_plane
from .special import BodyCodec

#: The most bits that a channel of a band can get.
MOST_BITS = 12
_DECODE_CHUNK = 1 << 20
_TENSORS = ("error", "scale", "offset", "weight")


class MixedCodec(BodyCodec):
    """Quantizer with 0 to 12 bits per channel and a given mean number of bits.

    Features on a grid with even sides are first split into 4 bands by a 2 x 2 Haar transform. Every channel of every
    band has its own quantizer, and the bits go where they lower `sum(weight * squared error)` most (Shoham and Gersho
    1988, "Efficient bit allocation for an arbitrary set of quantizers"). With the Fisher information of the features
    as weights, the sum is the second-order term of the change of the logits. A channel with 0 bits becomes its mean.

    A row consists of the planes of all codes (see `packing`), the widest first. A plane holds the channels that have
    it, ordered by their bits, all positions of one channel after those of another. Zeros fill the row.

    Args:
        layout: layout of the features.
        rate: mean number of bits per value; all channels of a position together get `rate * C` bits, rounded down.
        name: name of the codec in a config, with the rate.

    Shapes: B samples, C channels, I = bands * C channels with their own bits, Z positions of each, L = 13 numbers of
        bits.
    """

    uses_weights: ClassVar[bool] = True

    def __init__(self, layout: FeatureLayout, rate: float, name: str) -> None:
        super().__init__(layout)
        self.name, self.rate = name, rate
        self._bands = band_count(layout)
        # Empty until the codec is fitted; `_set` fills them together with what follows from them.
        self._tables: dict[str, torch.Tensor] = {}
        self._bits: torch.Tensor
        self._constants: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    @property
    def fitted(self) -> bool:
        return bool(self._tables)

    @property
    def bits(self) -> torch.Tensor:
        """Bits of every channel, int64 `(bands, C)`. The bands are sums, differences along W, along H and along both.

        Raises:
            RuntimeError: if the codec is not fitted.
        """
        self._check_fitted()
        return self._bits.view(self._bands, -1).clone()

    def tensors(self) -> dict[str, torch.Tensor]:
        self._check_fitted()
        return {name: table.clone() for name, table in self._tables.items()}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "Codec":
        items = (self._bands, self.layout.channels)
        if set(tensors) != set(_TENSORS):
            raise ValueError(f"codec {self.name!r} has the tensors {', '.join(_TENSORS)}, got {sorted(tensors)}")
        for key, tensor in tensors.items():
            shape = items if key == "weight" else (*items, MOST_BITS + 1)
            if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.isfinite().all():
                raise ValueError(
                    f"{key} of codec {self.name!r} must be finite float32 values of shape {shape}, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
            if key != "offset" and (tensor < 0).any():
                raise ValueError(f"{key} of codec {self.name!r} must not be negative")
        self._set(tensors)
        return self

    def narrowed(self, channels: torch.Tensor) -> "Codec":
        narrowed = MixedCodec(self.layout.narrowed(len(channels)), self.rate, self.name)
        if not self.fitted:
            return narrowed
        return narrowed.load_tensors({name: table[:, channels] for name, table in self._tables.items()})

    @property
    def weight_shapes(self) -> list[tuple[int, ...]]:
        shapes = super().weight_shapes
        return [*shapes, (self._bands, self.layout.channels)] if self._bands > 1 else shapes

    @property
    def _positions(self) -> int:
        return self.layout.positions // self._bands

    @property
    def _body_bytes(self) -> int:
        return -(-int(self.rate * self.layout.channels) * self.layout.positions // 8)

    def _fit(self, features: torch.Tensor, weights: torch.Tensor | None) -> None:
        bands = to_bands(self.layout.body(features), self.layout)
        values = bands.movedim(0, 2).reshape(self._bands * self.layout.channels, -1)
        error, scale, offset = fit_rates(values, MOST_BITS)
        shape = (self._bands, self.layout.channels)
        tables = {
            name: table.unflatten(0, shape) for name, table in zip(_TENSORS, (error, scale, offset), strict=False)
        }
        self._set({**tables, "weight": (torch.ones(shape) if weights is None else weights.expand(shape))})

    def _set(self, tables: Mapping[str, torch.Tensor]) -> None:
        own = {name: tables[name].detach().to("cpu", torch.float32, copy=True).contiguous() for name in _TENSORS}
        errors, weights = own["error"].flatten(0, 1), own["weight"].flatten()
        self._bits = torch.tensor(allocate(errors, weights, self._positions, self._body_bytes))
        order = torch.argsort(self._bits, stable=True)
        self._order = order[self._bits[order] > 0]
        self._groups = [(bits, count) for bits, count in zip(*self._bits.unique(return_counts=True), strict=True)]
        self._groups = [(int(bits), int(count)) for bits, count in self._groups if bits > 0]
        self._dtype = torch.int16 if int(self._bits.max()) > 8 else torch.uint8
        self._tables = own
        self._constants.clear()

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The constants of encoding and decoding on a device; computed once per device.

        Returns:
            Scale and offset, `(bands, C)` each. For the K channels that have bits, ordered by their bits: their
            numbers `(K,)`, and the lower edge of the bin of code 0, 1 / scale and the end of the last bin, `(K, 1)`
            each. For every channel its place among the K `(I,)`; K for channels with 0 bits.
        """
        if device not in self._constants:
            column = self._bits[:, None]
            scale, offset = (self._tables[name].flatten(0, 1).gather(1, column)[:, 0] for name in ("scale", "offset"))
            order = self._order
            inverse = torch.where(scale == 0, 0.0, 1 / scale)
            edge = offset - scale / 2
            top = (1 << self._bits) - 0.5
            place = torch.full((len(scale),), len(order))
            place[order] = torch.arange(len(order))
            # The inverse transform halves its input. Halving the constants is exact and costs nothing.
            halved = 0.5 if self._bands > 1 else 1.0
            shape = (self._bands, -1)
            constants = [(scale * halved).view(shape), (offset * halved).view(shape), order]
            constants += [t[order, None] for t in (edge, inverse, top.float())] + [place]
            self._constants[device] = tuple(t.to(device) for t in constants)
        return self._constants[device]

    def _encode_body(self, body: torch.Tensor) -> torch.Tensor:
        _, _, order, edge, inverse, top, _ = self._on(body.device)
        work = to_bands(body, self.layout).flatten(1, 2).index_select(1, order)
        # Separate, correctly rounded operations, as in the other quantizers; truncation rounds to the nearest code.
        work.sub_(edge).mul_(inverse).clamp_(min=0)
        codes = torch.minimum(work, top, out=work).to(self._dtype).flatten(1)
        packed = []
        for width, members in self._sections():
            parts = [(codes[:, span] >> shift) & ((1 << width) - 1) for span, shift in members]
            packed.append(pack_plane(torch.cat(parts, dim=1).to(torch.uint8), width))
        rest = self._body_bytes - sum(part.shape[1] for part in packed)
        packed.append(torch.zeros(len(body), rest, dtype=torch.uint8, device=body.device))
        return torch.cat(packed, dim=1)

    def _decode_body(self, base: torch.Tensor, out: torch.Tensor) -> None:
        # In parts on a CPU: large temporary tensors return their pages to the system when they are freed, and to
        # request them again costs more than all the arithmetic. An accelerator's allocator keeps its memory.
        rows = max(1, _DECODE_CHUNK // self._values) if base.device.type == "cpu" else max(1, len(base))
        for part, target in zip(base.split(rows), out.split(rows), strict=True):
            self._decode_part(part, target)

    def _decode_part(self, base: torch.Tensor, out: torch.Tensor) -> None:
        scale, offset, *_, place = self._on(base.device)
        bands = self._unpack(base).index_select(1, place).unflatten(1, (self._bands, -1))
        if len(self.layout.shape) == 3:
            scale, offset = scale[..., None], offset[..., None]
        else:
            bands, scale, offset = bands.transpose(2, 3), scale[:, None], offset[:, None]
        if self._bands == 1:
            shape = bands.shape[1:]
            out.unflatten(1, shape).copy_(bands).mul_(scale).add_(offset)
        else:
            work = torch.empty(bands.shape, dtype=torch.float32, device=base.device).copy_(bands)
            from_bands(work.mul_(scale).add_(offset), self.layout, out)

    def _unpack(self, base: torch.Tensor) -> torch.Tensor:
        """The codes of the K channels that have bits, ordered by bits, and one channel of zeros: `(B, K + 1, Z)`."""
        count, positions = len(self._order), self._positions
        codes = torch.empty(len(base), (count + 1) * positions, dtype=self._dtype, device=base.device)
        codes[:, count * positions :] = 0
        start = 0
        for width, members in self._sections():
            values = sum(span.stop - span.start for span, _ in members)
            end = start + plane_length(values, width)
            plane = torch.empty(len(base), values, dtype=torch.uint8, device=base.device)
            unpack_plane(base[:, start:end], width, plane)
            first = 0
            for span, shift in members:
                last = first + span.stop - span.start
                if shift:
                    codes[:, span].add_(plane[:, first:last], alpha=1 << shift)
                else:
                    codes[:, span] = plane[:, first:last]
                first = last
            start = end
        return codes.unflatten(1, (count + 1, positions))

    def _sections(self) -> Iterator[tuple[int, list[tuple[slice, int]]]]:
        """Yields the planes of a row: width, and for each group of channels its codes and its lowest bit there."""
        for width in WIDTHS:
            members, first = [], 0
            for bits, count in self._groups:
                last = first + count * self._positions
                if bits & width:
                    members.append((slice(first, last), sum(wider for wider in planes(bits) if wider > width)))
                first = last
            if members:
                yield width, members
