"""Collators that return no dict of the model's inputs: blocks are frozen all the same, without features."""

import pytest
import torch
from support.helpers import assert_same_weights, losses, make_args, manual, pixel_dataset, run, tiny_vit, weights
from transformers import Trainer, default_data_collator

from hf_freezecache import FreezeCacheTrainer


def as_tuple(samples):
    batch = default_data_collator(samples)
    return batch["pixel_values"], batch["labels"]


def as_list(samples):
    return list(as_tuple(samples))


def under_other_names(samples):
    batch = default_data_collator(samples)
    return {"image": batch["pixel_values"], "target": batch["labels"]}


def with_boxes(samples):
    return {**default_data_collator(samples), "boxes": [{"corners": [1, 2]} for _ in samples]}


class ByPosition(FreezeCacheTrainer):
    """Calls the model with arguments by position where it can."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        pixels, labels, *_ = inputs if isinstance(inputs, (tuple, list)) else inputs.values()
        return torch.nn.functional.cross_entropy(model(pixels).logits, labels)


class InTheStep(FreezeCacheTrainer):
    """Makes the model's inputs before `Trainer`'s own step."""

    def training_step(self, model, inputs, *args, **kwargs):
        pixels, labels, *_ = inputs if isinstance(inputs, (tuple, list)) else inputs.values()
        return super().training_step(model, {"pixel_values": pixels, "labels": labels}, *args, **kwargs)


def train(trainer_class, collator, path, cache="never"):
    trainer = trainer_class(
        model=tiny_vit(),
        args=make_args(path, num_train_epochs=3, remove_unused_columns=False),
        train_dataset=pixel_dataset(),
        data_collator=collator,
        freeze_cache=manual("1:2", cache=cache),
    )
    before = torch.get_rng_state()
    trainer.train()
    assert not torch.equal(before, torch.get_rng_state())
    return trainer


@pytest.mark.parametrize("trainer_class", [ByPosition, InTheStep])
def test_blocks_are_frozen_whatever_the_collator_returns(trainer_class, tmp_path):
    expected = train(trainer_class, default_data_collator, tmp_path)
    for collator in (as_tuple, as_list, under_other_names):
        trainer = train(trainer_class, collator, tmp_path)
        assert trainer.freeze_status().cut == 2 and losses(trainer) == losses(expected)
        assert_same_weights(weights(trainer), weights(expected))
        assert trainer.freeze_cache_report().totals.flops == expected.freeze_cache_report().totals.flops > 0


def test_entries_that_no_store_can_hold_cost_nothing_without_a_store(tmp_path):
    trainer = train(ByPosition, with_boxes, tmp_path)
    assert losses(trainer) == losses(train(ByPosition, default_data_collator, tmp_path))
    with pytest.raises(ValueError, match="'boxes' is neither one value per sample"):
        train(ByPosition, with_boxes, tmp_path, cache="always")


def test_with_features_the_message_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"it returned tuple. cache='never' freezes without features"):
        train(ByPosition, as_tuple, tmp_path, cache="auto")


def test_what_trainer_itself_refuses_is_refused_in_its_words(tmp_path):
    words = []
    for trainer_class, config in ((Trainer, None), (FreezeCacheTrainer, manual("1:2", cache="never"))):
        with pytest.raises(TypeError) as error:
            settings = dict(data_collator=as_tuple, remove_unused_columns=False, trainer_class=trainer_class)
            run(tiny_vit(), pixel_dataset(), tmp_path, config, **settings)
        words.append(str(error.value))
    assert words[0] == words[1]


def test_model_that_the_step_does_not_call_is_named(tmp_path):
    class Besides(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return self.model.vit(inputs[0]).last_hidden_state.mean()

    with pytest.raises(ValueError, match="does not call ViTForImageClassification"):
        train(Besides, as_tuple, tmp_path)
