"""Real disks that fill, run out of inodes, or cannot be written any more cost no training and leave no half store."""

import pytest
from support.helpers import make_args, manual, pixel_dataset, tiny_vit

from benchmarks.faults import disks
from benchmarks.faults.disks import DISK_FAULTS, freeze_only_settings, run_fault, run_freeze_only
from hf_freezecache import FreezeCacheTrainer

QUICK = ("fills in a build", "is read-only before a build")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DISK_FAULTS]


@pytest.fixture(scope="module")
def mounts(processes):
    reason = disks.why_impossible()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def frozen(mounts, tmp_path_factory):
    """The training without cache and fault, by its settings."""
    found = {}

    def train(fault):
        key = str(freeze_only_settings(fault))
        if key not in found:
            found[key] = run_freeze_only(fault, tmp_path_factory.mktemp("frozen"))
        return found[key]

    return train


@pytest.mark.parametrize("name", NAMES)
def test_disk_that_fails_costs_no_training(name, frozen, tmp_path):
    story = run_fault(name, tmp_path, frozen(DISK_FAULTS[name]))
    assert story.survived, story


def test_every_place_where_stores_are_written_is_met_by_a_full_disk():
    settings = [(fault.moment, dict(fault.settings)) for fault in DISK_FAULTS.values() if fault.how == "fills"]
    assert any("deepen" in chosen for _, chosen in settings) and any("cache_eval" in chosen for _, chosen in settings)
    assert {moment for moment, _ in settings} >= {"in a shard", "in the second shard", "in a writing epoch"}


# Directories that could not be written from the beginning on


def test_directory_that_cannot_be_written_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path),
        train_dataset=pixel_dataset(),
        freeze_cache=manual("3:2", feature_cache_dir=str(tmp_path / "file")),
    )
    with pytest.raises(OSError, match="not writable.*feature_cache_dir"):
        trainer.train()
    assert trainer.state.global_step == 0
