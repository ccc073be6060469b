"""Which evaluations are from a store: those inside `Trainer.evaluate`, and of them all but the last."""

import gc
import weakref

import pytest
import torch
from support.cached_evaluations import evaluation_stores, evaluations, train
from support.helpers import make_args, manual, pixel_dataset, tiny_vit
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_freezecache import FreezeCacheTrainer


def make_trainer(path, trainer_class=FreezeCacheTrainer, config=None, callbacks=(), **settings):
    trainer = trainer_class(
        model=tiny_vit(),
        args=make_args(path, **{"eval_strategy": "epoch", **settings}),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(20, seed=5),
        callbacks=list(callbacks),
        freeze_cache=manual("1:2", cache_eval=True, codec="fp32") if config is None else config,
    )
    for callback in callbacks:
        callback.trainer = trainer
    return trainer


def own_losses(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


class Positional(FreezeCacheTrainer):
    """As older scripts override it."""

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)


@pytest.mark.parametrize("cache_eval", [False, True])
def test_loop_takes_its_arguments_by_position_too(cache_eval, tmp_path):
    config = manual("1:2", cache_eval=cache_eval, codec="fp32")
    named = make_trainer(tmp_path / "named", config=config)
    named.train()
    positional = make_trainer(tmp_path / "positional", Positional, config)
    positional.train()
    assert evaluations(positional) == evaluations(named)


class EvaluateInside(TrainerCallback):
    """Evaluates another set under the same names, as reports of several sets do."""

    def __init__(self):
        self.busy = False

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.busy:
            self.busy = True
            self.trainer.evaluate(pixel_dataset(12, seed=6))
            self.busy = False


def test_evaluation_inside_another_does_not_change_what_that_returns(tmp_path):
    returned = []

    class Notes(FreezeCacheTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            returned.append((len(args), metrics["eval_loss"]))
            return metrics

    results = []
    for cache_eval in (False, True):
        returned.clear()
        config = manual("1:2", cache_eval=cache_eval, codec="fp32")
        make_trainer(tmp_path / str(cache_eval), Notes, config, [EvaluateInside()]).train()
        results.append([loss for count, loss in returned if count == 0])
    assert results[1] == pytest.approx(results[0], rel=2e-3)
    assert results[1][-1] == results[0][-1]  # the last one, on images


def test_cached_names_are_those_of_metrics(tmp_path):
    settings = dict(save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss")
    trainer = train(
        tmp_path,
        num_train_epochs=8,
        greater_is_better=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        points="0:2",
        **settings,
    )
    [cached] = [entry for entry in trainer.state.log_history if any("_cached" in name for name in entry)]
    assert {name for name in cached if not name.startswith("eval_cached_")} == {"epoch", "step"}


class LookAtBatch(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        self.shapes = getattr(self, "shapes", set())
        self.shapes.add(tuple(next(iter(self.trainer.get_eval_dataloader()))["pixel_values"].shape[1:]))


def test_loader_that_somebody_asks_for_builds_no_store(tmp_path):
    look = LookAtBatch()
    trainer = make_trainer(tmp_path, callbacks=[look], eval_strategy="no")
    trainer.train()
    assert look.shapes == {(3, 16, 16)} and evaluation_stores(tmp_path) == []


class OwnEvaluate(FreezeCacheTrainer):
    def evaluate(self, *args, **kwargs):
        output = self.evaluation_loop(self.get_eval_dataloader(), "Evaluation", metric_key_prefix="eval")
        self.log(output.metrics)
        return output.metrics


def test_own_way_to_evaluate_is_on_images(tmp_path):
    images = make_trainer(tmp_path / "images", config=manual("1:2", codec="fp32"))
    images.train()
    own = make_trainer(tmp_path / "own", OwnEvaluate)
    own.train()
    assert own_losses(own) == own_losses(images) and evaluation_stores(tmp_path / "own") == []


def test_last_batch_is_not_kept_alive(tmp_path):
    features = []

    class Note(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            features.append(weakref.ref(inputs["pixel_values"]))
            return super().compute_loss(model, inputs, **kwargs)

    trainer = make_trainer(tmp_path, Note, manual("1:2", codec="fp32"), eval_strategy="no")
    trainer.train()
    gc.collect()
    assert trainer.freeze_status().replaying and len(features) == 16 + 2  # two of the rehearsal
    assert not any(isinstance(reference(), torch.Tensor) for reference in features)
