"""Codecs turn features into bytes and back.

A codec encodes a batch of features as rows of bytes (`encode`) and decodes rows to features (`decode`). A row depends
on its own sample and on the fitted tensors, never on the batch in which it was encoded. So a store can be written in
any order and by any number of processes.

| codec | bits per value | what is lost |
|---|---|---|
| `fp32` | 32 | nothing |
| `fp16` | 16 | precision of float32 and bfloat16 features; nothing of float16 features |
| `int8`, `int4`, `int3`, `int2` | 8, 4, 3, 2 | precision, and a channel's tails where clipping lowers the error |
| `mixed`, `mixed@3.5` | 2.5, 3.5 | the same, least in the channels to whose errors the logits are most sensitive |
| `zfp`, `zfp@2` | 4, 2 | the loss of ZFP at that rate; for comparison |

All codecs but `fp32` and `fp16` store special tokens as float16.

Lossy storage makes cached layer freezing affordable, see arXiv 2508.15033.
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
_RATED: dict[str, type[MixedCodec] | type[ZfpCodec]] = {"mixed": MixedCodec, "zfp": ZfpCodec}
#: Codec -> its rate where a name has none, and its lowest and highest rate, in bits per value.
_RATES = {"mixed": (2.5, 1.0, 12.0), "zfp": (4.0, 1.0, 32.0)}
CODEC_NAMES: tuple[str, ...] = (*_PLAIN, *_RATED)


def check_codec_name(name: str) -> tuple[str, float | None]:
    """Reads the name of a codec.

    Args:
        name: one of `CODEC_NAMES`; `mixed` and `zfp` take a rate in bits per value: `mixed@3.5`.

    Returns:
        The name without the rate, and the rate; None for codecs without a rate.

    Raises:
        ValueError: if there is no such codec, or it does not have this rate.
    """
    family, at, text = name.partition("@")
    if family not in CODEC_NAMES:
        raise ValueError(f"unknown codec {name!r}; choose one of {', '.join(CODEC_NAMES)}")
    if family not in _RATES:
        if at:
            raise ValueError(f"codec {name!r}: {family} has no rate; leave {at + text!r} out")
        return family, None
    rate, lowest, highest = _RATES[family]
    if at:
        # Not `float`: the name is part of a fingerprint, so a rate must not have many spellings.
        if not re.fullmatch(r"\d+(\.\d+)?", text) or not lowest <= float(text) <= highest:
            raise ValueError(
                f"codec {name!r}: the rate of {family} is a number of bits from {lowest:g} to {highest:g}, "
                f"as in '{family}@{rate:g}'"
            )
        rate = float(text)
    return family, rate


def make_codec(name: str, layout: FeatureLayout) -> Codec:
    """Makes a codec.

    Args:
        name: one of `CODEC_NAMES`, optionally with a rate (`check_codec_name`).
        layout: layout of the features.

    Returns:
        The codec. `fp32`, `fp16` and `zfp` are ready for use; the others need `fit` or `load_tensors` first.

    Raises:
        ValueError: if the name is unknown.
        ImportError: if it is `zfp` and `zfpy` is not installed.
    """
    family, rate = check_codec_name(name)
    if rate is None:
        return _PLAIN[family](layout)
    return _RATED[family](layout, rate, name)
