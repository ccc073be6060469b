"""Models with the weights of their initialization: the defaults freeze nothing of them, nor in a resumed training."""

from support.helpers import assert_same_weights, losses, messages, pixel_dataset, run, tiny_vit, weights
from support.pretrained import settle
from transformers import Trainer

from hf_freezecache import FreezeCacheConfig


def test_the_defaults_freeze_what_was_trained_before_only(tmp_path, caplog):
    plain = run(tiny_vit(), pixel_dataset(), tmp_path / "plain", trainer_class=Trainer)
    trainer = run(tiny_vit(), pixel_dataset(), tmp_path / "untrained")
    assert "those of an initialization" in messages(caplog)
    assert trainer.freeze_status().cut == 0 and losses(trainer) == losses(plain)
    assert_same_weights(weights(trainer), weights(plain))
    assert "initialization" in str(trainer.freeze_cache_report())
    assert run(settle(tiny_vit()), pixel_dataset(), tmp_path / "settled").freeze_status().cut > 0
    explicit = run(tiny_vit(), pixel_dataset(), tmp_path / "explicit", FreezeCacheConfig())
    assert explicit.freeze_status().cut > 0


def test_a_resumed_training_goes_on_as_it_has_begun(tmp_path):
    """Its weights are trained by then, but the uninterrupted training freezes nothing."""
    settings = dict(num_train_epochs=4, save_strategy="epoch")
    whole = run(tiny_vit(), pixel_dataset(), tmp_path, **settings)
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        resumed = run(tiny_vit(), pixel_dataset(), tmp_path, resume=str(tmp_path / checkpoint), **settings)
        assert resumed.freeze_status().cut == 0 and "initialization" in str(resumed.freeze_cache_report())
        assert_same_weights(weights(resumed), weights(whole))


def test_a_resumed_training_freezes_where_that_is_asked_for(tmp_path):
    settings = dict(num_train_epochs=4, save_strategy="epoch")
    run(tiny_vit(), pixel_dataset(), tmp_path, **settings)
    checkpoint = str(tmp_path / "checkpoint-4")
    resumed = run(tiny_vit(), pixel_dataset(), tmp_path, FreezeCacheConfig(), resume=checkpoint, **settings)
    assert resumed.freeze_status().cut > 0
