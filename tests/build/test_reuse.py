"""Stores of earlier runs: used where rows computed again agree, refused or renewed in parts where they do not."""

import errno
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from support.builds import Rows, collate, on_every_process
from support.helpers import manual, tiny_vit
from support.images import OpaqueFlip, picture_dataset, replayable
from support.keepers import make_context
from torch.utils.data import ConcatDataset, Subset

from hf_freezecache.build.errors import BuildFailed
from hf_freezecache.build.materialize import materialize
from hf_freezecache.build.reuse import EDITION, StoreReuse
from hf_freezecache.build.spec_maker import SpecMaker
from hf_freezecache.cache.row_files import ROW_FILES
from hf_freezecache.cache.rows import ChosenRows, RowSource
from hf_freezecache.distributed import Group


class Gained(Rows):
    """Rows that depend on something that nobody can see from outside."""

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        gain = float(os.environ["TEST_GAIN"]) if row == int(os.environ["TEST_GAIN_ROW"]) else 1.0
        return {**sample, "pixel_values": sample["pixel_values"] * gain}


class Files(torch.utils.data.Dataset):
    """As a folder of images: paths and labels."""

    def __init__(self, folder: Path, rows: int = 22):
        self.folder, self.samples = str(folder), [(str(folder / f"{row}.npy"), row % 5) for row in range(rows)]
        self.read: list[int] = []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        path, label = self.samples[row]
        return {"pixel_values": torch.from_numpy(np.load(path)), "labels": label}

    def write(self, rows, seed):
        for row in rows:
            np.save(
                self.samples[row][0], np.random.default_rng((seed, row)).normal(size=(3, 16, 16)).astype("float32")
            )


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    dataset = Files(tmp_path / "images")
    dataset.write(range(22), seed=0)
    return dataset


def maker(folder, dataset, group=None, **settings):
    config = manual("1:2", **{"codec": "fp32", **settings})
    return SpecMaker(make_context(folder / "cache", config, tiny_vit(), dataset, group))


def find_or_build(spec_maker, group=None):
    """The store, and whether it is an old one."""
    spec = spec_maker.make(2, spec_maker.context.config.codec)
    store = spec_maker.reuse.open(spec)
    if store is not None:
        return store, not spec_maker.reuse.has_made(store)
    settled = spec_maker.settle(spec_maker.reuse.current(spec))
    return materialize(settled, group or Group()), False


def run_again(folder, dataset, **settings):
    return find_or_build(maker(folder, dataset, **settings))


def features(store):
    return store.read(range(len(store)))


@pytest.fixture
def gain(monkeypatch):
    def set_gain(row, by):
        monkeypatch.setenv("TEST_GAIN", str(by))
        monkeypatch.setenv("TEST_GAIN_ROW", str(row))

    set_gain(-1, 1.0)
    return set_gain


def test_equal_run_uses_the_store(tmp_path, gain):
    first, _ = run_again(tmp_path, Gained())
    again, reused = run_again(tmp_path, Gained())
    assert reused and again.path == first.path


@pytest.mark.parametrize("row", [0, 10, 21])
def test_changed_row_refuses_the_store_and_names_the_row(row, tmp_path, gain, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    first, _ = run_again(tmp_path, Gained())
    gain(row, 1.5)
    second, reused = run_again(tmp_path, Gained())
    assert not reused and second.path != first.path and first.path.exists()
    assert f"sample {row} differs in features" in caplog.text and "Likely cause" in caplog.text
    assert second.manifest.made_from[EDITION] == 1
    different = (features(first) != features(second)).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert different == [row]


def test_both_editions_are_found_again(tmp_path, gain):
    first, _ = run_again(tmp_path, Gained())
    gain(10, 1.5)
    second, _ = run_again(tmp_path, Gained())
    assert run_again(tmp_path, Gained())[0].path == second.path
    gain(-1, 1.0)
    assert run_again(tmp_path, Gained())[0].path == first.path
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("setting", [{"views": 1}, {"views": 0}])
@pytest.mark.parametrize("transform", [replayable, OpaqueFlip])
def test_augmented_rows_are_proved_view_by_view(transform, setting, tmp_path):
    first, _ = run_again(tmp_path, picture_dataset().with_transform(transform()), **setting)
    again, reused = run_again(tmp_path, picture_dataset().with_transform(transform()), **setting)
    assert reused and again.path == first.path


@pytest.mark.parametrize("settings", [{"batch_size": 5}, {"seed": 9}, {"num_workers": 1}])
def test_settings_on_which_nothing_drawn_depends_do_not_count(settings, tmp_path):
    first, _ = run_again(tmp_path, Rows(), codec="int4")
    spec_maker = maker(tmp_path, Rows(), codec="int4")
    source = RowSource(Rows(), collate, **{"batch_size": 4, "seed": 3, **settings})
    again, reused = find_or_build(SpecMaker(replace(spec_maker.context, source=source)))
    assert reused and again.path == first.path


def test_never_uses_the_stores_of_this_training_alone(tmp_path):
    spec_maker = maker(tmp_path, Rows(), reuse="never")
    first, _ = find_or_build(spec_maker)
    other, reused = run_again(tmp_path, Rows(), reuse="never")
    assert not reused and other.path != first.path
    resumed = maker(tmp_path, Rows(), reuse="never")
    resumed.unknown = spec_maker.unknown
    again, reused = find_or_build(resumed)
    assert reused and again.path == first.path


def test_all_processes_share_the_rows_and_agree(tmp_path, gain):
    run_again(tmp_path, Gained())
    gain(11, 1.5)

    def work(group):
        return find_or_build(maker(tmp_path, Gained(), group), group=group)

    results = on_every_process(2, work)
    assert not [result for result in results if isinstance(result, Exception)]
    assert len({store.path for store, _ in results}) == 1 and not any(reused for _, reused in results)


# Files


def test_six_replaced_files_cost_their_ranges_and_give_the_bytes_of_a_build(files, tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    first, _ = run_again(tmp_path, files)
    assert first.read_note(ROW_FILES)["bytes"].shape == (22,)
    files.write([2, 3, 13], seed=1)
    spec_maker = maker(tmp_path, files)
    ran = []
    counting = replace(spec_maker.context, count_run=lambda a, b, samples, width: ran.append(samples))
    spec_maker = SpecMaker(counting)
    renewed, reused = find_or_build(spec_maker)
    assert not reused and renewed.path != first.path and renewed.verify()
    assert "3 of 22 samples, the first of them 2" in caplog.text
    assert sum(ran) == 8, "two ranges of a build"
    fresh, _ = run_again(tmp_path / "fresh", files)
    assert [shard.sha256 for shard in renewed.manifest.shards] == [shard.sha256 for shard in fresh.manifest.shards]
    again, reused = run_again(tmp_path, files)
    assert reused and again.path == renewed.path


def test_a_full_disk_while_a_store_is_renewed_leaves_the_old_one_and_nothing_else(files, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    first, _ = run_again(tmp_path, files)
    files.write([2], seed=1)
    monkeypatch.setattr("hf_freezecache.build.renewal.complete_store", full)
    with pytest.raises(BuildFailed, match="No space left on device") as raised:
        run_again(tmp_path, files)
    assert isinstance(raised.value.__cause__, OSError)
    assert [*(tmp_path / "cache").iterdir()] == [first.path] and first.verify()


@pytest.mark.parametrize("codec", ["int4", "int8"])
@pytest.mark.parametrize("transform", [replayable, OpaqueFlip])
def test_views_of_replaced_files_are_computed_again(transform, codec, tmp_path):
    paths = [str(tmp_path / f"{row}.png") for row in range(22)]

    def write(row, seed):
        content = np.random.default_rng((seed, row)).integers(0, 255, (16, 16, 3)).astype("uint8")
        PIL.Image.fromarray(content).save(paths[row])

    def rows():
        dataset = datasets.Dataset.from_dict({"image": paths, "labels": [row % 5 for row in range(22)]})
        return dataset.cast_column("image", datasets.Image()).with_transform(transform())

    for row in range(22):
        write(row, 0)
    first, _ = run_again(tmp_path, rows(), codec=codec)
    write(5, 1)
    renewed, reused = run_again(tmp_path, rows(), codec=codec)
    assert not reused and renewed.manifest.views == 1 and renewed.codec.name == first.codec.name
    old, new = first.dataset.with_format("arrow")[:], renewed.dataset.with_format("arrow")[:]
    differing = [row for row in range(22) if old.slice(row, 1) != new.slice(row, 1)]
    assert differing == [5]


def test_most_files_replaced_builds_anew(files, tmp_path):
    first, _ = run_again(tmp_path, files)
    files.write(range(15), seed=1)
    second, _ = run_again(tmp_path, files)
    fresh, _ = run_again(tmp_path / "fresh", files)
    assert torch.equal(features(second), features(fresh)) and second.path != first.path


def test_moved_folder_is_the_same_data(files, tmp_path):
    first, _ = run_again(tmp_path, files)
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    again, reused = run_again(tmp_path, Files(tmp_path / "elsewhere"))
    assert reused and again.path == first.path


@pytest.mark.parametrize(("reuse", "kept"), [("proved", False), ("content", True)])
def test_touched_files_are_equal_by_content_only(reuse, kept, files, tmp_path):
    first, _ = run_again(tmp_path, files, reuse=reuse)
    for path, _ in files.samples[:3]:
        os.utime(path, ns=(1, 1))
    again, reused = run_again(tmp_path, files, reuse=reuse)
    assert reused == kept and torch.equal(features(again), features(first))


def test_same_size_and_time_but_other_content_is_seen_by_content(files, tmp_path):
    first, _ = run_again(tmp_path, files, reuse="content")
    status = os.stat(files.samples[7][0])
    files.write([7], seed=1)
    os.utime(files.samples[7][0], ns=(status.st_atime_ns, status.st_mtime_ns))
    again, reused = run_again(tmp_path, files, reuse="content")
    assert not reused
    assert (features(again) != features(first)).flatten(1).any(1).nonzero()[:, 0].tolist() == [7]


@pytest.mark.parametrize("wrap", [lambda a: Subset(a, range(20)), lambda a: ConcatDataset([a, Rows(6)])])
def test_files_behind_wrapped_data_sets_are_compared(wrap, files, tmp_path):
    first, _ = run_again(tmp_path, wrap(files))
    files.write([9], seed=1)
    again, reused = run_again(tmp_path, wrap(files))
    assert not reused
    assert (features(again) != features(first)).flatten(1).any(1).nonzero()[:, 0].tolist() == [9]


def test_renewed_store_has_the_same_bytes_from_several_processes(files, tmp_path):
    run_again(tmp_path, files)
    files.write([2, 3, 13], seed=1)
    results = on_every_process(2, lambda group: find_or_build(maker(tmp_path, files, group), group=group))
    assert not [result for result in results if isinstance(result, Exception)]
    fresh, _ = run_again(tmp_path / "fresh", files)
    assert torch.equal(features(results[0][0]), features(fresh))


def test_rows_that_cannot_be_computed_together_are_compared_in_their_ranges(tmp_path, monkeypatch, gain, caplog):
    """Rows far apart may fail together, for lack of memory for instance: their own ranges are the proof then."""
    store, _ = run_again(tmp_path, Gained())
    original, tried = StoreReuse._compare, []

    def fails_together(self, features, *args):
        tried.append(isinstance(features.source, ChosenRows))
        if tried[-1]:
            raise RuntimeError("no room for these rows")
        return original(self, features, *args)

    monkeypatch.setattr(StoreReuse, "_compare", fails_together)
    caplog.set_level("DEBUG", logger="hf_freezecache")
    again, reused = run_again(tmp_path, Gained())
    assert again.path == store.path and tried == [True, False]
    told = [record for record in caplog.records if "could not be computed together" in record.getMessage()]
    assert "no room for these rows (RuntimeError)" in told[0].getMessage() and told[1].exc_info[0] is RuntimeError
