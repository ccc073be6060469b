"""Bytes that are told before a store is written are the bytes of its files."""

from dataclasses import replace

import pytest
from support.builds import Rows, make_spec, on_every_process
from support.helpers import tiny_vit
from support.images import picture_dataset, replayable
from support.packed_stores import FlatRows, pack
from support.sessions import spec_maker_of
from support.view_trainings import train

from hf_freezecache.build.materialize import OverLimit, materialize
from hf_freezecache.build.sizing import estimate_bytes, spec_bytes
from hf_freezecache.cache.rows import split_batch
from hf_freezecache.distributed import Group


@pytest.mark.parametrize(
    "settings", [{}, dict(views=2), dict(sensitive_fraction=1.0), dict(views=0), dict(codec="fp32")]
)
def test_estimated_bytes_are_those_of_the_files(settings, tmp_path):
    trainer, store = train(picture_dataset(100).with_transform(replayable()), tmp_path, **settings)
    spec_maker = spec_maker_of(trainer)
    assert store.bytes == estimate_bytes(spec_maker.make(2, spec_maker.context.config.codec))


@pytest.mark.parametrize(("rows", "batch_size"), [(200, 64), (64, 64), (3, 4)])
def test_estimate_is_the_written_bytes(rows, batch_size, model, tmp_path):
    spec = make_spec(model, tmp_path, Rows(rows), codec="int8", batch_size=batch_size)
    assert estimate_bytes(spec) == materialize(spec, Group()).bytes


@pytest.mark.parametrize("rows", [22, 6])
def test_estimate_for_several_processes_is_the_written_bytes(rows, model, tmp_path):
    spec = make_spec(model, tmp_path, Rows(rows))
    stores = on_every_process(3, lambda group: materialize(spec, group))
    assert estimate_bytes(spec, 3) == stores[0].bytes


# Packed rows


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_limit_counts_rows_that_do_not_pack(codec, tmp_path):
    spec = pack(make_spec(tiny_vit(), tmp_path, codec=codec))
    store = materialize(replace(spec, directory=tmp_path / "free"), Group())
    most = estimate_bytes(spec)
    assert store.bytes <= most
    small = store.total_bytes - store.bytes
    limited = replace(spec, directory=tmp_path / "limited", limit=most + small)
    assert materialize(limited, Group()).total_bytes <= limited.limit
    with pytest.raises(OverLimit):
        materialize(replace(spec, directory=tmp_path / "less", limit=most + small - 100), Group())
    assert not (tmp_path / "less").exists()


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4"])
def test_estimate_from_frames_is_near_the_written_bytes(codec, tmp_path):
    """The largest frames are an upper bound; means that are exact give the bytes but for padding."""
    spec = pack(make_spec(tiny_vit(), tmp_path, FlatRows(60), codec=codec, batch_size=16))
    store = materialize(spec, Group())
    split = split_batch(spec.source.probe(), "pixel_values")
    estimate = spec_bytes(spec, store.codec, split, frame_bytes=store.frame_bytes())
    assert abs(estimate - store.bytes) <= 8 * 2 * 4  # a buffer begins at a multiple of 8, in each of four batches
    assert estimate < estimate_bytes(spec)
