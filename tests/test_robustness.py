"""Faults and unusual uses: a training is never lost, and never silently another one."""

import pickle
import time

import datasets
import numpy as np
import pytest
import torch
from support.helpers import CLASSES, losses, make_args, manual, pixel_dataset, run, tiny_resnet, tiny_vit
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.distributed import Group


class EpochDependent(torch.utils.data.Dataset):
    """Rows that change with the epoch, as a curriculum does."""

    def __init__(self):
        self.rows, self.epoch, self.epochs = pixel_dataset(), 0, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"pixel_values": row["pixel_values"] + self.epoch, "labels": row["labels"]}

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.epochs.append(epoch)


def test_set_epoch_of_the_users_dataset_is_called(tmp_path, caplog):
    plain_data, our_data = EpochDependent(), EpochDependent()
    plain = run(tiny_vit(), plain_data, tmp_path / "plain", trainer_class=Trainer)
    ours = run(tiny_vit(), our_data, tmp_path / "ours", manual("3:2"))
    assert our_data.epochs == plain_data.epochs and set(our_data.epochs) == {0, 1, 2, 3}
    assert losses(ours)[:12] == losses(plain)[:12]
    assert any("changes with the epoch" in record.message for record in caplog.records)


def test_asking_for_a_train_loader_during_training_changes_nothing(tmp_path):
    class Peek(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            assert "pixel_values" in next(iter(self.trainer.get_train_dataloader()))

    peek = Peek()
    quiet = run(tiny_resnet(), pixel_dataset(size=32), tmp_path / "quiet", manual("1:3"))
    trainer = FreezeCacheTrainer(
        model=tiny_resnet(),
        args=make_args(tmp_path / "peek"),
        train_dataset=pixel_dataset(size=32),
        freeze_cache=manual("1:3"),
        callbacks=[peek],
    )
    peek.trainer = trainer
    trainer.train()
    assert trainer.freeze_status().replaying and trainer.freeze_status().cut == 3
    assert losses(trainer)[:5] == losses(quiet)[:5]


def test_reentrant_checkpointing_is_refused(tmp_path):
    model = tiny_vit()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        run(model, pixel_dataset(), tmp_path, manual("1:3"))


class NeedsLabels(nn.Module):
    """The minimal training module: its forward cannot run without labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, pixel_values, labels):
        features = torch.relu(self.middle(torch.relu(self.stem(pixel_values))))
        logits = self.head(features.mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_model_that_needs_its_labels_is_cached(tmp_path):
    def train(name, **settings):
        config = manual("1:2", blocks=["stem", "middle"], **settings)
        return run(NeedsLabels(), pixel_dataset(), tmp_path / name, config)

    frozen, cached = train("frozen", cache="never"), train("cached", codec="fp32")
    assert cached.freeze_status().replaying
    assert losses(cached) == losses(frozen)


class MixedSizes(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        size = 32 if index < 12 else 64
        generator = torch.Generator().manual_seed(index)
        return {
            "pixel_values": torch.randn(3, size, size, generator=generator),
            "labels": torch.tensor(index % CLASSES),
        }


def test_images_of_several_sizes_cost_the_defaults_nothing_but_the_cache(tmp_path, caplog):
    class Slow(MixedSizes):
        def __getitem__(self, index):
            time.sleep(0.003)  # a store would pay
            return super().__getitem__(index)

    settings = dict(per_device_train_batch_size=4, train_sampling_strategy="sequential", logging_steps=8)
    trainer = run(tiny_resnet(), Slow(), tmp_path, None, num_train_epochs=12, **settings)
    assert trainer.state.global_step == 48
    assert trainer.freeze_status().cut > 0 and not trainer.freeze_status().replaying
    assert any("one size" in record.message for record in caplog.records)
    for cache in ("always", "auto"):
        with pytest.raises(ValueError, match="sample 1[2-5] .*one size"):
            config = manual("0:2", cache=cache)
            run(tiny_resnet(), Slow(), tmp_path / cache, config, num_train_epochs=8, **settings)


def test_features_that_are_not_finite_name_their_sample(tmp_path):
    class Broken(MixedSizes):
        def __getitem__(self, index):
            row = super().__getitem__(min(index, 11))
            return {**row, "pixel_values": row["pixel_values"] / (0.0 if index == 9 else 1.0)}

    with pytest.raises(ValueError, match="sample 9"):
        run(tiny_resnet(), Broken(), tmp_path, manual("0:2"), per_device_train_batch_size=4)


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


def test_random_transform_is_said_when_a_store_is_reused(tmp_path, caplog):
    class Noisy(MixedSizes):
        def __getitem__(self, index):
            row = super().__getitem__(0)
            return {**row, "pixel_values": row["pixel_values"] + torch.rand(1)}

    config = manual("1:2", feature_cache_dir=str(tmp_path / "cache"))
    for name in ("first", "second"):
        caplog.clear()
        run(tiny_resnet(), Noisy(), tmp_path / name, config, num_train_epochs=2)
        assert sum("whole draws of every sample" in record.message for record in caplog.records) == 1


def test_opened_store_travels_to_another_process(tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(20), tmp_path, manual("1:3"))
    store = FeatureStore.open(trainer.freeze_status().store_path)
    before = store.read([19, 0])  # the mapped column ends in a shorter batch
    assert torch.equal(pickle.loads(pickle.dumps(store)).read([19, 0]), before)


def test_failure_of_one_process_is_everybodys():
    class Second(Group):
        def gather(self, value):
            return [("ValueError", "sample 3"), value]

    with pytest.raises(ValueError, match="process 0: sample 3"):
        Second(rank=1, size=2).on_all(lambda: None)
    with pytest.raises(KeyError, match="mine"):
        Second(rank=1, size=2).on_all(lambda: {}["mine"])


def test_label_columns_of_many_kinds_are_replayed(tmp_path):
    """Soft labels, masks and names: what the collator returns comes back as it was."""
    rows, seen = pixel_dataset(16), {"live": {}, "replay": {}}

    def collate(samples):
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        labels = torch.stack([sample["labels"] for sample in samples])
        return {
            "pixel_values": pixels,
            "labels": nn.functional.one_hot(labels, CLASSES).to(torch.bfloat16),
            "mask": pixels[:, 0] > 0,
            "name": [f"sample {pixel.sum():.4f}" for pixel in pixels],
        }

    class Own(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            phase = seen["replay" if self.freeze_status().replaying else "live"]
            for index, name in enumerate(inputs["name"]):
                phase[name] = (
                    inputs["labels"][index].tolist(),
                    inputs["mask"][index].tolist(),
                    inputs["labels"].dtype,
                )
            logits = model(pixel_values=inputs["pixel_values"]).logits
            return nn.functional.cross_entropy(logits, inputs["labels"].float())

    trainer = Own(
        model=tiny_vit(),
        args=make_args(tmp_path, num_train_epochs=2, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=collate,
        freeze_cache=manual("1:3"),
    )
    trainer.train()
    assert len(seen["live"]) == 16 and seen["replay"] == seen["live"]


def test_store_directory_opens_as_a_dataset_with_the_users_labels(tmp_path):
    data = pixel_dataset(20)
    trainer = run(tiny_vit(), data, tmp_path, manual("1:3", codec="int4"))
    opened = datasets.load_from_disk(str(trainer.freeze_status().store_path))
    assert opened["sample_id"][:] == list(range(20))
    assert opened["labels"][:] == data["labels"][:].tolist()
    assert np.asarray(opened[0]["base"]).dtype.kind in "iu" and len(opened[0]["base"]) == 16 * 32 // 2
    assert len(opened[0]["special"]) == 32


def test_config_none_with_policy_none_is_possible(tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, FreezeCacheConfig(policy="none"))
    assert trainer.freeze_status().cut == 0 and trainer.freeze_cache_report().phases == []
