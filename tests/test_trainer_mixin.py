"""`FreezeCacheMixin` in front of other trainers than `Trainer`."""

import pytest
import safetensors.torch
import torch
from support.helpers import assert_same_weights, losses, make_args, manual, pixel_dataset, tiny_vit, weights
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_freezecache import FreezeCacheConfig, FreezeCacheMixin, FreezeCacheTrainer
from hf_freezecache.model.checkpoint import CheckpointError


class Smoothed(Trainer):
    """A user's trainer with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.3)
        return (loss, outputs) if return_outputs else loss


class Mixed(FreezeCacheMixin, Smoothed):
    pass


class MixedSeq2Seq(FreezeCacheMixin, Seq2SeqTrainer):
    pass


def train(trainer_class, path, config=None, args=None, resume=None, seed=0, **settings):
    own = {} if config is None else {"freeze_cache": config}
    own |= {name: settings.pop(name) for name in ("eval_dataset",) if name in settings}
    args = make_args(path, **settings) if args is None else args
    trainer = trainer_class(model=tiny_vit(seed), args=args, train_dataset=pixel_dataset(), **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_is_the_mixin_before_trainer():
    assert FreezeCacheTrainer.__bases__ == (FreezeCacheMixin, Trainer)


def test_users_loss_trains_as_under_the_users_trainer(tmp_path):
    plain = train(Smoothed, tmp_path / "plain")
    never = train(Mixed, tmp_path / "never", manual("1:2", cache="never"))
    cached = train(Mixed, tmp_path / "cached", manual("1:2", codec="fp32"))
    assert losses(cached)[:4] == losses(plain)[:4]
    assert losses(cached) == losses(never) and cached.freeze_status().replaying
    assert_same_weights(weights(cached), weights(never))
    assert losses(cached) != losses(train(FreezeCacheTrainer, tmp_path / "other", manual("1:2", codec="fp32")))


def test_resumed_training_of_a_mixed_class_is_uninterrupted(tmp_path):
    whole = train(Mixed, tmp_path, manual("1:2"), save_strategy="epoch")
    resumed = train(Mixed, tmp_path, manual("1:2"), resume=str(tmp_path / "checkpoint-12"), seed=9)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))


def seq2seq_args(path, **settings):
    values = make_args(path, **settings).to_dict()
    values.pop("_n_gpu", None)
    return Seq2SeqTrainingArguments(**values)


def test_seq2seq_trainer_trains_and_evaluates_from_its_cache(tmp_path, caplog):
    settings = dict(eval_strategy="epoch")
    images = train(
        MixedSeq2Seq,
        tmp_path / "images",
        manual("1:2", codec="fp32", cache="never"),
        seq2seq_args(tmp_path / "images", **settings),
        eval_dataset=pixel_dataset(20, seed=5),
    )
    cached = train(
        MixedSeq2Seq,
        tmp_path / "cached",
        manual("1:2", codec="fp32", cache_eval=True),
        seq2seq_args(tmp_path / "cached", **settings),
        eval_dataset=pixel_dataset(20, seed=5),
    )
    assert cached.freeze_status().replaying and losses(cached) == losses(images)
    evaluated = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (images, cached)
    ]
    assert evaluated[0] == evaluated[1]
    assert "Seq2SeqTrainer.prediction_step` is overridden" in caplog.text
    # Arguments of the trainer behind the mixin reach it.
    assert cached.evaluate(max_length=7, metric_key_prefix="test")["test_loss"] == evaluated[1][-1]
    assert cached._gen_kwargs["max_length"] == 7


class SavesInItsOwnWay(Trainer):
    """As sentence-transformers does: what its checkpoints hold are not the model's own keys."""

    loaded = 0

    def _load_from_checkpoint(self, resume_from_checkpoint):
        self.loaded += 1


class MixedOwnWay(FreezeCacheMixin, SavesInItsOwnWay):
    pass


def test_checkpoints_of_another_class_are_loaded_by_it(tmp_path):
    train(MixedOwnWay, tmp_path, manual("1:2"), save_strategy="epoch")
    resumed = train(MixedOwnWay, tmp_path, manual("1:2"), resume=str(tmp_path / "checkpoint-12"))
    assert resumed.loaded == 1


def test_checkpoint_that_does_not_fit_is_an_error_only_where_a_policy_freezes(tmp_path):
    train(FreezeCacheTrainer, tmp_path, manual("1:2"), save_strategy="epoch")
    weights_file = tmp_path / "checkpoint-12" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights_file)
    tensors.pop("classifier.bias")
    safetensors.torch.save_file(tensors, weights_file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="classifier.bias"):
        train(FreezeCacheTrainer, tmp_path, manual("1:2"), resume=str(tmp_path / "checkpoint-12"))
    train(FreezeCacheTrainer, tmp_path, FreezeCacheConfig(policy="none"), resume=str(tmp_path / "checkpoint-12"))
