"""Images of several sizes, of which each batch has one: stored in their own sizes."""

import pytest
import timm
import torch
from support.helpers import (
    CLASSES,
    assert_same_weights,
    losses,
    make_args,
    manual,
    messages,
    tiny_resnet,
    tiny_vit,
    weights,
)
from support.pretrained import settle
from support.sized_images import SIZES, SizedImages, interpolating, train_sized
from support.sounds import CUT_IN_LAYERS, Sounds, wav2vec2
from support.token_rows import Texts, gpt2
from transformers import ConvNextConfig, ConvNextForImageClassification, TrainerCallback, default_data_collator

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer, plan, wrap_classifier
from hf_freezecache.cache.names import CHECKSUM, TOKENS


def convnext():
    torch.manual_seed(0)
    sizes = dict(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=CLASSES)
    return ConvNextForImageClassification(ConvNextConfig(**sizes))


def timm_convnext():
    torch.manual_seed(0)
    return wrap_classifier(timm.create_model("test_convnext", num_classes=CLASSES))


def cached(points="1:3", **settings):
    return manual(points, codec="fp32", on_mismatch="error", **settings)


def frozen(points="1:3"):
    return manual(points, cache="never")


def store_of(folder) -> FeatureStore:
    (path,) = [path.parent for path in folder.rglob("manifest.json")]
    return FeatureStore.open(path)


class CountLive(TrainerCallback):
    """Counts how often the stem runs in steps of the last epoch."""

    def __init__(self):
        self.runs, self.is_counting = 0, False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.epoch >= args.num_train_epochs - 1 and not self.is_counting:
            self.is_counting = True
            stem = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
            stem.register_forward_hook(self.count)

    def count(self, *args):
        self.runs += 1


MODELS = [
    pytest.param(tiny_resnet, default_data_collator, "1:2", marks=pytest.mark.slow),
    (tiny_resnet, default_data_collator, "1:5"),
    (convnext, default_data_collator, "1:3"),
    pytest.param(timm_convnext, default_data_collator, "1:3", marks=pytest.mark.slow),
    pytest.param(tiny_vit, interpolating, "1:1", marks=pytest.mark.slow),
    (tiny_vit, interpolating, "1:3"),
]


@pytest.mark.parametrize(("make", "collator", "points"), MODELS)
def test_batches_of_one_image_of_any_size_are_cached(make, collator, points, tmp_path):
    settings = dict(data_collator=collator, per_device_train_batch_size=1, trainer_class=FreezeCacheTrainer)
    live = CountLive()
    expected = train_sized(make, SizedImages(12), tmp_path / "frozen", frozen(points), **settings)
    found = train_sized(make, SizedImages(12), tmp_path / "cached", cached(points), callbacks=[live], **settings)
    assert found.freeze_status().replaying and live.runs == 0
    assert losses(found) == losses(expected)
    assert_same_weights(weights(found), weights(expected))
    assert store_of(tmp_path / "cached").manifest.inputs.keys() == {TOKENS, CHECKSUM}


@pytest.mark.parametrize(("make", "collator", "points"), MODELS)
def test_batches_of_one_size_each_are_cached(make, collator, points, tmp_path):
    """A build runs other groups than the training: kernels for other batches may round otherwise."""
    live = CountLive()
    expected = train_sized(make, SizedImages(), tmp_path / "frozen", frozen(points), data_collator=collator)
    settings = dict(data_collator=collator, callbacks=[live])
    found = train_sized(make, SizedImages(), tmp_path / "cached", cached(points), **settings)
    assert found.freeze_status().replaying and live.runs == 0
    assert losses(found) == pytest.approx(losses(expected), abs=2e-4)


@pytest.mark.parametrize(("make", "collator", "points"), MODELS)
def test_training_is_the_frozen_one_bit_for_bit_where_a_build_has_its_batches(make, collator, points, tmp_path):
    settings = dict(data_collator=collator, trainer_class=FreezeCacheTrainer, train_sampling_strategy="sequential")
    images = SizedImages(in_a_row=4)
    expected = train_sized(make, images, tmp_path / "frozen", frozen(points), **settings)
    found = train_sized(make, images, tmp_path / "cached", cached(points), **settings)
    assert found.freeze_status().replaying
    assert losses(found) == losses(expected)
    assert_same_weights(weights(found), weights(expected))


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"gradient_accumulation_steps": 2},
        {"dataloader_drop_last": True},
    ],
    ids=["workers", "accumulated", "dropped"],
)
def test_ways_to_train_on_features_of_several_sizes(settings, tmp_path):
    expected = train_sized(tiny_resnet, SizedImages(), tmp_path / "frozen", frozen(), **settings)
    found = train_sized(tiny_resnet, SizedImages(), tmp_path / "cached", cached(), **settings)
    assert found.freeze_status().replaying
    assert losses(found) == pytest.approx(losses(expected), abs=2e-4)


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4", "mixed"])
@pytest.mark.parametrize("lossless", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_codecs_of_features_of_several_sizes(codec, lossless, tmp_path):
    expected = train_sized(tiny_resnet, SizedImages(), tmp_path / "frozen", frozen())
    config = manual("1:3", codec=codec, lossless=lossless, on_mismatch="error")
    found = train_sized(tiny_resnet, SizedImages(), tmp_path / "cached", config)
    assert found.freeze_status().replaying
    assert losses(found) == pytest.approx(losses(expected), abs=0.2 if codec == "int4" else 0.05)


def test_several_cuts_are_stored_one_after_the_other(tmp_path):
    """Features have other sizes at each."""
    points = "0:1,1:3,2:5"
    expected = train_sized(tiny_resnet, SizedImages(), tmp_path / "frozen", frozen(points))
    found = train_sized(tiny_resnet, SizedImages(), tmp_path / "cached", cached(points))
    assert [phase.mode for phase in found.freeze_cache_report().phases].count("replay") == 3
    assert losses(found) == pytest.approx(losses(expected), abs=2e-4)


def sound_alone(samples):
    (sample,) = samples
    return {"input_values": sample["input_values"][None], "labels": torch.tensor([sample["labels"]])}


def text_alone(samples):
    (sample,) = samples
    return {"input_ids": torch.tensor([sample["input_ids"]]), "labels": torch.tensor([sample["labels"]])}


@pytest.mark.parametrize(
    ("make", "samples", "collator", "points"),
    [
        pytest.param(wav2vec2, Sounds(12), sound_alone, "1:4", marks=CUT_IN_LAYERS),
        pytest.param(wav2vec2, Sounds(12), sound_alone, "1:6", marks=CUT_IN_LAYERS),
        (gpt2, Texts(12), text_alone, "1:3"),
    ],
)
def test_samples_without_padding_are_stored_in_their_own_lengths(make, samples, collator, points, tmp_path):
    """The collator takes a single sample."""
    settings = dict(data_collator=collator, per_device_train_batch_size=1, trainer_class=FreezeCacheTrainer)
    expected = train_sized(make, samples, tmp_path / "frozen", frozen(points), **settings)
    found = train_sized(make, samples, tmp_path / "cached", cached(points), **settings)
    assert found.freeze_status().replaying
    assert losses(found) == losses(expected)
    assert_same_weights(weights(found), weights(expected))


def test_features_of_several_sizes_are_mixed(tmp_path):
    """Mixup of features is not mixup of images; which samples are mixed, and how much, is drawn the same."""
    trained = {
        name: train_sized(tiny_resnet, SizedImages(16), tmp_path / name, config)
        for name, config in (
            ("cached", cached(mixup_alpha=0.2)),
            ("frozen", manual("1:3", cache="never", mixup_alpha=0.2)),
        )
    }
    assert trained["cached"].freeze_status().replaying
    assert losses(trained["cached"]) == pytest.approx(losses(trained["frozen"]), abs=0.05)


# What is refused


def of_another_size_each_time(samples):
    """Multi-scale training: a size is drawn for each batch."""
    batch = default_data_collator(samples)
    size = 32 + 16 * int(torch.randint(3, ()))
    return {**batch, "pixel_values": torch.nn.functional.interpolate(batch["pixel_values"], size=(size, size))}


def of_the_smallest_of_the_batch(samples):
    size = min(sample["pixel_values"].shape[1] for sample in samples)
    return default_data_collator([{**each, "pixel_values": each["pixel_values"][:, :size, :32]} for each in samples])


class Mirrored(SizedImages):
    """Images that are mirrored at random."""

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        return {
            **sample,
            "pixel_values": sample["pixel_values"].flip(-1) if torch.rand(()) < 0.5 else sample["pixel_values"],
        }


class CutAtRandom(SizedImages):
    """Images of which a part is drawn, of a size that is drawn as well."""

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        return {**sample, "pixel_values": sample["pixel_values"][:, : 16 * int(torch.randint(1, 3, ()))]}


REFUSED = [
    (SizedImages(sizes=[(32, 32)]), of_another_size_each_time, 4, "at random|cannot be told how"),
    (SizedImages(), of_another_size_each_time, 1, "drawn at random"),
    (SizedImages(), of_the_smallest_of_the_batch, 4, "cannot be told how the collator pads"),
    (Mirrored(), default_data_collator, 4, "drawn at random"),
    (CutAtRandom(), default_data_collator, 1, "drawn at random"),
]


@pytest.mark.parametrize(("images", "collator", "batch_size", "why"), REFUSED)
def test_sizes_that_are_not_those_of_samples_are_refused_before_the_first_step(
    images, collator, batch_size, why, tmp_path, caplog
):
    settings = dict(data_collator=collator, per_device_train_batch_size=batch_size)
    with pytest.raises(ValueError, match=why):
        train_sized(tiny_resnet, images, tmp_path / "always", cached(), **settings)
    caplog.set_level("WARNING")
    expected = train_sized(lambda: settle(tiny_resnet()), images, tmp_path / "frozen", frozen(), **settings)
    config = manual("1:3", cache="auto")
    found = train_sized(lambda: settle(tiny_resnet()), images, tmp_path / "auto", config, **settings)
    assert found.freeze_status().cut == 3 and not found.freeze_status().replaying
    assert losses(found) == losses(expected)


class Flattens(torch.nn.Module):
    """Its second block gets the whole map as one vector."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 8, 8)
        self.middle = torch.nn.ReLU()
        self.head = torch.nn.Linear(1, CLASSES)

    def forward(self, pixel_values, labels=None):
        vector = self.middle(self.stem(pixel_values).flatten(1))
        logits = self.head(vector.mean(1, keepdim=True))
        return (
            {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}
            if labels is not None
            else {"logits": logits}
        )


def test_vectors_whose_length_is_the_size_are_refused_in_words(tmp_path):
    def make():
        torch.manual_seed(0)
        return Flattens()

    config = cached("1:2", blocks=["stem", "middle"])
    with pytest.raises(ValueError, match="samples have several sizes.*channels, and others have"):
        train_sized(make, SizedImages(), tmp_path, config)


# Rows that change, stores that are used again


class Changing(SizedImages):
    """One image is another one from some time on: its numbers, or its size."""

    change = None

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        if row == 5 and self.change == "numbers":
            sample["pixel_values"] = -sample["pixel_values"]
        if row == 5 and self.change == "size":
            sample["pixel_values"] = sample["pixel_values"].transpose(1, 2)
        return sample


@pytest.mark.parametrize("change", ["numbers", "size"])
def test_an_image_that_changes_is_seen_and_runs_as_it_is(change, tmp_path, caplog):
    class Change(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps // 3:  # the first replayed batch is there
                images.change = change

    trained = {}
    for name, config in (("frozen", frozen()), ("cached", manual("1:3", codec="fp32"))):
        images = Changing(12)
        settings = dict(callbacks=[Change()], per_device_train_batch_size=1, trainer_class=FreezeCacheTrainer)
        trained[name] = train_sized(tiny_resnet, images, tmp_path / name, config, **settings)
    assert losses(trained["cached"]) == losses(trained["frozen"])
    assert "are others than when the feature store was built" in messages(caplog)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    settings = dict(save_strategy="epoch", trainer_class=FreezeCacheTrainer, per_device_train_batch_size=1)
    whole = train_sized(tiny_resnet, SizedImages(12), tmp_path / "run", cached(), **settings)
    checkpoint = str(tmp_path / "run" / f"checkpoint-{whole.state.global_step * 2 // 3}")
    resumed = train_sized(tiny_resnet, SizedImages(12), tmp_path / "run", cached(), resume=checkpoint, **settings)
    assert resumed.freeze_status().replaying
    assert losses(resumed)[-12:] == losses(whole)[-12:]
    assert_same_weights(weights(resumed), weights(whole))


def test_stores_are_reused_by_trainings_on_the_same_images(tmp_path, caplog):
    images, config = Changing(), cached("0:3", feature_cache_dir=str(tmp_path / "stores"))
    for name, change in (("first", None), ("second", None), ("third", "numbers")):
        images.change = change
        caplog.clear()
        train_sized(tiny_resnet, images, tmp_path / name, config, num_train_epochs=1)
        assert ("Reusing the feature store" in messages(caplog)) == (name == "second")


def test_evaluations_run_on_samples(tmp_path, caplog):
    caplog.set_level("WARNING")
    evaluated = SizedImages(8, sizes=[(32, 32)])
    settings = dict(eval_dataset=evaluated, eval_strategy="epoch")
    expected = train_sized(tiny_resnet, SizedImages(), tmp_path / "frozen", frozen(), **settings)
    found = train_sized(tiny_resnet, SizedImages(), tmp_path / "cached", cached(cache_eval=True), **settings)
    of_both = (
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (found, expected)
    )
    assert found.freeze_status().replaying and next(of_both) == pytest.approx(next(of_both), abs=2e-4)
    assert "evaluations run on samples" in messages(caplog)


@pytest.mark.parametrize("codec", ["int8", "fp16"])
def test_planned_bytes_are_those_of_the_store(codec, tmp_path):
    images, config = SizedImages(in_a_row=2), manual("1:3", codec=codec)
    args = make_args(tmp_path / "plan", remove_unused_columns=False, per_device_train_batch_size=4)
    [row] = plan(tiny_resnet(), images, config, args=args, batches=1, cuts=[3]).rows
    train_sized(tiny_resnet, images, tmp_path / "cached", config)
    assert row.bytes == store_of(tmp_path / "cached").bytes


def test_a_budget_holds_for_features_of_several_sizes(tmp_path, caplog):
    for name, budget in (("large", "50kB"), ("small", "10kB")):
        config = manual("1:3", codec="int8", cache_budget=budget)
        trained = train_sized(tiny_resnet, SizedImages(), tmp_path / name, config)
        assert trained.freeze_status().replaying == (name == "large")
    assert "it needs 14.5 kB even with codec `int3`, but only 10 kB of `cache_budget` are left" in messages(caplog)


def test_other_ways_to_make_a_store_fall_back_to_builds(tmp_path, caplog):
    caplog.set_level("WARNING")
    for setting, why in (
        ({"deepen": "cache"}, "several sizes, run again from their own inputs"),
        ({"materialize": "write_through"}, "these samples have several"),
    ):
        found = train_sized(tiny_resnet, SizedImages(), tmp_path / why[:5], cached("0:1,1:3", **setting))
        assert found.freeze_status().replaying
        assert why in messages(caplog)


@pytest.mark.parametrize("policy", [None, FreezeCacheConfig(policy="auto")])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_defaults_and_trials_take_images_of_several_sizes(policy, batch_size, tmp_path):
    settings = dict(per_device_train_batch_size=batch_size, num_train_epochs=6)
    trained = train_sized(lambda: settle(tiny_resnet()), SizedImages(), tmp_path, policy, **settings)
    assert trained.freeze_status().cut


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_head_start_takes_images_of_several_sizes(batch_size, tmp_path, caplog):
    """Those of one size together, all of them: 32 images, 8 of each size."""
    caplog.set_level("INFO", logger="hf_freezecache")
    settings = dict(head_start_epochs=2, head_start_lr=0.01)
    more = dict(per_device_train_batch_size=batch_size)
    trained = train_sized(
        lambda: settle(tiny_resnet()), SizedImages(), tmp_path / "started", cached(**settings), **more
    )
    [phase] = [phase for phase in trained.freeze_cache_report().phases if phase.mode == "head_start"]
    assert phase.steps == 2 * 32 // batch_size and "on features of 32 samples" in caplog.text


def test_a_head_that_reads_the_size_of_images_besides_its_feature_is_refused_in_words(tmp_path):
    class Scaled(type(tiny_resnet())):
        def forward(self, pixel_values, **kwargs):
            output = super().forward(pixel_values, **kwargs)
            output.logits = output.logits * (1 + self.resnet.embedder.seen)
            return output

    def make():
        model = settle(tiny_resnet())
        model.__class__ = Scaled
        embedder = model.resnet.embedder
        embedder.seen = 0

        def note(module, args):
            module.seen = args[0].shape[-1] // 16

        embedder.register_forward_pre_hook(note)
        return model

    config = frozen()
    config.head_start_epochs = 1
    with pytest.raises(ValueError, match="does not answer as the whole model does"):
        train_sized(make, SizedImages(), tmp_path, config)


def test_first_samples_of_several_sizes_are_told(tmp_path, caplog):
    """Others stand for them; what the collator has said is in the log, with its traceback."""
    caplog.set_level("DEBUG", logger="hf_freezecache")
    images = SizedImages(24, sizes=[SIZES[0], SIZES[1]])
    trainer = train_sized(tiny_resnet, images, tmp_path, frozen("1:3"), num_train_epochs=2)
    assert trainer.state.global_step
    told = [record for record in caplog.records if "first samples cannot be collated" in record.getMessage()]
    assert told and "(RuntimeError)" in told[0].getMessage() and any(record.exc_info for record in told)
