"""What `Trainer` can do works after the class name is switched; what cannot be honoured is said."""

import dataclasses
import logging
import time

import datasets
import numpy as np
import pytest
import torch
from support.builds import Rows
from support.helpers import (
    CLASSES,
    assert_same_weights,
    losses,
    make_args,
    manual,
    pixel_dataset,
    run,
    tiny_resnet,
    tiny_vit,
    weights,
)
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, FreezePolicy

POINTS = "1:2,3:4"


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def image_dataset(rows=32, column="image"):
    generator = np.random.default_rng(0)
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(num_classes=CLASSES)})
    images = generator.integers(0, 255, (rows, 16, 16, 3)).astype(np.uint8)
    return datasets.Dataset.from_dict(
        {column: list(images), "label": generator.integers(0, CLASSES, rows)}, features=features
    )


def to_pixels(batch):
    pixels = [torch.tensor(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255.0 for image in batch["image"]]
    return {"pixel_values": pixels, "label": batch["label"]}


def own_collator(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_script_with_transform_collator_and_evaluation_works_unmodified(workers, tmp_path):
    """The usual image classification script: `with_transform`, own collator, metrics, best model at the end."""
    dataset = image_dataset().with_transform(to_pixels)
    settings = dict(
        data_collator=own_collator,
        compute_metrics=accuracy,
        eval_dataset=dataset,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    plain = run(tiny_vit(), dataset, tmp_path / "plain", trainer_class=Trainer, **settings)
    ours = run(tiny_vit(), dataset, tmp_path / "ours", manual("2:3", codec="fp32"), **settings)
    metrics = [[entry for entry in trainer.state.log_history if "eval_accuracy" in entry] for trainer in (plain, ours)]
    assert [entry["eval_accuracy"] for entry in metrics[0][:2]] == [entry["eval_accuracy"] for entry in metrics[1][:2]]
    assert len(metrics[1]) == 4
    best = max(entry["eval_accuracy"] for entry in metrics[1])
    assert ours.evaluate()["eval_accuracy"] == best
    assert ours.predict(dataset).predictions.shape == (32, CLASSES)


def test_best_model_at_end_is_the_best_checkpoint(tmp_path):
    """Plain `Trainer` leaves 64 of a ViT's 72 tensors at their last values here."""
    dataset = pixel_dataset()
    trainer = run(
        tiny_vit(),
        dataset,
        tmp_path,
        manual(POINTS),
        eval_dataset=dataset,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first epoch is then the best: far from the last one
    )
    best = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert trainer.evaluate()["eval_loss"] == best[0] == max(best)


def test_status_and_report_tell_what_was_done(tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, manual(POINTS))
    status = trainer.freeze_status()
    assert (status.cut, status.frozen_blocks[-1], status.replaying) == (4, "vit.layers.2", True)
    assert status.trainable_parameters == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert status.store_bytes == sum(file.stat().st_size for file in status.store_path.glob("*.arrow"))
    report = trainer.freeze_cache_report()
    assert [(p.cut, p.mode, p.steps) for p in report.phases if p.mode in ("live", "replay")] == [
        (0, "live", 4),
        (2, "replay", 8),
        (4, "replay", 4),
    ]
    assert all(phase.seconds > 0 and phase.flops > 0 for phase in report.phases)
    per_step = [phase.flops / phase.steps for phase in report.phases if phase.steps]
    assert per_step == sorted(per_step, reverse=True)
    assert report.totals.flops == pytest.approx(trainer.state.total_flos)
    assert report.totals.flops < report.plain_estimate.flops
    assert "replay" in str(report) and report.to_dict()["totals"]["flops"] == report.totals.flops


def test_evaluation_inside_training_sees_the_true_model(tmp_path):
    dataset = pixel_dataset()
    seen = []

    class Compare(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, model, **kwargs):
            with torch.no_grad():
                model.eval()
                batch = dataset[:]
                seen.append((metrics["eval_loss"], model(batch["pixel_values"], labels=batch["labels"]).loss.item()))

    run(
        tiny_resnet(),
        dataset := pixel_dataset(size=32),
        tmp_path,
        manual(POINTS),
        callbacks=[Compare()],
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=3,
    )
    assert len(seen) == 6  # every third of 16 steps, and the last
    for reported, computed in seen:
        assert reported == pytest.approx(computed, rel=1e-5)


def test_frozen_blocks_do_not_change(tmp_path):
    class Snapshot(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model, **kwargs):
            self.states.append({name: value.clone() for name, value in model.state_dict().items()})

    snapshot = Snapshot()
    snapshot.states = []
    for cache in ("never", "always"):
        snapshot.states.clear()
        trainer = run(
            tiny_resnet(), pixel_dataset(size=32), tmp_path / cache, manual("1:3", cache=cache), callbacks=[snapshot]
        )
        last = trainer.model.state_dict()
        frozen = [n for n in last if n.startswith(("resnet.embedder", "resnet.encoder.stages.0."))]
        assert frozen and any("running_mean" in name for name in frozen)
        for name in last:
            assert torch.equal(last[name], snapshot.states[1][name]) == (name in frozen), name


def test_second_training_starts_from_cut_zero(tmp_path):
    model = tiny_vit()
    model.vit.layernorm.weight.requires_grad_(False)
    trainer = run(model, pixel_dataset(), tmp_path, manual(POINTS))
    assert trainer.freeze_status().cut == 4
    cuts = []

    class Cuts(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            cuts.append((trainer.freeze_status().cut, model.vit.embeddings.cls_token.requires_grad))

    trainer.add_callback(Cuts())
    trainer.train()
    assert cuts[:4] == [(0, True)] * 4 and cuts[4] == (2, False) and cuts[-1] == (4, False)
    assert not model.vit.layernorm.weight.requires_grad


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_optimizers_keep_live_state_and_forget_frozen(optimizer, tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:3"), optim=optimizer)
    inner = trainer.optimizer.optimizer
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert frozen and not any(p in inner.state for p in frozen)
    live = [p for p in trainer.model.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in inner.param_groups) == len(frozen) + len(live)
    if optimizer == "adamw_torch":
        assert all(int(inner.state[p]["step"]) == 16 for p in live)


def test_bf16_cached_is_freeze_only(tmp_path):
    for make, size in ((tiny_vit, 16), (tiny_resnet, 32)):
        data = pixel_dataset(size=size)
        frozen = run(make(), data, tmp_path / f"f{size}", manual(POINTS, cache="never"), bf16=True)
        cached = run(make(), data, tmp_path / f"c{size}", manual(POINTS, codec="fp32"), bf16=True)
        assert losses(cached) == losses(frozen)
        assert_same_weights(weights(cached), weights(frozen))


def test_max_steps_and_fractions_of_training(tmp_path):
    trainer = run(
        tiny_vit(), pixel_dataset(), tmp_path, manual("0.5:3", cache="auto"), max_steps=10
    )  # 2.5 epochs: 3 begin
    phases = [(p.cut, p.mode, p.steps) for p in trainer.freeze_cache_report().phases if p.steps]
    assert phases == [(0, "live", 8), (3, "live", 2)]
    longer = run(tiny_vit(), pixel_dataset(), tmp_path, manual("0.5:3"), max_steps=16)
    assert [(p.cut, p.mode, p.steps) for p in longer.freeze_cache_report().phases][-1] == (3, "replay", 8)


def test_auto_says_why_it_declines(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:3", cache="auto"))
    assert not trainer.freeze_status().replaying and trainer.freeze_status().cut == 3
    assert any("No feature store" in record.message and "free" in record.message for record in caplog.records)


def test_full_disk_during_a_build_does_not_cost_the_training(tmp_path, caplog, monkeypatch):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_freezecache.cache.shards.ShardWriter.write", full)
    frozen = run(tiny_vit(), pixel_dataset(), tmp_path / "frozen", manual("1:3", cache="never"))
    broken = run(tiny_vit(), pixel_dataset(), tmp_path / "broken", manual("1:3", cache="always"))
    assert losses(broken) == losses(frozen)
    assert any("could not be built" in record.message for record in caplog.records)
    assert list((tmp_path / "broken" / "_freeze_cache").iterdir()) == []


def test_random_transform_is_said_once(tmp_path, caplog):
    def noisy(batch):
        rows = to_pixels(batch)
        rows["pixel_values"] = [pixels + torch.rand(1) for pixels in rows["pixel_values"]]
        return rows

    dataset = image_dataset().with_transform(noisy)
    run(tiny_vit(), dataset, tmp_path, manual(POINTS), data_collator=own_collator, remove_unused_columns=False)
    assert sum("whole draws of every sample" in record.message for record in caplog.records) == 1
    caplog.clear()
    steady = image_dataset().with_transform(to_pixels)
    run(tiny_vit(), steady, tmp_path, manual(POINTS), data_collator=own_collator, remove_unused_columns=False)
    assert not any("draws" in record.message for record in caplog.records)


def test_group_by_length_sees_the_users_dataset(tmp_path):
    dataset = pixel_dataset().add_column("length", list(range(32)))
    settings = dict(train_sampling_strategy="group_by_length", remove_unused_columns=False)

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels")}

    frozen = run(tiny_vit(), dataset, tmp_path / "f", manual("1:3", cache="never"), data_collator=collate, **settings)
    cached = run(tiny_vit(), dataset, tmp_path / "c", manual("1:3", codec="fp32"), data_collator=collate, **settings)
    assert losses(cached) == losses(frozen)


def test_auto_find_batch_size_starts_again_from_cut_zero(tmp_path):
    class OutOfMemoryOnce(TrainerCallback):
        raised = False

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.raised:
                self.raised = True
                raise RuntimeError("CUDA out of memory.")

    trainer = run(
        tiny_vit(),
        pixel_dataset(),
        tmp_path,
        manual(POINTS),
        callbacks=[OutOfMemoryOnce()],
        auto_find_batch_size=True,
        per_device_train_batch_size=16,
    )
    assert trainer.freeze_status().cut == 4
    assert trainer.state.train_batch_size < 16
    assert trainer.freeze_cache_report().phases[0].cut == 0


def test_hyperparameter_search_trains_every_trial_from_cut_zero(tmp_path):
    pytest.importorskip("optuna")
    dataset = pixel_dataset()
    trainer = FreezeCacheTrainer(
        model_init=lambda: tiny_vit(),
        args=make_args(tmp_path, num_train_epochs=2),
        train_dataset=dataset,
        eval_dataset=dataset,
        freeze_cache=manual("1:3"),
    )
    firsts = []

    class First(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                firsts.append(trainer.freeze_status().cut)

    trainer.add_callback(First())
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        n_trials=2,
        backend="optuna",
    )
    assert firsts == [0, 0] and best.objective > 0


def test_torch_compile_trains_on_the_cache(tmp_path):
    trainer = run(
        tiny_vit(), pixel_dataset(16), tmp_path, manual("1:3"), num_train_epochs=2, torch_compile=True,
        torch_compile_backend="eager",
    )  # fmt: skip
    assert trainer.freeze_status().replaying and np.isfinite(losses(trainer)).all()


def test_plain_trainer_resumes_our_checkpoint(tmp_path):
    dataset = pixel_dataset(size=32)
    run(tiny_resnet(), dataset, tmp_path, manual("1:3"), save_strategy="epoch", num_train_epochs=2)
    resumed = run(tiny_resnet(seed=5), dataset, tmp_path, trainer_class=Trainer, resume=True, num_train_epochs=3)
    assert resumed.state.global_step == 12


def test_our_trainer_resumes_a_plain_checkpoint(tmp_path):
    dataset = pixel_dataset(size=32)
    settings = dict(save_strategy="epoch", num_train_epochs=2)
    run(tiny_resnet(), dataset, tmp_path, trainer_class=Trainer, **settings)
    settings["num_train_epochs"] = 4
    resumed = run(tiny_resnet(seed=5), dataset, tmp_path, manual("2:3"), resume=True, **settings)
    assert resumed.freeze_status().cut == 3 and resumed.state.global_step == 16


def test_restoring_callback_states_keeps_ours_attached(tmp_path):
    settings = dict(num_train_epochs=3, save_strategy="steps", save_steps=6)
    whole = run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:3"), **settings)
    settings["restore_callback_states_from_checkpoint"] = True
    resumed = run(
        tiny_vit(seed=2), pixel_dataset(), tmp_path, manual("1:3"), resume=str(tmp_path / "checkpoint-6"), **settings
    )
    assert losses(resumed) == losses(whole)
    assert resumed.freeze_status().replaying


def test_own_train_dataloader_that_bypasses_ours_is_an_error(tmp_path):
    class Own(FreezeCacheTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)

    trainer = Own(
        model=tiny_vit(), args=make_args(tmp_path), train_dataset=pixel_dataset(), freeze_cache=manual("1:3")
    )
    with pytest.raises(ValueError, match="get_train_dataloader"):
        trainer.train()


def test_policy_object_wins_and_observes_what_it_asks_for(tmp_path):
    class Watcher(FreezePolicy):
        observes = frozenset({"weights", "gradients", "activations"})

        def start(self, num_blocks):
            self.seen = []

        def observe(self, moment, blocks):
            self.seen.append((moment.cut, [block.index for block in blocks]))
            for block in blocks:
                assert block.activation.shape[0] == 8
                assert all(p.grad is not None for name, p in block.parameters.items() if p.requires_grad)

        def decide(self, moment):
            return [0, 2, 1, 3][moment.epoch]

        def state_dict(self):
            return {"count": len(self.seen)}

    policy = Watcher()
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, FreezeCacheConfig(policy="none"), policy=policy)
    assert trainer.freeze_status().cut == 3
    assert [cut for cut, _ in policy.seen] == [0] * 4 + [2] * 8 + [3] * 4  # never moves back
    assert policy.seen[-1][1] == [3] and policy.seen[0][1] == [0, 1, 2, 3]


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


@pytest.mark.parametrize(
    ("model", "dataset", "config", "message"),
    [
        (tiny_vit, lambda: pixel_dataset(), manual("1:9"), "asks for cut 9, but the model has 4 blocks"),
        (tiny_vit, Iterable, manual("1:2"), "iterable"),
        (tiny_vit, lambda: pixel_dataset().select([]), manual("1:2"), "empty"),
        (lambda: Unsplittable(), lambda: pixel_dataset(), manual("1:2"), "not declared"),
    ],
)
def test_explicit_settings_that_cannot_be_honoured_are_an_error(model, dataset, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(model(), dataset(), tmp_path, config, max_steps=4)


def test_cache_directory_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not writable.*feature_cache_dir"):
        run(tiny_vit(), pixel_dataset(), tmp_path, manual("1:2", feature_cache_dir=str(tmp_path / "file")))


class Unsplittable(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, CLASSES)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values.flatten(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("kind", ["iterable", "unsplittable"])
def test_defaults_fall_back_to_plain_training_with_one_warning(kind, tmp_path, caplog):
    model, dataset = (tiny_vit(), Iterable()) if kind == "iterable" else (Unsplittable(), pixel_dataset())
    trainer = run(model, dataset, tmp_path, None, max_steps=4)
    assert trainer.state.global_step == 4 and trainer.freeze_status().cut == 0
    assert sum("this is plain training" in record.message for record in caplog.records) == 1


def test_evaluation_only_needs_no_training_data(tmp_path):
    trainer = FreezeCacheTrainer(model=tiny_vit(), args=make_args(tmp_path), eval_dataset=pixel_dataset())
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.freeze_status().cut == 0 and trainer.freeze_cache_report().phases == []


class SlowRows(Rows):
    """Images that take so long to load that stores of them pay in any case."""

    def __getitem__(self, row):
        time.sleep(0.003)
        return super().__getitem__(row)


def test_default_settings_freeze_and_cache(tmp_path):
    trainer = run(tiny_vit(), SlowRows(16), tmp_path, None, num_train_epochs=16)
    assert [(p.cut, p.mode) for p in trainer.freeze_cache_report().phases if p.mode != "build"] == [
        (0, "live"),
        (2, "replay"),
        (3, "replay"),
    ]
    # The store of the cut before is gone.
    assert list((tmp_path / "_freeze_cache").iterdir()) == [trainer.freeze_status().store_path]


def test_training_on_the_head_only_from_the_start(tmp_path):
    frozen = run(tiny_vit(), pixel_dataset(), tmp_path / "f", manual("0:4", cache="never"))
    cached = run(tiny_vit(), pixel_dataset(), tmp_path / "c", manual("0:4", codec="fp32"))
    assert losses(cached) == losses(frozen)
    assert cached.freeze_cache_report().plain_estimate.seconds is None


def test_constant_model_inputs_are_replayed(tmp_path):
    """Position embeddings interpolated to another size: the collator adds a plain constant."""

    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels")}
        return {**batch, "interpolate_pos_encoding": True}

    data = pixel_dataset(size=24)
    frozen = run(tiny_vit(), data, tmp_path / "f", manual("1:3", cache="never"), data_collator=collate)
    cached = run(tiny_vit(), data, tmp_path / "c", manual("1:3", codec="fp32"), data_collator=collate)
    assert losses(cached) == losses(frozen)


def test_activation_checkpointing_cached_is_freeze_only(tmp_path):
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    settings = {
        ("activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"): True
    }
    frozen = run(tiny_vit(), pixel_dataset(), tmp_path / "f", manual("1:3", cache="never"), **settings)
    cached = run(tiny_vit(), pixel_dataset(), tmp_path / "c", manual("1:3", codec="fp32"), **settings)
    assert losses(cached) == losses(frozen)
    assert_same_weights(weights(cached), weights(frozen))
