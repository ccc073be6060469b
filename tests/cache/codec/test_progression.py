"""Codecs by depth of the cut."""

import pytest

from hf_freezecache import FreezeCacheConfig
from hf_freezecache.cache.codec.progression import DEFAULT, Progression


@pytest.mark.parametrize(
    ("cut", "codec"),
    [(1, "int8"), (2, "int8"), (3, "int8"), (5, "int8"), (6, "int4"), (8, "int4"), (9, "int3"), (12, "int3")],
)
def test_codec_follows_the_depth_of_the_cut(cut, codec):
    assert Progression.parse("0.25:int8,0.5:int4,0.75:int3").codec_at(cut, 12) == codec


def test_depth_is_reached_exactly_despite_rounding():
    # 0.1 + 0.2 is more than 0.3.
    assert Progression.parse(f"0.0:int8,{0.1 + 0.2}:int4").codec_at(3, 10) == "int4"


def test_rate_of_a_codec_is_understood():
    assert Progression.parse("0.5:mixed@2.5").codec_at(6, 12) == "mixed@2.5"


def test_default_progression_is_one_and_gets_coarser():
    progression = Progression.parse("default")
    assert progression == Progression.parse(DEFAULT)
    codecs = [progression.codec_at(cut, 12) for cut in range(1, 13)]
    order = ["fp32", "fp16", "int8", "int4", "int3", "int2"]
    assert [order.index(codec) for codec in codecs] == sorted(order.index(codec) for codec in codecs)
    assert len(set(codecs)) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4", "depth:codec"),
        ("x:int4", "depth:codec"),
        ("0.5:int5", "int5"),
        ("0.5:", "0.5:"),
        ("1.5:int4", "from 0 to 1"),
        ("-0.5:int4", "from 0 to 1"),
        ("0.5:int4,0.25:int3", "ascending"),
        ("0.5:int4,0.5:int3", "ascending"),
        ("nan:int4", "from 0 to 1"),
        ("", "depth:codec"),
    ],
)
def test_bad_progression_is_refused_with_the_reason(text, message):
    with pytest.raises(ValueError, match=message):
        FreezeCacheConfig(progressive=text)
