"""Disks that are full or cannot be read never cost a training."""

import errno
import os
import re

import pytest
from support.helpers import (
    assert_same_weights,
    losses,
    manual,
    messages,
    pixel_dataset,
    run,
    through,
    tiny_vit,
    weights,
)

from hf_freezecache import FeatureStore


def test_full_disk_during_a_build_does_not_cost_the_training(tmp_path, caplog, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_freezecache.cache.shards.ShardWriter.write", full)
    frozen = run(tiny_vit(), pixel_dataset(), tmp_path / "frozen", manual("1:3", cache="never"))
    broken = run(tiny_vit(), pixel_dataset(), tmp_path / "broken", manual("1:3", cache="always"))
    assert losses(broken) == losses(frozen)
    assert any("could not be built" in record.message for record in caplog.records)
    assert list((tmp_path / "broken" / "_freeze_cache").iterdir()) == []


@pytest.mark.parametrize("when", ["reserving", "writing", "finishing"])
def test_full_disk_trains_live(when, tmp_path, caplog, monkeypatch):
    calls = []

    def full(*args):
        calls.append(args)
        if when == "writing" and len(calls) < 20:
            return pwrite(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    pwrite = os.pwrite
    if when == "finishing":
        monkeypatch.setattr("hf_freezecache.build.partial.ShardWriter", full)
    else:
        monkeypatch.setattr(os, "posix_fallocate" if when == "reserving" else "pwrite", full)
    dataset = pixel_dataset()
    through_full = run(tiny_vit(), dataset, tmp_path / "w", through("1:2"))
    live = run(tiny_vit(), dataset, tmp_path / "f", manual("1:2", cache="never"))
    assert losses(through_full) == losses(live)
    assert_same_weights(weights(through_full), weights(live))
    assert len(re.findall("No space left on device", messages(caplog))) == 1
    assert not any((tmp_path / "w" / "_freeze_cache").iterdir()) and not through_full.freeze_status().replaying


def test_store_that_cannot_be_read_is_not_deleted(tmp_path, caplog, monkeypatch):
    config = manual("1:3", feature_cache_dir=str(tmp_path / "cache"))
    run(tiny_vit(), pixel_dataset(), tmp_path / "first", config)
    (store,) = (tmp_path / "cache").iterdir()

    def unreadable(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FeatureStore, "verify", unreadable)
    second = run(tiny_vit(), pixel_dataset(), tmp_path / "second", config)
    assert not second.freeze_status().replaying and second.state.global_step == 16
    monkeypatch.undo()
    assert FeatureStore.open(store).verify()
