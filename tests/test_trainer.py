"""What `Trainer` can do works after the class name is switched."""

import dataclasses

import numpy as np
import pytest
import torch
from support.builds import SlowRows
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
from support.pretrained import settle
from support.trainer_data import image_dataset, own_collator, to_pixels
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, FreezePolicy
from hf_freezecache.policies import LinearPolicy, ManualPolicy, NonePolicy
from hf_freezecache.training.settings import make_policy

POINTS = "1:2,3:4"


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


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


def test_evaluation_only_needs_no_training_data(tmp_path):
    trainer = FreezeCacheTrainer(model=tiny_vit(), args=make_args(tmp_path), eval_dataset=pixel_dataset())
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.freeze_status().cut == 0 and trainer.freeze_cache_report().phases == []


def test_default_settings_freeze_and_cache(tmp_path, clock):
    trainer = run(settle(tiny_vit()), SlowRows(clock, rows=16), tmp_path, None, num_train_epochs=100)
    assert [(p.cut, p.mode) for p in trainer.freeze_cache_report().phases if p.mode != "build"] == [
        (0, "head_start"),
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


def test_policy_is_made_from_the_settings():
    assert isinstance(make_policy(FreezeCacheConfig(policy="none")), NonePolicy)
    manual = make_policy(FreezeCacheConfig(policy="manual", freeze_points="2:3"))
    assert isinstance(manual, ManualPolicy) and manual.points[0].cut == 3
    linear = make_policy(FreezeCacheConfig(freeze_start=0.1, freeze_end=0.9, max_frozen=0.5, freeze_stages=3))
    assert isinstance(linear, LinearPolicy)
    assert [(point.when, point.cut) for point in linear.points(12)] == [(0.1, 2), (0.5, 4), (0.9, 6)]


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


def test_config_none_with_policy_none_is_possible(tmp_path):
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path, FreezeCacheConfig(policy="none"))
    assert trainer.freeze_status().cut == 0 and trainer.freeze_cache_report().phases == []
