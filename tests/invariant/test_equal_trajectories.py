"""Configurations that must give the same training, bit for bit (CPU, fp32)."""

import pytest
from support.helpers import assert_same_weights, losses, manual, pixel_dataset, run, tiny_resnet, tiny_vit, weights
from transformers import Trainer, TrainerCallback

from hf_freezecache import FreezeCacheConfig

MODELS = {"vit": (tiny_vit, 16), "resnet": (tiny_resnet, 32)}
POINTS = "1:2,3:4"
STEPS_PER_EPOCH = 4


class SaveAt(TrainerCallback):
    """Writes a checkpoint after the given steps."""

    def __init__(self, steps):
        self.steps = set(steps)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


@pytest.fixture(params=MODELS)
def model_and_data(request):
    make_model, size = MODELS[request.param]
    return make_model, pixel_dataset(32, size)


def test_policy_none_is_trainer(model_and_data, tmp_path):
    make_model, dataset = model_and_data
    plain = run(make_model(), dataset, tmp_path / "plain", trainer_class=Trainer)
    ours = run(make_model(), dataset, tmp_path / "ours", FreezeCacheConfig(policy="none"))
    assert losses(ours) == losses(plain)
    assert_same_weights(weights(ours), weights(plain))
    assert [sorted(entry) for entry in ours.state.log_history] == [sorted(entry) for entry in plain.state.log_history]
    assert ours.state.total_flos == plain.state.total_flos


def test_live_epochs_before_the_first_freeze_are_trainer(model_and_data, tmp_path):
    make_model, dataset = model_and_data
    plain = run(make_model(), dataset, tmp_path / "plain", trainer_class=Trainer)
    ours = run(make_model(), dataset, tmp_path / "ours", manual("3:4"))
    assert losses(ours)[: 3 * STEPS_PER_EPOCH] == losses(plain)[: 3 * STEPS_PER_EPOCH]


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_with_fp32_codec_is_freeze_only(model_and_data, workers, tmp_path):
    make_model, dataset = model_and_data
    settings = dict(num_train_epochs=5, dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0)
    frozen = run(make_model(), dataset, tmp_path / "frozen", manual(POINTS, cache="never"), **settings)
    cached = run(make_model(), dataset, tmp_path / "cached", manual(POINTS, codec="fp32"), **settings)
    assert {phase.mode for phase in cached.freeze_cache_report().phases} == {"live", "build", "replay"}
    assert losses(cached) == losses(frozen)
    assert_same_weights(weights(cached), weights(frozen))


def test_reused_store_is_built_store(model_and_data, tmp_path):
    make_model, dataset = model_and_data
    config = dict(feature_cache_dir=str(tmp_path / "cache"))
    first = run(make_model(), dataset, tmp_path / "first", manual(POINTS, **config))
    second = run(make_model(), dataset, tmp_path / "second", manual(POINTS, **config))
    assert [phase.epochs for phase in first.freeze_cache_report().phases if phase.mode == "build"] == [1, 1]
    # The store of the first cut was removed when that of the second one was complete.
    assert [phase.epochs for phase in second.freeze_cache_report().phases if phase.mode == "build"] == [1, 0]
    assert losses(second) == losses(first)
    assert_same_weights(weights(second), weights(first))


# Freeze points are at steps 4 and 12 of 20: before, at, just after, and in the middle of a live and of replay epochs.
@pytest.mark.parametrize(
    ("kept", "step"),
    [
        *(("fp32", step) for step in (2, 4, 5, 8, 11, 12, 14, 16)),
        *(("int4", step) for step in (2, 5, 8, 14)),
        *(("never", step) for step in (4, 11, 16)),
    ],
)
def test_resumed_is_uninterrupted(model_and_data, kept, step, tmp_path):
    make_model, dataset = model_and_data
    config = manual(POINTS, **({"cache": "never"} if kept == "never" else {"codec": kept}))
    whole = run(make_model(), dataset, tmp_path / "run", config, num_train_epochs=5, callbacks=[SaveAt([step])])
    resumed = run(make_model(seed=7), dataset, tmp_path / "run", config, resume=True, num_train_epochs=5)
    assert resumed.state.global_step == 20
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))
    assert _optimizer_state(resumed) == _optimizer_state(whole)
    assert resumed.freeze_status().cut == whole.freeze_status().cut == 4


def test_resumed_without_its_store_builds_the_same_one(model_and_data, tmp_path):
    make_model, dataset = model_and_data
    whole = run(
        make_model(),
        dataset,
        tmp_path / "run",
        manual(POINTS, feature_cache_dir=str(tmp_path / "first")),
        num_train_epochs=5,
        callbacks=[SaveAt([10])],
    )
    elsewhere = manual(POINTS, feature_cache_dir=str(tmp_path / "second"))
    resumed = run(make_model(seed=7), dataset, tmp_path / "run", elsewhere, resume=True, num_train_epochs=5)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))


def test_gradient_accumulation_cached_is_freeze_only(model_and_data, tmp_path):
    make_model, dataset = model_and_data
    settings = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    frozen = run(make_model(), dataset, tmp_path / "frozen", manual(POINTS, cache="never"), **settings)
    cached = run(make_model(), dataset, tmp_path / "cached", manual(POINTS, codec="fp32"), **settings)
    assert losses(cached) == losses(frozen)
    assert_same_weights(weights(cached), weights(frozen))


def _optimizer_state(trainer):
    state = trainer.optimizer.state_dict()["state"]
    return {index: {name: _plain(value) for name, value in entry.items()} for index, entry in state.items()}


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else value
