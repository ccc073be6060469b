"""Batches of images, of images whose views are named, and of cached rows."""

import pytest
import torch
from support import zoo
from support.asking import TrainingLoader, ask, ask_singly, wrap
from support.builds import NoItems, Rows, build, collate
from support.helpers import pixel_dataset
from support.images import picture_dataset, replayable
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_freezecache.augment.geometry import PROJECTIVE
from hf_freezecache.replay.collator import CODE_PREFIX, ROW_PREFIX, ReplayCollator, is_code, take_codes, take_drawn
from hf_freezecache.replay.dataset import rotate_views
from hf_freezecache.replay.requests import WriteRound


def test_live_samples_go_through_the_users_collator_untouched():
    seen = []

    def collator(samples):
        seen.append(samples)
        return {"anything": len(samples)}

    samples = [{"pixel_values": torch.zeros(1)}, {"pixel_values": torch.ones(1)}]
    assert ReplayCollator(collator)(samples) == {"anything": 2}
    assert seen[0] is samples
    assert ReplayCollator(collator)([]) == {"anything": 0}


def test_cached_rows_become_codes_and_inputs_without_the_users_collator(store):
    def forbidden(samples):
        raise AssertionError("cached rows do not go through the user's collator")

    dataset = wrap(NoItems())
    dataset.switch.set(store.path)
    whole = ReplayCollator(forbidden)(ask(dataset, [4, 2]))
    assert set(whole) == {CODE_PREFIX + "base", CODE_PREFIX + "special", "labels", ROW_PREFIX + "table"}
    assert whole[CODE_PREFIX + "base"].dtype == torch.uint8
    # A loader without `__getitems__` hands over single rows.
    dataset.switch.epoch = 0
    single = ReplayCollator(forbidden)(ask_singly(dataset, [4, 2]))
    assert single.keys() == whole.keys()
    assert all(torch.equal(single[name], whole[name]) for name in whole)


def test_single_rows_with_strings_and_constants_merge(tmp_path):
    class Named(Rows):
        def __getitem__(self, row):
            return {**super().__getitem__(row), "name": f"n{row}"}

    store = build(
        zoo.make("vit"), tmp_path, Named(6), collator=lambda samples: {**collate(samples), "scale": 2.5, "none": None}
    )
    dataset = wrap(NoItems(6))
    dataset.switch.set(store.path)
    batch = ReplayCollator(collate)(ask_singly(dataset, [5, 0, 5]))
    assert batch["name"] == ["n5", "n0", "n5"] and batch["scale"] == 2.5 and batch["none"] is None
    assert batch["labels"].tolist() == [0, 0, 0]


def test_model_input_named_as_a_codec_column_of_another_codec_is_no_code(tmp_path):
    store = build(zoo.make("vit"), tmp_path, Rows(6), collator=lambda s: {**collate(s), "view_0": torch.ones(len(s))})
    dataset = wrap(NoItems(6))
    dataset.switch.set(store.path)
    replayed = take_codes(ReplayCollator(collate)(ask(dataset, [1, 2])))
    assert "view_0" in replayed.inputs and set(replayed.codes) == {"base", "special"}


def test_take_codes_splits_only_replayed_batches():
    rows = torch.tensor([[1, 0, 3, 7]])
    batch = {CODE_PREFIX + "base": torch.ones(1), "labels": torch.zeros(1), ROW_PREFIX + "table": rows}
    replayed = take_codes(batch)
    assert list(replayed.codes) == ["base"] and list(replayed.inputs) == ["labels"]
    assert replayed.rows.numbers.tolist() == [1]
    assert take_codes({"pixel_values": torch.zeros(1)}) is None
    assert take_codes(torch.zeros(1)) is None
    assert take_codes({}) is None
    assert is_code(CODE_PREFIX + "x") and not is_code("base") and not is_code(3)


def test_default_collator_of_transformers_is_used_for_live_rows():
    dataset = wrap(pixel_dataset(6))
    loader = DataLoader(dataset, batch_size=3, collate_fn=ReplayCollator(default_data_collator))
    expected = DataLoader(pixel_dataset(6), batch_size=3, collate_fn=default_data_collator)
    for found, wanted in zip(loader, expected, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_says_which_views_its_batches_are(workers):
    dataset = picture_dataset(10).with_transform(replayable())
    wrapped = wrap(dataset, seed=3)
    switch = wrapped.switch
    loader = TrainingLoader(
        wrapped,
        batch_size=4,
        collate_fn=ReplayCollator(default_data_collator),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    assert all(take_drawn(batch) is None for batch in loader)
    for number in range(2):
        round = WriteRound(number, 1, (PROJECTIVE, (4, 4)))
        switch.write(round)
        switch.epoch = number
        for batch in loader:
            drawn, inputs = take_drawn(batch)
            assert take_codes(batch) is None and sorted(inputs) == ["labels", "pixel_values"]
            assert drawn.views.tolist() == rotate_views(3, round, drawn.rows.numbers.tolist()).tolist()
            assert drawn.geometry.shape == (len(drawn.views), 8) and drawn.refused is None
            assert (drawn.geometry.abs().sum(1) > 0).tolist() == (drawn.views > 0).tolist()
    switch.set(None)
    assert all(take_drawn(batch) is None for batch in loader)


def test_rows_fetched_one_by_one_are_rows_fetched_together():
    dataset = wrap(picture_dataset(6).with_transform(replayable()), seed=3)
    dataset.switch.write(WriteRound(0, 1, (PROJECTIVE, (4, 4))))
    collator = ReplayCollator(default_data_collator)
    together = collator(ask(dataset, [2, 5, 1]))
    dataset.switch.epoch = 0
    alone = collator(ask_singly(dataset, [2, 5, 1]))
    assert together.keys() == alone.keys() and all(torch.equal(together[name], alone[name]) for name in together)
