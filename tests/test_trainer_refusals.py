"""What cannot be honoured is refused with a reason, or declined where the settings are the defaults."""

import logging

import pytest
import torch
from support.builds import Rows
from support.helpers import CLASSES, make_args, manual, pixel_dataset, run, tiny_resnet, tiny_vit
from support.pretrained import settle
from support.trainer_data import MixedSizes
from torch import nn

from hf_freezecache import FreezeCacheTrainer, FreezePolicy
from hf_freezecache.build.spread_rows import spread_rows


def test_own_train_dataloader_that_bypasses_ours_is_an_error(tmp_path):
    class Own(FreezeCacheTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)

    trainer = Own(
        model=tiny_vit(), args=make_args(tmp_path), train_dataset=pixel_dataset(), freeze_cache=manual("1:3")
    )
    with pytest.raises(ValueError, match="get_train_dataloader"):
        trainer.train()


def test_policy_answer_out_of_range_is_an_error(tmp_path):
    class Wild(FreezePolicy):
        def decide(self, moment):
            return 99

    with pytest.raises(ValueError, match="cut 99 in epoch 0"):
        run(tiny_vit(), pixel_dataset(), tmp_path, policy=Wild())


class Iterable(torch.utils.data.IterableDataset):
    def __iter__(self):
        dataset = pixel_dataset()
        return (dataset[index] for index in range(len(dataset)))


class Unsplittable(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, CLASSES)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    ("model", "dataset", "config", "message"),
    [
        (tiny_vit, lambda: pixel_dataset(), manual("1:9"), "asks for cut 9, but the model has 4 blocks"),
        (tiny_vit, Iterable, manual("1:2"), "iterable"),
        (tiny_vit, lambda: pixel_dataset().select([]), manual("1:2"), "empty"),
        (lambda: Unsplittable(), lambda: pixel_dataset(), manual("1:2"), "cannot be cut anywhere"),
    ],
)
def test_explicit_settings_that_cannot_be_honoured_are_an_error(model, dataset, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(model(), dataset(), tmp_path, config, max_steps=4)


def test_cache_directory_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not writable.*feature_cache_dir"):
        run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2", feature_cache_dir=str(tmp_path / "file")))


def test_reentrant_checkpointing_is_refused(tmp_path):
    model = tiny_vit()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        run(model, pixel_dataset(), tmp_path, manual("1:3"))


def test_features_that_are_not_finite_name_their_sample(tmp_path):
    class Broken(MixedSizes):
        def __getitem__(self, index):
            row = super().__getitem__(min(index, 11))
            return {**row, "pixel_values": row["pixel_values"] / (0.0 if index == 9 else 1.0)}

    with pytest.raises(ValueError, match="sample 9"):
        run(tiny_resnet(), Broken(), tmp_path, manual("0:2"), per_device_train_batch_size=4)


# Declined


@pytest.mark.parametrize("kind", ["iterable", "unsplittable"])
def test_defaults_fall_back_to_plain_training_with_one_warning(kind, tmp_path, caplog):
    model, dataset = (tiny_vit(), Iterable()) if kind == "iterable" else (Unsplittable(), pixel_dataset())
    trainer = run(model, dataset, tmp_path, None, max_steps=4)
    assert trainer.state.global_step == 4 and trainer.freeze_status().cut == 0
    assert sum("this is plain training" in record.message for record in caplog.records) == 1


def test_auto_says_why_it_declines(tmp_path, caplog, monkeypatch, clock):
    caplog.set_level(logging.INFO)
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)

    class Slow(Rows):
        def __getitem__(self, index):
            clock(0.01)  # a store would pay
            return super().__getitem__(index)

    trainer = run(tiny_vit(), Slow(), tmp_path, manual("0:3", cache="auto"), num_train_epochs=20)
    assert not trainer.freeze_status().replaying and trainer.freeze_status().cut == 3
    assert any("No feature store" in record.message and "free" in record.message for record in caplog.records)


def test_images_of_several_sizes_cost_the_defaults_nothing_but_the_cache(tmp_path, clock):
    class Slow(MixedSizes):
        def __getitem__(self, index):
            clock(0.003)  # a store would pay
            return super().__getitem__(index)

    settings = dict(per_device_train_batch_size=4, train_sampling_strategy="sequential", logging_steps=80)
    trainer = run(settle(tiny_resnet()), Slow(), tmp_path, None, num_train_epochs=40, **settings)
    assert trainer.state.global_step == 160
    assert trainer.freeze_status().cut > 0 and not trainer.freeze_status().replaying
    trained = run(tiny_resnet(), Slow(), tmp_path / "always", manual("0:2"), num_train_epochs=2, **settings)
    assert trained.freeze_status().replaying


def test_a_size_that_is_too_rare_to_be_seen_is_an_error_of_the_build_that_names_a_sample(tmp_path):
    rare = range(120, 124)

    class Rare(Rows):
        def __init__(self):
            super().__init__(240)

        def __getitem__(self, index):
            row = super().__getitem__(index)
            return {**row, "pixel_values": row["pixel_values"][..., :12]} if index in rare else row

    settings = dict(per_device_train_batch_size=4, train_sampling_strategy="sequential")
    assert not {*spread_rows(Rare(), 24, 3)} & {*rare}
    with pytest.raises(ValueError, match="sample 12[0-3] .*one size"):
        run(tiny_resnet(), Rare(), tmp_path, manual("0:2"), num_train_epochs=1, **settings)
