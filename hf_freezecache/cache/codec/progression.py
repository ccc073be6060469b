"""Codecs by depth: the deeper the cut, the fewer bits a feature needs (arXiv 2508.15033, progressive compression)."""

from __future__ import annotations

from dataclasses import dataclass

from . import check_codec_name

#: The progression of `progressive="default"`; `benchmarks/codecs` has the measurements behind it.
DEFAULT = "0.0:int4,0.7:int3"


@dataclass(frozen=True)
class Progression:
    """Codecs by depth.

    Args:
        steps: `(depth, codec)`, ascending depths from 0 to 1. Below the first depth, the first codec is used.
    """

    steps: tuple[tuple[float, str], ...]

    @classmethod
    def parse(cls, text: str) -> Progression:
        """Reads a progression from a config.

        Args:
            text: e.g. `"0.25:int8,0.5:int4,0.75:int3"`, or `"default"`.

        Raises:
            ValueError: on a syntax error, an unknown codec, or depths that are not fractions in ascending order.
        """
        steps = []
        for part in (DEFAULT if text == "default" else text).split(","):
            depth, colon, codec = part.strip().partition(":")
            try:
                check_codec_name(codec.strip())
                steps.append((float(depth), codec.strip()))
            except ValueError as error:
                reason = str(error) if colon and _is_number(depth) else "it is not `depth:codec`"
                raise ValueError(
                    f"progressive={text!r}: {part.strip()!r} is not understood: {reason}. Write depth:codec pairs, "
                    "e.g. '0.25:int8,0.5:int4,0.75:int3', or 'default'."
                ) from error
        depths = [depth for depth, _ in steps]
        if not all(0 <= depth <= 1 for depth in depths) or depths != sorted(set(depths)):
            raise ValueError(f"progressive={text!r}: depths are fractions of the blocks, from 0 to 1, ascending.")
        return cls(tuple(steps))

    def codec_at(self, cut: int, num_blocks: int) -> str:
        """The codec at a cut.

        Args:
            cut: number of frozen blocks.
            num_blocks: number of blocks, `len(chain)`.
        """
        reached = [codec for depth, codec in self.steps if depth <= cut / num_blocks + 1e-9]
        return reached[-1] if reached else self.steps[0][1]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
