"""Functions of rows that combine the rows of a call: they are found, get whole batches, and nothing is stored."""

import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.helpers import assert_same_weights, losses, manual, messages, run, tiny_vit, weights
from support.images import official_collate, official_functions, picture_dataset, replayable
from support.sessions import rows_of
from torch.utils.data import Subset
from torchvision import transforms as v1
from torchvision.transforms import functional as F
from torchvision.transforms import v2
from transformers import Trainer

from hf_freezecache import FreezeCacheConfig, ReplayableTransform, plan
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.training.combining import find_combined

TRAIN, VALIDATION = official_functions()


def combining(change):
    """The official function, and then a change of its pixels together `(B, C, H, W)`."""

    def function(rows):
        rows = TRAIN(rows)
        rows["pixel_values"] = list(change(torch.stack(rows["pixel_values"])))
        return rows

    return function


def mix(pixels):
    return 0.5 * pixels + 0.5 * pixels[torch.randperm(len(pixels))]


def cutmix(pixels):
    pixels = pixels.clone()
    pixels[:, :, :8, :8] = pixels.flip(0)[:, :, :8, :8]
    return pixels


def mix_neighbours(pixels):
    """The first row stays as it is."""
    return torch.cat([pixels[:1], (pixels[1:] + pixels[:-1]) / 2])


def sometimes(change, chance):
    return lambda pixels: change(pixels) if random.random() < chance else pixels


def with_generator(make):
    def own(pixels):
        return 0.5 * pixels + 0.5 * pixels[make().permutation(len(pixels))]

    return own


def mixed_labels(rows):
    rows = TRAIN(rows)
    rows["labels"] = [(label + other) / 2 for label, other in zip(rows["labels"], rows["labels"][::-1], strict=True)]
    return rows


OWN = np.random.default_rng(0)
COMBINE = {
    "mixup": combining(mix),
    "cutmix": combining(cutmix),
    "neighbours": combining(mix_neighbours),
    "standardized": combining(lambda pixels: (pixels - pixels.mean()) / pixels.std()),
    "brightest": combining(lambda pixels: pixels / pixels.amax()),
    "one in five calls": combining(sometimes(mix, 0.2)),
    "two rows or more": combining(lambda pixels: mix(pixels) if len(pixels) > 1 else pixels),
    "whole batches": combining(lambda pixels: mix(pixels) if len(pixels) == 8 else pixels),
    "generator of its own": combining(with_generator(lambda: OWN)),
    "new generator": combining(with_generator(np.random.default_rng)),
    "labels": mixed_labels,
}


def reason(train, base=VALIDATION, data=None, batch_size=8, seed=0):
    data = picture_dataset(64, 20) if data is None else data
    transform = train if isinstance(train, ReplayableTransform) else ReplayableTransform(train=train, base=base)
    return find_combined(RowSource(data.with_transform(transform), official_collate, batch_size, seed))


@pytest.mark.parametrize("name", COMBINE)
def test_function_that_combines_rows_is_found(name):
    assert "`train` of the data set's ReplayableTransform combines rows" in reason(COMBINE[name])


@pytest.mark.parametrize("name", COMBINE)
def test_function_without_a_replayable_transform_is_found_as_well(name):
    data = picture_dataset(64, 20).with_transform(COMBINE[name])
    source = RowSource(data, official_collate, 8, 0)
    assert "the data set's function combines rows" in find_combined(source)
    assert not find_combined(source, plain=False)


def with_new_generator(mixes, key):
    """A plain function whose random numbers nobody can repeat."""

    def function(rows):
        generator = np.random.default_rng()
        pixels = [np.asarray(image.convert("RGB").resize((16, 16))).astype(np.float32) for image in rows["image"]]
        partners = generator.permutation(len(pixels)) if mixes else range(len(pixels))
        mixed = [pixels[one] / 2 + pixels[other] / 2 + generator.normal() for one, other in enumerate(partners)]
        return {key: mixed, "labels": rows["labels"]}

    return function


@pytest.mark.parametrize("key", ["pixel_values", "x"])
@pytest.mark.parametrize("mixes", [False, True])
def test_outputs_of_plain_functions_have_any_names(mixes, key):
    data = picture_dataset(64, 20).with_transform(with_new_generator(mixes, key))
    assert bool(find_combined(RowSource(data, official_collate, 8, 0))) == mixes


def test_plain_functions_get_the_columns_that_they_ask_for():
    asked = set()

    def function(rows):
        asked.add(tuple(rows))
        return {"pixel_values": [F.to_tensor(image.convert("RGB")) for image in rows["image"]]}

    data = picture_dataset(64, 20).with_transform(function, columns=["image"], output_all_columns=True)
    assert not find_combined(RowSource(data, official_collate, 8, 0))
    assert asked == {("image",)}


def test_function_that_fails_for_rows_of_several_batches_is_told_with_its_error(caplog):
    """Nobody has asked for these rows together: it costs no training."""

    def function(rows):
        if len(rows["image"]) > 2:
            raise KeyError("no such neighbour")
        return TRAIN(rows)

    data = picture_dataset(64, 20).with_transform(function)
    with caplog.at_level("DEBUG", logger="hf_freezecache"):
        assert not find_combined(RowSource(data, official_collate, 8, 0))
    told = [record for record in caplog.records if "A function of rows fails for" in record.message]
    assert any("KeyError" in record.message or "no such neighbour" in record.message for record in told)
    assert any(record.exc_info for record in told)


@pytest.mark.parametrize("function", [TRAIN, VALIDATION])
def test_functions_that_combine_nothing_are_not(function):
    assert not find_combined(RowSource(picture_dataset(64, 20).with_transform(function), official_collate, 8, 0))


@pytest.mark.parametrize("cache", ["always", "auto", "never"])
def test_nothing_is_stored_of_a_function_that_combines_rows(cache, tmp_path, caplog):
    data = picture_dataset(32, 20).with_transform(COMBINE["mixup"])
    settings = {"data_collator": official_collate, "remove_unused_columns": False, "num_train_epochs": 2}
    if cache == "always":
        with pytest.raises(ValueError, match="function combines rows"):
            run(tiny_vit(image_size=16), data, tmp_path, manual("1:2"), **settings)
        return
    trainer = run(tiny_vit(image_size=16), data, tmp_path, manual("1:2", cache=cache), **settings)
    assert trainer.freeze_status().cut == 2 and not trainer.freeze_status().replaying
    assert ("The data set's function combines rows" in messages(caplog)) == (cache == "auto")


def test_base_that_combines_rows_is_found():
    def standardized(rows):
        rows = VALIDATION(rows)
        mean = torch.stack(rows["pixel_values"]).mean()
        return {**rows, "pixel_values": [pixels - mean for pixels in rows["pixel_values"]]}

    assert "`base` of" in reason(TRAIN, standardized)


def pictures_of_many_sizes(rows=64):
    """Wide and tall ones, for which a resized crop draws again and again."""
    generator = np.random.default_rng(0)
    sizes = [(20, 200) if generator.random() < 0.5 else (150, 18) for _ in range(rows)]
    images = [Image.fromarray(generator.integers(0, 255, (*size, 3)).astype(np.uint8)) for size in sizes]
    features = datasets.Features(image=datasets.Image(), labels=datasets.Value("int64"))
    return datasets.Dataset.from_dict({"image": images, "labels": list(range(rows))}, features=features)


def in_two_rounds(rows):
    """Crops all rows, which draws as often as their sizes say, and then flips all."""
    crop, flip = v1.RandomResizedCrop(16), v1.RandomHorizontalFlip()
    images = [crop(image.convert("RGB")) for image in rows["image"]]
    return {"pixel_values": [F.to_tensor(flip(image)) for image in images], "labels": rows["labels"]}


def by_brightness(rows):
    """Draws for dark images only."""
    pixels = [F.to_tensor(F.resize(image, [16, 16])) for image in rows["image"]]
    pixels = [one if one.mean() > 0.5 else one + 0.1 * torch.rand(()) for one in pixels]
    return {"pixel_values": pixels, "labels": rows["labels"]}


def all_at_once(rows):
    """One draw for all rows."""
    pixels = torch.stack([F.to_tensor(F.resize(image, [20, 20])) for image in rows["image"]])
    pixels = v2.Compose([v2.RandomCrop(16), v2.RandomHorizontalFlip()])(pixels)
    return {"pixel_values": list(pixels), "labels": rows["labels"]}


def with_own_generator(make, chance=0.5):
    def function(rows):
        pixels = [F.to_tensor(F.resize(image, [16, 16])) for image in rows["image"]]
        pixels = [F.hflip(one) if make().random() < chance else one for one in pixels]
        return {"pixel_values": pixels, "labels": rows["labels"]}

    return function


def fails_for_many(rows):
    assert len(rows["image"]) < 8 or len(rows["image"]) > 16, "a batch of the training"
    return TRAIN(rows)


def rand_augment(rows):
    transform = v1.Compose([v1.RandomResizedCrop(16), v1.RandAugment(), v1.ToTensor()])
    return {"pixel_values": [transform(image) for image in rows["image"]], "labels": rows["labels"]}


SEPARATE = {
    "official": TRAIN,
    "two rounds": in_two_rounds,
    "by brightness": by_brightness,
    "all at once": all_at_once,
    "rand augment": rand_augment,
    "generator of its own": with_own_generator(lambda: OWN),
    "rarely of its own": with_own_generator(lambda: OWN, 0.02),
    "new generator": with_own_generator(np.random.default_rng),
    "fails for many": fails_for_many,
}
PICTURES = {"one size": picture_dataset(64, 20), "many sizes": pictures_of_many_sizes()}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("name", SEPARATE)
def test_function_that_does_not_combine_rows_is_none(name, pictures, seed):
    assert reason(SEPARATE[name], data=PICTURES[pictures], seed=seed) == ""


def test_pipelines_and_batches_of_one_are_no_function_of_rows():
    assert reason(replayable()) == ""
    assert reason(COMBINE["mixup"], batch_size=1) == ""


def test_function_that_gets_single_rows_combines_nothing():
    class Single(torch.utils.data.Dataset):
        inner = picture_dataset(16).with_transform(ReplayableTransform(train=COMBINE["mixup"], base=VALIDATION))

        def __len__(self):
            return 16

        def __getitem__(self, row):
            return self.inner[row]

    assert find_combined(RowSource(Single(), official_collate, 8, 0)) == ""
    inner = Single.inner
    assert "combines rows" in find_combined(RowSource(Subset(inner, range(12)), official_collate, 8, 0))


def test_generators_are_left_alone():
    torch.manual_seed(5), random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    reason(COMBINE["mixup"]), reason(TRAIN)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


class Counted:
    """Mixes rows, and counts those of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, rows):
        self.calls.append(len(rows["image"]))
        return COMBINE["mixup"](rows)


def train(transform, folder, config=None, trainer_class=None, **settings):
    data = picture_dataset(32, 24)
    data.set_transform(transform)
    kind = {} if trainer_class is None else {"trainer_class": trainer_class}
    return run(
        tiny_vit(),
        data,
        folder,
        config,
        num_train_epochs=2,
        data_collator=official_collate,
        remove_unused_columns=False,
        **kind,
        **settings,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_that_of_a_plain_trainer(tmp_path, workers):
    wrapped = ReplayableTransform(train=COMBINE["mixup"], base=VALIDATION)
    settings = {"dataloader_num_workers": workers}
    plain = train(COMBINE["mixup"], tmp_path / "plain", trainer_class=Trainer, **settings)
    ours = train(wrapped, tmp_path / "ours", manual("5:2", cache="auto"), **settings)
    assert losses(ours) == losses(plain)
    assert_same_weights(weights(ours), weights(plain))


@pytest.mark.parametrize("settings", [{"cache": "auto"}, {"cache": "auto", "materialize": "write_through"}], ids=str)
def test_nothing_is_stored_and_the_warning_says_why(tmp_path, caplog, settings):
    function = Counted()
    trainer = train(ReplayableTransform(train=function, base=VALIDATION), tmp_path, manual("1:2", **settings))
    assert function.calls[-8:] == [8] * 8
    assert {phase.mode for phase in trainer.freeze_cache_report().phases} == {"live"}
    assert trainer.freeze_status().cut == 2 and rows_of(trainer).combined
    assert "The function `train` of the data set's ReplayableTransform combines rows" in messages(caplog)
    assert "It gets whole batches in every epoch" in messages(caplog)


def test_cache_that_must_be_is_refused(tmp_path):
    wrapped = ReplayableTransform(train=COMBINE["mixup"], base=VALIDATION)
    with pytest.raises(ValueError, match="cache='always', but features cannot be cached: the function `train`"):
        train(wrapped, tmp_path, manual("1:2"))
    data = picture_dataset(32, 24).with_transform(wrapped)
    with pytest.raises(ValueError, match="nothing can be cached: the function `train`"):
        plan(tiny_vit(), data, FreezeCacheConfig(), data_collator=official_collate)


def test_evaluation_set_whose_rows_are_combined_is_evaluated_in_whole_batches(tmp_path):
    function = Counted()
    held_out = picture_dataset(16, 24, seed=1).with_transform(ReplayableTransform(train=function, base=VALIDATION))
    settings = {"eval_dataset": held_out, "eval_strategy": "epoch"}
    trainer = train(TRAIN, tmp_path, manual("0:2", cache_eval=True), **settings)
    assert function.calls[-4:] == [8] * 4
    evaluations = [phase for phase in trainer.freeze_cache_report().phases if phase.mode == "eval"]
    assert all(not phase.store_bytes for phase in evaluations)
