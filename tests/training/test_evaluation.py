"""`cache_eval`: evaluations during training skip the frozen prefix and say what those on images say."""

import logging
import shutil

import pytest
import torch
from support.builds import Rows, collate
from support.cached_evaluations import (
    EvaluateAnother,
    assert_close,
    both,
    counting,
    evaluation_stores,
    evaluations,
    messages,
    train,
    without_cached,
)
from support.helpers import (
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
from support.images import picture_dataset, replayable
from support.packed_stores import train_on_rows
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_freezecache import FeatureStore, FreezeCacheTrainer
from hf_freezecache.build import spec_maker


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_cached_evaluations_equal_those_on_images_within_half_precision(name, tmp_path):
    model, size = (tiny_vit(), 16) if name == "vit" else (tiny_resnet(), 32)
    images, cached = both(tmp_path, model, size=size, config={"codec": "fp32"})
    assert losses(cached) == losses(images)
    assert_same_weights(weights(cached), weights(images))
    assert_close(without_cached(evaluations(cached)), evaluations(images))
    assert evaluations(cached)[0] == evaluations(images)[0]  # at cut 0
    assert evaluations(cached)[3] == evaluations(images)[3]  # the last one
    assert evaluations(cached)[1]["eval_loss"] != evaluations(images)[1]["eval_loss"]  # rounded to fp16


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_cached_evaluations_in_full_precision_equal_those_on_images_bit_for_bit(name, tmp_path, monkeypatch):
    monkeypatch.setattr(spec_maker, "EVALUATION_CODEC", "fp32")
    model, size = (tiny_vit(), 16) if name == "vit" else (tiny_resnet(), 32)
    images, cached = both(tmp_path, model, size=size, eval_accumulation_steps=1)
    assert without_cached(evaluations(cached)) == evaluations(images)
    [last] = evaluations(cached, "eval_cached_")
    assert last["eval_cached_loss"] == evaluations(images)[-1]["eval_loss"]


def test_both_numbers_of_the_last_evaluation_are_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = train(tmp_path, log_level="info")
    usual, again = evaluations(trainer)[-2:]
    assert (usual["step"], again["step"]) == (16, 16)
    assert {name.replace("_cached", "") for name in again} == set(usual)
    assert len(evaluations(trainer)) == 5
    [line] = messages(caplog, "on samples / from cached features")
    assert f"eval_accuracy {usual['eval_accuracy']:.6g} / {again['eval_cached_accuracy']:.6g}" in line
    assert not messages(caplog, "`trainer.evaluate()` runs on samples")


def test_prefix_is_not_run_in_cached_evaluations(tmp_path):
    model = tiny_vit()
    projection = model.vit.embeddings.patch_embeddings.projection

    class Count(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_prediction_step(self, args, state, control, **kwargs):
            self.seen.append(sum(counts))
            counts.clear()

        def on_step_end(self, args, state, control, **kwargs):
            counts.clear()

        def on_epoch_end(self, args, state, control, **kwargs):
            counts.clear()

    with counting(projection) as counts:
        count = Count()
        trainer = train(tmp_path, model=model, points="1:2", callbacks=[count])
    per_evaluation = [count.seen[start : start + 3] for start in range(0, len(count.seen), 3)]
    assert per_evaluation[0] == [8, 8, 4]  # cut 0
    assert sum(per_evaluation[1]) > 0 and per_evaluation[1][1:] == [0, 0]  # the build came before its first batch
    assert per_evaluation[2] == [0, 0, 0]
    assert per_evaluation[3] == [8, 8, 4]  # the last one, on images
    assert per_evaluation[4] == [2, 0, 0]  # and again; what an evaluation on images costs was measured on two samples
    phases = {(phase.cut, phase.mode): phase for phase in trainer.freeze_cache_report().phases}
    live, frozen = phases[0, "eval"], phases[2, "eval"]
    assert frozen.epochs == 4 and frozen.flops < 0.9 * 4 * live.flops
    assert phases[2, "build"].epochs == 2
    assert trainer.freeze_cache_report().totals.flops == pytest.approx(trainer.state.total_flos)


def test_store_of_an_earlier_cut_is_taken_away(tmp_path):
    train(tmp_path, points="0:1,2:3")
    [store] = evaluation_stores(tmp_path)
    assert (store.manifest.cut, store.manifest.codec, store.manifest.views) == (3, "fp16", 0)
    assert store.verify()


def test_last_evaluation_alone_builds_no_store(tmp_path):
    trainer = train(tmp_path, points="3:2")
    assert evaluation_stores(tmp_path) == []
    assert len(evaluations(trainer)) == 4 and not evaluations(trainer, "eval_cached_")


def test_best_model_is_loaded_and_evaluated_on_images(tmp_path):
    settings = dict(save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss")
    images, cached = both(tmp_path, greater_is_better=True, **settings)
    assert cached.state.best_model_checkpoint.endswith("checkpoint-4")
    assert_same_weights(weights(cached), weights(images))
    assert cached.evaluate()["eval_loss"] == images.evaluate()["eval_loss"] == cached.state.best_metric


def test_evaluation_and_prediction_after_training_run_on_images(tmp_path):
    images, cached = both(tmp_path, config={"codec": "fp32"})
    data = pixel_dataset(20, seed=5)
    with counting(cached.model.vit.embeddings.patch_embeddings.projection) as counts:
        metrics = cached.evaluate()
        assert sum(counts) == 20
        predicted = cached.predict(data).predictions
        assert sum(counts) == 40
    assert not any("_cached" in name for name in metrics)
    assert metrics["eval_loss"] == images.evaluate()["eval_loss"]
    assert (predicted == images.predict(data).predictions).all()


def test_several_evaluation_sets_have_stores_of_their_own(tmp_path):
    sets = {"near": pixel_dataset(20, seed=5), "far": pixel_dataset(12, seed=6)}
    images, cached = both(tmp_path, eval_dataset=sets, points="1:2", config={"codec": "fp32"})
    assert_close(without_cached(evaluations(cached)), evaluations(images))
    assert sorted(len(store) for store in evaluation_stores(tmp_path / "cached")) == [12, 20]
    for name in sets:
        [last] = evaluations(cached, f"eval_{name}_cached_")
        usual = evaluations(images, f"eval_{name}_")[-1]
        assert last[f"eval_{name}_cached_loss"] == pytest.approx(usual[f"eval_{name}_loss"], rel=2e-3)


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_callbacks_evaluate_other_data_sets_rightly(kind, tmp_path):
    metrics, stores = [], []
    for cached in (False, True):
        other = pixel_dataset(12, seed=6) if kind == "datasets" else Rows(12)
        callback = EvaluateAnother(other)
        model = tiny_vit()
        config = manual("1:2", cache_eval=cached, codec="fp32")
        path = tmp_path / str(cached)
        trainer = FreezeCacheTrainer(
            model=model,
            args=make_args(path, eval_strategy="epoch"),
            train_dataset=pixel_dataset(),
            eval_dataset=pixel_dataset(20, seed=5),
            data_collator=collate if kind == "torch" else None,
            callbacks=[callback],
            freeze_cache=config,
        )
        callback.trainer = trainer
        trainer.train()
        metrics.append(callback.metrics)
        stores = sorted(len(store) for store in evaluation_stores(path))
    assert metrics[1] == pytest.approx(metrics[0], rel=2e-3)
    assert metrics[1][2] != metrics[0][2]  # from the store
    assert stores == [12, 20]


def test_data_sets_that_are_given_once_get_no_store(tmp_path):
    callback = EvaluateAnother(lambda: Rows(12), fresh=True)
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, num_train_epochs=12, learning_rate=0.0),
        train_dataset=Rows(32),
        data_collator=collate,
        callbacks=[callback],
        freeze_cache=manual("0:2", cache_eval=True),
    )
    callback.trainer = trainer
    trainer.train()
    assert len(callback.metrics) == 12 and evaluation_stores(tmp_path) == []


@pytest.mark.parametrize("step", [8, 12])
def test_resumed_training_equals_the_uninterrupted_one(step, tmp_path):
    settings = dict(save_strategy="epoch")
    whole = train(tmp_path, **settings)
    if step == 8:
        shutil.rmtree(tmp_path / "_freeze_cache")  # built again
    checkpoint = tmp_path / f"checkpoint-{step}"
    resumed = train(tmp_path, resume=str(checkpoint), model=tiny_vit(9), **settings)
    assert_same_weights(weights(resumed), weights(whole))
    assert evaluations(resumed) == evaluations(whole)
    assert resumed.state.total_flos == whole.state.total_flos


def test_second_training_caches_its_evaluations(tmp_path):
    for workers in ({}, dict(dataloader_num_workers=1, dataloader_persistent_workers=True)):
        trainer = FreezeCacheTrainer(
            model=tiny_vit(),
            args=make_args(tmp_path, eval_strategy="epoch", num_train_epochs=2, **workers),
            train_dataset=pixel_dataset(),
            eval_dataset=pixel_dataset(20, seed=5),
            freeze_cache=manual("0:2", cache_eval=True),
        )
        trainer.evaluate()
        for _ in range(2):
            trainer.train()
            assert len(evaluations(trainer, "eval_cached_")) == 1


def test_persistent_workers_see_the_source_turn(tmp_path):
    workers = dict(dataloader_num_workers=1, dataloader_persistent_workers=True)
    images, cached = both(tmp_path, config={"codec": "fp32"}, **workers)
    assert losses(cached) == losses(images)
    assert_close(without_cached(evaluations(cached)), evaluations(images))
    assert evaluations(cached)[1]["eval_loss"] != evaluations(images)[1]["eval_loss"]
    assert cached.evaluate()["eval_loss"] == images.evaluate()["eval_loss"]


def test_early_stopping_ends_with_an_evaluation_on_images(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    settings = dict(save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss")
    images, cached = both(
        tmp_path,
        num_train_epochs=8,
        greater_is_better=True,  # the loss falls: stops after two worse evaluations
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        points="0:2",
        config={"codec": "fp32"},
        log_level="info",
        **settings,
    )
    assert cached.state.global_step == images.state.global_step < 32
    entries = evaluations(cached)
    # The third was from the store: early stopping ends the training after it, and so it is repeated on images.
    assert [any("_cached_" in name for name in entry) for entry in entries] == [False, False, False, False, True]
    assert entries[-2] == evaluations(images)[-1]  # exactly: on images
    assert entries[-1]["eval_cached_loss"] == entries[-3]["eval_loss"]
    assert entries[-1]["eval_cached_loss"] == pytest.approx(entries[-2]["eval_loss"], rel=2e-3)
    assert len(messages(caplog, "on samples / from cached features")) == 1
    assert_same_weights(weights(cached), weights(images))


def test_metrics_get_labels_and_losses_as_on_images(tmp_path, monkeypatch):
    monkeypatch.setattr(spec_maker, "EVALUATION_CODEC", "fp32")
    seen = {}

    def keep(name):
        def compute(prediction):
            values = (prediction.predictions, prediction.label_ids, prediction.losses)
            seen.setdefault(name, []).append([torch.tensor(value) for value in values])
            return {"score": 1.0}

        return compute

    for cached in (False, True):
        settings = dict(include_for_metrics=["loss"], label_names=["labels"], points="1:2")
        train(tmp_path / str(cached), cached, compute_metrics=keep(cached), **settings)
    assert len(seen[True]) == len(seen[False]) + 1
    for one, other in zip(seen[False], seen[True][:-1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batch_metrics_and_dropped_batches_stay(tmp_path):
    class Mean:
        def __init__(self):
            self.right = []

        def __call__(self, prediction, compute_result):
            self.right += (prediction.predictions.argmax(-1) == prediction.label_ids).tolist()
            if compute_result:
                right, self.right = self.right, []
                return {"accuracy": sum(right) / len(right), "samples": len(right)}
            return {}

    results = []
    for cached in (False, True):
        settings = dict(compute_metrics=Mean(), batch_eval_metrics=True, dataloader_drop_last=True)
        results.append(train(tmp_path / str(cached), cached, config={"codec": "fp32"}, **settings))
    images, cached = map(evaluations, results)
    assert_close(without_cached(cached), images)
    assert images[-1]["eval_samples"] == 16


def test_replayable_evaluation_set_draws_as_under_trainer_and_repeats_its_base_view(tmp_path, caplog):
    pictures = picture_dataset(20, seed=5)
    settings = dict(eval_dataset=pictures.with_transform(replayable()), remove_unused_columns=False)
    data = picture_dataset().with_transform(replayable())
    plain = run(
        tiny_vit(),
        data,
        tmp_path / "plain",
        trainer_class=Trainer,
        eval_strategy="epoch",
        num_train_epochs=1,
        **settings,
    )
    live = train(tmp_path / "live", train=data, points="3:2", num_train_epochs=1, **settings)
    torch.manual_seed(1)
    expected = plain.evaluate()["eval_loss"]
    live.model.load_state_dict(plain.model.state_dict())
    torch.manual_seed(1)
    assert live.evaluate()["eval_loss"] == expected
    assert not messages(caplog, "evaluation set is random")

    cached = train(tmp_path / "cached", train=data, points="0:2", learning_rate=0.0, num_train_epochs=3, **settings)
    base = pictures.with_transform(replayable(train=replayable().base))
    assert evaluations(cached)[0]["eval_loss"] == evaluations(cached)[1]["eval_loss"]
    assert cached.evaluate(base)["eval_loss"] == pytest.approx(evaluations(cached)[0]["eval_loss"], rel=2e-3)
    assert len(messages(caplog, "repeat the base view")) == 1


class Noisy(Rows):
    def __getitem__(self, row):
        sample = super().__getitem__(row)
        return {**sample, "pixel_values": sample["pixel_values"] + torch.rand(1)}


def test_random_transform_of_the_evaluation_set_is_said_once(tmp_path, caplog):
    trainer = train(tmp_path, eval_dataset=Noisy(), data_collator=collate, train=Rows(), compute_metrics=None)
    assert len(messages(caplog, "repeat one draw of it")) == 1
    assert len(evaluations(trainer, "eval_cached_")) == 1


def test_images_of_another_size_than_in_training_are_cached_too(tmp_path):
    settings = dict(eval_dataset=pixel_dataset(20, 48, seed=5), config={"codec": "fp32"})
    images, cached = both(tmp_path, tiny_resnet(), size=32, **settings)
    assert losses(cached) == losses(images)
    assert_close(without_cached(evaluations(cached)), evaluations(images))
    assert len(evaluations(cached, "eval_cached_")) == 1


def test_evaluation_set_is_packed_too(tmp_path):
    logged = []
    for lossless in (False, True):
        settings = dict(eval_dataset=pixel_dataset(20, seed=5), eval_strategy="epoch", cache_eval=True)
        trainer = train_on_rows(tmp_path / str(lossless), lossless, **settings)
        found = [FeatureStore.open(path) for path in (tmp_path / str(lossless) / "_freeze_cache").iterdir()]
        assert sorted(len(store) for store in found) == [20, 32]
        assert all(store.manifest.lossless == lossless for store in found)
        history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        logged.append(history)
    assert len(logged[0]) == 4 and logged[0] == logged[1]
