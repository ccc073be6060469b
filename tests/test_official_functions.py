"""The two functions of Transformers' `run_image_classification.py` in a training: wrapped they are replayed."""

import logging

import pytest
import torch
from support.helpers import losses, manual, messages, run, tiny_vit
from support.images import official_collate, official_functions, picture_dataset
from support.sessions import rows_of
from torchvision.transforms import functional as F

from hf_freezecache import FeatureStore, ReplayableTransform
from hf_freezecache.build.function_pairs import suggest_replayable

TRAIN, VALIDATION = official_functions()


def train(transform, folder, config=None, evaluation=VALIDATION, **settings):
    data = picture_dataset(32, 24)
    data.set_transform(transform)
    held_out = picture_dataset(8, 24, seed=1)
    held_out.set_transform(evaluation)
    return run(
        tiny_vit(),
        data,
        folder,
        config or manual("1:2"),
        num_train_epochs=4,
        data_collator=official_collate,
        eval_dataset=held_out,
        remove_unused_columns=False,
        **settings,
    )


def test_wrapped_functions_are_replayed_with_their_geometry(tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    trainer = train(ReplayableTransform(train=TRAIN, base=VALIDATION), tmp_path)
    status = trainer.freeze_status()
    assert status.replaying
    store = FeatureStore.open(status.store_path)
    assert store.manifest.views == 1 and store.manifest.geometry == "projective"
    assert store.manifest.sensitive_channels is not None and store.verify()
    assert "cannot be replayed" not in messages(caplog)
    epochs = [phase.mode for phase in trainer.freeze_cache_report().phases]
    assert "replay" in epochs and trainer.evaluate()["eval_loss"] > 0


def test_wrapped_functions_draw_what_the_key_says_whatever_is_followed(tmp_path):
    """The loss of live epochs is that of freezing alone."""
    wrapped = ReplayableTransform(train=TRAIN, base=VALIDATION)
    cached = train(wrapped, tmp_path / "cached")
    frozen = train(wrapped, tmp_path / "frozen", manual("1:2", cache="never"))
    assert losses(cached)[:4] == losses(frozen)[:4]
    source = rows_of(cached)
    plain = source.draw(range(8), 1).batch["pixel_values"]
    followed = source.draw(range(8), 1, ("projective", (4, 4)))
    assert followed.refused is None and torch.equal(plain, followed.batch["pixel_values"])


def test_plain_function_is_opaque_and_the_line_to_write_is_said(tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    trainer = train(TRAIN, tmp_path)
    assert FeatureStore.open(trainer.freeze_status().store_path).manifest.geometry is None
    assert "set_transform(ReplayableTransform(train=train_transforms, base=val_transforms))" in messages(caplog)


def test_function_that_moves_pixels_by_hand_is_stored_in_whole_draws(tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True

    def shifted(rows):
        rows = TRAIN(rows)
        for pixels in rows["pixel_values"]:
            pixels.copy_(pixels.roll((3, 3), (1, 2)).clone())
        return rows

    trainer = train(ReplayableTransform(train=shifted, base=VALIDATION), tmp_path)
    store = FeatureStore.open(trainer.freeze_status().store_path)
    assert store.manifest.views == 1 and store.manifest.geometry is None
    assert "views do not show what the followed calls of torchvision say" in messages(caplog)


def of_images(rows):
    return {"pixel_values": [F.to_tensor(image) for image in rows["image"]]}


@pytest.mark.parametrize(
    ("transform", "evaluation", "line"),
    [
        (TRAIN, VALIDATION, "ReplayableTransform(train=train_transforms, base=val_transforms)"),
        (TRAIN, of_images, "ReplayableTransform(train=train_transforms, base=of_images)"),
        (lambda rows: TRAIN(rows), VALIDATION, "ReplayableTransform(train=..., base=val_transforms)"),
        (TRAIN, TRAIN, None),
        (TRAIN, None, None),
        (TRAIN, lambda rows: {"other": rows["image"]}, None),
        (TRAIN, lambda rows: rows["no such column"], None),
    ],
)
def test_line_is_suggested_for_two_functions_of_the_same_kind(transform, evaluation, line):
    data, held_out = picture_dataset(4), picture_dataset(4)
    if evaluation is not None:
        held_out = held_out.with_transform(evaluation)
    assert suggest_replayable(data.with_transform(transform), held_out) == line
    assert suggest_replayable(data.with_transform(transform), {"first": held_out}) == line
    assert suggest_replayable(data.with_transform(transform), None) is None


def test_transform_that_fails_suggests_nothing_and_is_traced(caplog):
    caplog.set_level("DEBUG", logger=suggest_replayable.__module__)
    data = picture_dataset(4)
    failing = data.with_transform(lambda rows: rows["no such column"])
    assert suggest_replayable(data.with_transform(lambda rows: {"pixel_values": rows["image"]}), failing) is None
    records = [record for record in caplog.records if "No ReplayableTransform is suggested" in record.getMessage()]
    assert "KeyError" in records[0].getMessage() and isinstance(records[-1].exc_info[1], KeyError)


def test_suggested_line_names_the_image_column():
    def train_transforms(rows):
        return {"pixel_values": [F.to_tensor(image) for image in rows["picture"]]}

    def val_transforms(rows):
        return train_transforms(rows)

    data = picture_dataset(4).rename_column("image", "picture")
    line = suggest_replayable(data.with_transform(train_transforms), data.with_transform(val_transforms))
    assert line == 'ReplayableTransform(train=train_transforms, base=val_transforms, image_column="picture")'
