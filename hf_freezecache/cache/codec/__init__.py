"""How a feature becomes bytes and comes back.

A codec turns a batch of features into rows of bytes (`encode`) and rows into features (`decode`). What a row contains
depends on its own sample and on the fitted tensors alone, never on the batch it was encoded in, so a store can be
written in any order and by any number of processes.

| codec | bits a value | what is lost |
|---|---|---|
| `fp32` | 32 | nothing |
| `fp16` | 16 | precision of float32 and bfloat16 features; nothing of float16 ones |
| `int8`, `int4`, `int3`, `int2` | 8, 4, 3, 2 | precision, and a channel's tails where that lowers the error |
| `mixed`, `mixed@3.5` | 2.5, 3.5 | the same, least where the model's answer is sensitive |
| `zfp`, `zfp@2` | 4, 2 | what ZFP loses at that rate; for comparison |

All but `fp32` and `fp16` keep special tokens in 16 bits.

Lossy storage is part of what makes cached layer freezing affordable: see arXiv 2508.15033.
"""

import re

from ...model.layout import FeatureLayout
from .base import Codec
from .mixed import MixedCodec
from .quantized import Int2Codec, Int3Codec, Int4Codec, Int8Codec
from .raw import Float16Codec, Float32Codec
from .zfp import ZfpCodec

__all__ = ["CODEC_NAMES", "Codec", "check_codec_name", "make_codec"]

_PLAIN: dict[str, type[Codec]] = {
    cls.name: cls for cls in (Float32Codec, Float16Codec, Int8Codec, Int4Codec, Int3Codec, Int2Codec)
}
_RATED: dict[str, type[Codec]] = {"mixed": MixedCodec, "zfp": ZfpCodec}
#: The rate of a bare name, and the lowest and the highest one.
_RATES = {"mixed": (2.5, 1.0, 12.0), "zfp": (4.0, 1.0, 32.0)}
CODEC_NAMES: tuple[str, ...] = (*_PLAIN, *_RATED)


def check_codec_name(name: str) -> tuple[str, float | None]:
    """Reads the name of a codec.

    Args:
        name: one of `CODEC_NAMES`; `mixed` and `zfp` take a rate in bits a value: `mixed@3.5`.

    Returns:
        Which of `CODEC_NAMES`, and the rate; None for codecs without one.

    Raises:
        ValueError: if there is no such codec, or not at this rate.
    """
    family, at, text = name.partition("@")
    if family not in CODEC_NAMES:
        raise ValueError(f"unknown codec {name!r}; choose one of {', '.join(CODEC_NAMES)}")
    if family not in _RATES:
        if at:
            raise ValueError(f"codec {name!r}: {family} has no rate; leave {at + text!r} away")
        return family, None
    rate, lowest, highest = _RATES[family]
    if at:
        # Not `float`: a name is part of a fingerprint, and has few spellings.
        if not re.fullmatch(r"\d+(\.\d+)?", text) or not lowest <= float(text) <= highest:
            raise ValueError(
                f"codec {name!r}: the rate of {family} is a number of bits from {lowest:g} to {highest:g}, "
                f"as in '{family}@{rate:g}'"
            )
        rate = float(text)
    return family, rate


def make_codec(name: str, layout: FeatureLayout) -> Codec:
    """Makes a codec by its name.

    Args:
        name: one of `CODEC_NAMES`, with a rate where it has one (`check_codec_name`).
        layout: of the features.

    Returns:
        The codec; `fp32`, `fp16` and `zfp` are ready, the others need `fit` or `load_tensors`.

    Raises:
        ValueError: if the name is unknown.
        ImportError: if it is `zfp` and `zfpy` is not installed.
    """
    family, rate = check_codec_name(name)
    if rate is None:
        return _PLAIN[family](layout)
    return _RATED[family](layout, rate, name)
