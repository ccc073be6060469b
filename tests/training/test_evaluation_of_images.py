"""Cached evaluations that need what only samples have: they run on samples, and say so."""

import pytest
import torch
from support.cached_evaluations import evaluations, messages, without_cached
from support.helpers import make_args, manual, pixel_dataset, tiny_vit

from hf_freezecache import FreezeCacheTrainer


class ReadsHiddenStates(FreezeCacheTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss
        if not model.training:
            loss = loss + model(**inputs, output_hidden_states=True).hidden_states[0].mean()
        return (loss, outputs) if return_outputs else loss


class ReadsImages(FreezeCacheTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training:
            loss = loss + inputs["pixel_values"].mean()
        return (loss, outputs) if return_outputs else loss


class AnswersHiddenStates(FreezeCacheTrainer):
    """Predictions are hidden states, too: `output_hidden_states` in the configuration does the same."""

    def __init__(self, *args, model, **kwargs):
        model.config.output_hidden_states = True
        super().__init__(*args, model=model, **kwargs)


def train(trainer_class, path, cache_eval):
    trainer = trainer_class(
        model=tiny_vit(),
        args=make_args(path, eval_strategy="epoch"),
        train_dataset=pixel_dataset(16),
        eval_dataset=pixel_dataset(8, seed=5),
        freeze_cache=manual("1:2", cache_eval=cache_eval, codec="fp32"),
        compute_metrics=lambda prediction: {"parts": float(len(prediction.predictions))},
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("trainer_class", [ReadsHiddenStates, ReadsImages, AnswersHiddenStates])
def test_evaluations_that_need_images_run_on_images(trainer_class, tmp_path, caplog):
    on_images = train(trainer_class, tmp_path / "images", False)
    cached = train(trainer_class, tmp_path / "cached", True)
    assert without_cached(evaluations(cached)) == evaluations(on_images)
    assert messages(caplog, "Evaluations cannot run on features, so they run on samples")
    assert torch.equal(cached.model.classifier.weight, on_images.model.classifier.weight)
