"""Packing codes of a few bits into bytes, with large contiguous operations.

Codes of 1, 2, 4 or 8 bits are packed directly: with `k = 8 // bits` codes per byte and `N = ceil(V / k)`, byte `j`
holds the codes of the values `j`, `j + N`, ..., the first of them in the lowest bits. Codes of other widths are split
into such *planes*, the widest first, which holds the lowest bits: 3 bits are a plane of 2 and a plane of 1, 13 bits
are planes of 8, 4 and 1.

Shapes: B rows, V codes of a row, N bytes of a row.
"""

import torch

#: Widths of planes, the widest first.
WIDTHS = (8, 4, 2, 1)
#: Largest number of bits of a code, whose planes are all different.
MOST_BITS = sum(WIDTHS)


def planes(bits: int) -> list[int]:
    """Widths of the planes of a code of `bits` bits, the plane with the lowest bits first."""
    return [width for width in WIDTHS if bits & width]


def packed_length(values: int, bits: int) -> int:
    """Number of bytes of `values` codes of `bits` bits."""
    return sum(plane_length(values, width) for width in planes(bits))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes.

    Args:
        codes: uint8 or int16 `(B, V)`, below `2 ** bits`; overwritten.
        bits: number of bits of a code; with 9 or more the codes must be int16.

    Returns:
        uint8 `(B, packed_length(V, bits))`.
    """
    widths = planes(bits)
    if len(widths) == 1:
        return pack_plane(codes.to(torch.uint8), bits)
    packed, shift = [], 0
    for width in widths:
        plane = (codes >> shift).bitwise_and_((1 << width) - 1)
        packed.append(pack_plane(plane.to(torch.uint8), width))
        shift += width
    return torch.cat(packed, dim=1)


def unpack(packed: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Unpacks codes into a tensor.

    Args:
        packed: uint8 `(B, packed_length(V, bits))`.
        bits: number of bits of a code.
        out: `(B, V)`, receives the codes; of any dtype that can hold them if they have a single plane, else uint8 or
            int16.
    """
    widths = planes(bits)
    first = plane_length(out.shape[1], widths[0])
    unpack_plane(packed[:, :first], widths[0], out)
    shift = widths[0]
    for width in widths[1:]:
        last = first + plane_length(out.shape[1], width)
        plane = torch.empty(out.shape, dtype=torch.uint8, device=out.device)
        unpack_plane(packed[:, first:last], width, plane)
        out.add_(plane, alpha=1 << shift)
        first, shift = last, shift + width


def plane_length(values: int, width: int) -> int:
    """Number of bytes of one plane of `values` codes."""
    return -(-values // (8 // width))


def pack_plane(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Packs one plane, uint8 `(B, V)` -> `(B, N)`; overwrites the codes."""
    length = plane_length(codes.shape[1], width)
    packed = codes[:, :length]
    for slot in range(1, 8 // width):
        part = codes[:, slot * length : (slot + 1) * length]
        # A shifted code and the bits below it never overlap: an addition is a bitwise or, in one pass.
        packed[:, : part.shape[1]].add_(part, alpha=1 << (slot * width))
    return packed.contiguous()


def unpack_plane(packed: torch.Tensor, width: int, out: torch.Tensor) -> None:
    """Unpacks one plane, uint8 `(B, N)`, into `out`, `(B, V)` of any dtype."""
    length = packed.shape[1]
    for slot in range(8 // width):
        part = out[:, slot * length : (slot + 1) * length]
        codes = packed[:, : part.shape[1]]
        if slot:
            codes = codes >> (slot * width)
        part.copy_(codes if (slot + 1) * width == 8 else codes & ((1 << width) - 1))
