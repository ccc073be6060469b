"""`cache_eval` where there is no store: too little room, failures, and what only images can answer."""

import copy

import pytest
from support.builds import Rows, collate
from support.cached_evaluations import accuracy, both, evaluation_stores, evaluations, messages, train
from support.helpers import assert_same_weights, make_args, manual, pixel_dataset, tiny_vit, weights
from transformers import TrainerCallback

from hf_freezecache import FreezeCacheTrainer
from hf_freezecache.build.errors import BuildFailed
from hf_freezecache.training import evaluation as evaluation_room
from hf_freezecache.training.evaluation import EvaluationCache


def assert_as_on_images(images, cached, caplog, text):
    assert evaluations(cached) == evaluations(images)
    assert_same_weights(weights(cached), weights(images))
    assert len(messages(caplog, text)) == 1


def test_budget_that_does_not_hold_the_store_leaves_evaluation_on_images(tmp_path, caplog):
    def no_room(self):
        return 100

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluationCache, "_limit", no_room)
        images, cached = both(tmp_path, points="1:2")
    assert_as_on_images(images, cached, caplog, "100 are left")
    assert evaluation_stores(tmp_path / "cached") == []


def test_outdated_store_makes_room_for_the_next_one(tmp_path):
    class Tight(TrainerCallback):
        """Leaves room for one store and a half."""

        def on_epoch_end(self, args, state, control, **kwargs):
            folder = tmp_path / "_freeze_cache"
            limit = 35_000 - sum(store.total_bytes for store in evaluation_stores(tmp_path)) if folder.exists() else 0
            self.trainer._evaluation._limit = lambda: limit

    tight = Tight()
    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, eval_strategy="epoch"),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(20, seed=5),
        callbacks=[tight],
        freeze_cache=manual("0:1,2:3", cache_eval=True, cache="always"),
    )
    tight.trainer = trainer
    trainer.train()
    [store] = evaluation_stores(tmp_path)
    assert store.manifest.cut == 3 and 35_000 / 2 < store.total_bytes < 35_000
    assert len(evaluations(trainer, "eval_cached_")) == 1


@pytest.mark.parametrize("error", [BuildFailed("No space left on device"), RuntimeError("out of memory")])
def test_build_that_fails_leaves_evaluation_on_images(error, tmp_path, caplog, monkeypatch):
    def fail(spec, group):
        raise error

    monkeypatch.setattr(evaluation_room, "materialize", fail)
    images, cached = both(tmp_path, points="1:2")
    assert_as_on_images(images, cached, caplog, str(error))


def test_features_beyond_half_precision_name_their_sample_and_stay_images(tmp_path, caplog):
    class Huge(Rows):
        def __getitem__(self, row):
            sample = super().__getitem__(row)
            return {**sample, "pixel_values": sample["pixel_values"] * (1e9 if row == 5 else 1)}

    settings = dict(eval_dataset=Huge(), data_collator=collate, train=Rows(), compute_metrics=None, points="1:1")
    images, cached = both(tmp_path, **settings)
    assert_as_on_images(images, cached, caplog, "so evaluations run on samples: ")
    assert "sample 5" in messages(caplog, "so evaluations run on samples: ")[0]


def test_metrics_that_want_the_inputs_get_images(tmp_path, caplog):
    shapes = set()

    def compute(prediction):
        shapes.add(prediction.inputs.shape)
        return accuracy(prediction)

    images, cached = both(tmp_path, compute_metrics=compute, include_for_metrics=["inputs"])
    assert_as_on_images(images, cached, caplog, "include_for_metrics asks for the inputs")
    assert shapes == {(20, 3, 16, 16)}


def test_overridden_prediction_step_gets_images(tmp_path, caplog):
    class Own(FreezeCacheTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            assert inputs["pixel_values"].shape[1:] == (3, 16, 16)
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    trainer = Own(
        model=tiny_vit(),
        args=make_args(tmp_path, eval_strategy="epoch"),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(20, seed=5),
        freeze_cache=manual("0:2", cache_eval=True),
    )
    trainer.train()
    assert len(evaluations(trainer)) == 4 and len(messages(caplog, "prediction_step` is overridden")) == 1


def test_other_weights_in_the_prefix_are_evaluated_on_images(tmp_path, caplog):
    """As evaluation with averaged weights does: what was frozen is not what the average holds."""

    class Averaged(FreezeCacheTrainer):
        def evaluate(self, *args, **kwargs):
            kept = copy.deepcopy(self.model.state_dict())
            if self.state.epoch == 2:
                for parameter in self.model.parameters():
                    parameter.data.mul_(0.9)
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                self.model.load_state_dict(kept)

    logs = []
    for cached in (False, True):
        trainer = Averaged(
            model=tiny_vit(),
            args=make_args(tmp_path / str(cached), eval_strategy="epoch"),
            train_dataset=pixel_dataset(),
            eval_dataset=pixel_dataset(20, seed=5),
            freeze_cache=manual("0:2", cache_eval=cached, codec="fp32"),
        )
        trainer.train()
        logs.append(evaluations(trainer))
    assert logs[1][1] == logs[0][1]
    assert logs[1][2]["eval_loss"] != logs[0][2]["eval_loss"]
    assert logs[1][2]["eval_loss"] == pytest.approx(logs[0][2]["eval_loss"], rel=2e-3)
    assert len(messages(caplog, "has other weights")) == 1


def test_iterable_evaluation_set_is_evaluated_as_ever(tmp_path, caplog):
    settings = dict(eval_dataset=pixel_dataset(20, seed=5).to_iterable_dataset(), points="1:2")
    images, cached = both(tmp_path, **settings)
    assert_as_on_images(images, cached, caplog, "no rows to cache")


def test_without_a_cache_evaluations_run_on_images(tmp_path, caplog):
    images, cached = both(tmp_path, config={"cache": "never"})
    assert_as_on_images(images, cached, caplog, "cache='never'")


def test_training_that_breaks_off_says_that_its_last_evaluation_was_cached(tmp_path, caplog):
    class Break(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.global_step == 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[Break()])
    assert len(messages(caplog, "`trainer.evaluate()` runs on samples")) == 1
