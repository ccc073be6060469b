"""Views in a store, and choosing among them."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.builds import Rows, collate
from support.helpers import make_args, manual, pixel_dataset, run, tiny_vit
from support.images import TO_PIXELS, OpaqueFlip, crop_and_flip, picture_dataset, replayable
from support.sessions import chain_of, rows_of, session_of, spec_maker_of
from torchvision.transforms import v2
from transformers import Trainer, TrainerCallback

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, ReplayableTransform
from hf_freezecache.build.sizing import estimate_bytes
from hf_freezecache.build.survey import survey
from hf_freezecache.cache.fingerprint import sample_digest
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.replay.collator import ReplayCollator
from hf_freezecache.replay.dataset import ReplayDataset, SourceSwitch, choose_views
from hf_freezecache.replay.decode import replay_features


def train(dataset, folder, **settings):
    """One replay epoch at cut 2; returns the trainer and its store."""
    own = {name: settings.pop(name) for name in ("data_collator",) if name in settings}
    config = manual("0:2", cache="always", **settings)
    trainer = run(tiny_vit(), dataset, folder, config, num_train_epochs=1, remove_unused_columns=False, **own)
    return trainer, FeatureStore.open(trainer.freeze_status().store_path)


# What is random


def test_survey_tells_replayable_from_opaque():
    def look(transform, collator=collate):
        return survey(RowSource(picture_dataset().with_transform(transform), collator, 4, 0), "pixel_values")

    def noisy(samples):
        batch = collate(samples)
        return {**batch, "pixel_values": batch["pixel_values"] + torch.randn(1)}

    assert not survey(RowSource(Rows(), collate, 4, 0), "pixel_values").random
    assert not look(replayable(v2.Compose(TO_PIXELS))).random
    with pytest.raises(ValueError, match="nothing at random and differs"):
        look(replayable(v2.Compose([v2.RandomHorizontalFlip(p=1.0), *TO_PIXELS])))
    with pytest.raises(ValueError, match="the same size"):
        look(replayable(v2.Compose([v2.RandomCrop(8), *TO_PIXELS])))
    found = look(replayable())
    assert found.random and found.replayable
    opaque = look(OpaqueFlip())
    assert opaque.random and not opaque.replayable and "ReplayableTransform" in opaque.why_not and opaque.own_inputs
    refusing = look(replayable(v2.Compose([v2.RandAugment(), *TO_PIXELS])))
    assert refusing.random and not refusing.replayable and not refusing.own_inputs
    both = look(replayable(), noisy)
    assert both.random and not both.replayable and "collator" in both.why_not and both.own_inputs


def test_deterministic_data_gets_no_views(tmp_path):
    _, store = train(pixel_dataset(), tmp_path, views=2)
    assert store.manifest.views == 0 and store.views.columns == {}


# What is kept


@pytest.mark.parametrize(
    ("pipeline", "geometry"),
    [
        (crop_and_flip(), "projective"),
        (v2.Compose([v2.RandomRotation(30), *TO_PIXELS]), "projective"),
        (v2.Compose([v2.RandomCrop(16, padding=4, padding_mode="reflect"), *TO_PIXELS]), "dense"),
        (v2.Compose([*TO_PIXELS, v2.RandomErasing(p=1.0)]), "dense"),
        (v2.Compose([v2.RandAugment(), *TO_PIXELS]), None),
    ],
    ids=["crop and flip", "rotation", "reflecting crop", "erasing", "RandAugment"],
)
def test_geometry_is_kept_in_the_smallest_way_that_fits(pipeline, geometry, tmp_path):
    trainer, store = train(picture_dataset().with_transform(replayable(pipeline)), tmp_path)
    assert store.manifest.views == 1 and store.manifest.geometry == geometry
    assert (store.manifest.sensitive_channels is None) == (geometry is None)
    assert store.verify()
    assert np.isfinite([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).all()


def test_misfit_seen_only_while_building_keeps_whole_rows(tmp_path, caplog):
    """A transform that is rarely no homography: what the first samples show does not decide."""
    logging.getLogger("hf_freezecache").propagate = True
    rare = v2.RandomApply([v2.RandomErasing(p=1.0)], p=0.05)
    pipeline = v2.Compose([v2.RandomHorizontalFlip(), *TO_PIXELS, rare])
    _, store = train(picture_dataset(64).with_transform(replayable(pipeline)), tmp_path, sensitivity_batches=1)
    assert store.manifest.geometry == "dense"
    assert not list(store.path.parent.glob("*.tmp-*"))


def test_columns_of_views(tmp_path):
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=2, sensitive_fraction=0.25)
    names = {"base", "special", "sample_id", "labels"}
    for view in (1, 2):
        names |= {f"view_{view}", f"view_special_{view}", f"geometry_{view}"}
    assert set(store.dataset.column_names) == names
    # 8 of 32 channels of 16 tokens at 4 bits; 32 half floats; 8 floats.
    assert store.dataset.features["view_1"].length == 8 * 16 // 2
    assert store.dataset.features["view_special_1"].length == 64
    assert store.dataset.features["geometry_1"].length == 8
    assert len(store.manifest.sensitive_channels) == 8


def test_least_similar_channels_are_kept(tmp_path):
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path)
    similarity = load_file(store.path / "sensitivity.safetensors")["similarity"]
    kept = store.manifest.sensitive_channels
    others = [channel for channel in range(32) if channel not in kept]
    assert similarity[kept].max() <= similarity[others].min()


@pytest.mark.parametrize(
    "settings", [{}, dict(views=2), dict(sensitive_fraction=1.0), dict(views=0), dict(codec="fp32")]
)
def test_estimated_bytes_are_those_of_the_files(settings, tmp_path):
    trainer, store = train(picture_dataset(100).with_transform(replayable()), tmp_path, **settings)
    spec_maker = spec_maker_of(trainer)
    assert store.bytes == estimate_bytes(spec_maker.make(2, spec_maker.context.config.codec))


def test_budget_decides_the_number_of_channels(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    for budget, expected in (("4KB", 15), ("4097", 16), ("1MB", None), ("0", 0)):
        _, store = train(dataset, tmp_path / budget, sensitive_budget=budget)
        kept = store.manifest.sensitive_channels
        if expected is None:
            assert kept is None and store.manifest.views == 1
            continue
        # 32 samples, 8 bytes a channel.
        assert len(kept) == expected


def test_store_of_other_settings_is_not_reused(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    paths = {
        train(dataset, tmp_path, feature_cache_dir=str(tmp_path / "cache"), **settings)[1].path
        for settings in ({}, {}, dict(views=2), dict(sensitive_fraction=0.5), dict(similarity="cosine"), dict(views=0))
    }
    assert len(paths) == 5


def test_image_of_the_other_views_changes_the_fingerprint(tmp_path):
    cache = str(tmp_path / "cache")
    flips = [replayable(v2.Compose([v2.RandomHorizontalFlip(p), *TO_PIXELS])) for p in (0.4, 0.6)]
    paths = {
        train(picture_dataset().with_transform(flip), tmp_path, feature_cache_dir=cache)[1].path for flip in flips
    }
    assert len(paths) == 2


# Opaque augmentation


def test_opaque_draws_are_kept_whole_and_said(tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    trainer, store = train(picture_dataset().with_transform(OpaqueFlip()), tmp_path, views=2, codec="fp32")
    assert "3 whole draws" in caplog.text and "ReplayableTransform" in caplog.text
    assert store.manifest.views == 2 and store.manifest.geometry is None and store.manifest.own_inputs
    base, first = (store.read_rows(range(32), np.full(32, view)) for view in (0, 1))
    assert not torch.equal(base["base"], first["base"])
    source, chain = rows_of(trainer), chain_of(trainer)
    for batch in range(source.num_ranges):
        rows = source.rows(batch)
        codes = store.read_rows(rows, np.full(len(rows), 1))
        true = chain.prefix({"pixel_values": source.collate(rows, 1)["pixel_values"]}, 2)
        assert torch.equal(store.codec.decode(codes), true)


def test_no_views_of_random_data_says_that_augmentation_ends(tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=0)
    assert "augmentation ends at the freeze point" in caplog.text and store.manifest.views == 0


def test_labels_that_a_collator_draws_go_with_their_draw(tmp_path):
    """A collator that mixes labels: each stored draw keeps its own."""

    def drawing_labels(samples):
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "labels": torch.tensor([sample["labels"] for sample in samples]),
            "weight": torch.rand(len(samples)),
            "names": [f"{sample['labels']}-{int(torch.randint(9, ()))}" for sample in samples],
        }

    trainer, store = train(
        picture_dataset().with_transform(replayable()), tmp_path, data_collator=drawing_labels, views=1
    )
    source = rows_of(trainer)
    for view in (0, 1):
        for batch in range(source.num_ranges):
            rows = source.rows(batch)
            read, drawn = store.read_rows(rows, np.full(len(rows), view)), source.collate(rows, view)
            assert torch.equal(read["weight"], drawn["weight"]) and read["names"] == drawn["names"]


# When it cannot be done as wished


def test_views_that_show_little_of_the_base_view_are_kept_whole(tmp_path, caplog):
    logging.getLogger("hf_freezecache").propagate = True
    corner = v2.Compose([v2.CenterCrop(4), v2.Resize(16), *TO_PIXELS])
    anywhere = v2.Compose([v2.RandomCrop(8), v2.Resize(16), *TO_PIXELS])
    transform = ReplayableTransform(train=anywhere, base=corner)
    _, store = train(picture_dataset(size=32).with_transform(transform), tmp_path)
    assert store.manifest.geometry is None and store.manifest.views == 1
    assert "% of what views show is not in their base view" in caplog.text and "MB in all" in caplog.text


def test_fallback_that_the_budget_cannot_hold_is_declined(tmp_path, caplog):
    """What turned out to be necessary is more than what was planned."""
    _, planned = train(picture_dataset().with_transform(replayable()), tmp_path / "free", codec="int3")
    erasing = replayable(v2.Compose([*TO_PIXELS, v2.RandomErasing(p=1.0)]))
    config = manual("0:2", codec="int3", cache_budget=str(planned.total_bytes))
    settings = dict(num_train_epochs=1, remove_unused_columns=False)
    trainer = run(tiny_vit(), picture_dataset().with_transform(erasing), tmp_path / "run", config, **settings)
    assert "Geometry is kept for every position" in caplog.text and "are left of the budget" in caplog.text
    assert trainer.freeze_status().cut == 2 and not trainer.freeze_status().replaying
    assert not list((tmp_path / "run" / "_freeze_cache").glob("*"))


@pytest.mark.parametrize(
    ("base", "message"),
    [(v2.Compose(TO_PIXELS), "same size"), (crop_and_flip(32), "`base` draws random numbers")],
)
def test_pipelines_that_do_not_fit_are_told_before_the_first_epoch(base, message, tmp_path):
    dataset = picture_dataset(size=32).with_transform(ReplayableTransform(train=crop_and_flip(), base=base))
    steps = []

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    settings = dict(num_train_epochs=2, remove_unused_columns=False, callbacks=[Steps()])
    with pytest.raises(ValueError, match=message):
        run(tiny_vit(image_size=32), dataset, tmp_path, manual("1:2", cache="always"), **settings)
    assert not steps


def test_cutmix_of_features_without_a_grid_is_declined(tmp_path):
    config = manual("0:4", cache="always", cutmix_alpha=1.0, blocks=["a", "b", "c", "d"])
    trainer = run(_Vectors(), pixel_dataset(), tmp_path, config, num_train_epochs=1)
    assert trainer.freeze_status().cut == 4 and not trainer.freeze_status().replaying


class _Vectors(torch.nn.Module):
    """Four blocks whose features are vectors."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_labels": 5})
        self.a, self.b = torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8)
        self.c, self.d, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.d(self.c(self.b(self.a(pixel_values)))))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_build_counts_what_the_prefix_ran_on(tmp_path):
    trainer, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=2, sensitivity_batches=2)
    build = next(phase for phase in trainer.freeze_cache_report().phases if phase.mode == "build")
    # 32 samples in three views, and two batches of 8 in two views to compare.
    assert build.flops == session_of(trainer).meter.per_sample("build", 2) * (32 * 3 + 2 * 8 * 2)


def test_view_changes_the_digest_of_sampled_rows():
    first, second = (
        sample_digest(RowSource(picture_dataset().with_transform(replayable(pipeline)), collate, 4, 0))
        for pipeline in (v2.Compose(TO_PIXELS), v2.Compose([v2.RandomHorizontalFlip(), *TO_PIXELS]))
    )
    assert first != second


# Which view


def test_choice_depends_on_seed_epoch_and_sample_alone():
    samples = list(range(1000))
    chosen = choose_views(3, 5, samples, 2)
    assert np.array_equal(choose_views(3, 5, samples[::-1], 2)[::-1], chosen)
    assert [int(choose_views(3, 5, [sample], 2)[0]) for sample in samples[:20]] == chosen[:20].tolist()
    assert not np.array_equal(choose_views(3, 6, samples, 2), chosen)
    assert not np.array_equal(choose_views(4, 5, samples, 2), chosen)


def test_every_view_is_chosen_alike():
    counts = np.bincount(choose_views(0, 0, range(9000), 2), minlength=3)
    assert abs(counts - 3000).max() < 200
    assert choose_views(0, 0, range(10), 0).tolist() == [0] * 10


def test_batch_holds_the_chosen_views(tmp_path):
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=2)
    switch = SourceSwitch()
    switch.set(store.path)
    switch.epoch = 4
    dataset = ReplayDataset(list(range(32)), switch, seed=3)
    batch = ReplayCollator(None)(dataset.__getitems__([5, 1, 30]))
    chosen = choose_views(3, 4, [5, 1, 30], 2)
    assert batch["freezecache.view_index"].tolist() == chosen.tolist()
    singly = ReplayCollator(None)([dataset[5], dataset[1], dataset[30]])
    assert batch.keys() == singly.keys()
    for name, value in batch.items():
        assert torch.equal(value, singly[name])
        for place, view in enumerate(chosen):
            if view and name == "freezecache.view":
                assert value[place].tolist() == store.dataset[[5, 1, 30][place]][f"view_{view}"]


def test_mixed_batch_is_what_its_rows_are_alone(tmp_path):
    _, store = train(picture_dataset().with_transform(replayable()), tmp_path, views=1)
    views = np.array([0, 1, 1, 0, 1])
    codes = store.read_rows([3, 4, 5, 6, 7], views)
    codes = {name: codes[name] for name in store.code_names(codes)}
    together = replay_features(store, codes)
    for row in range(5):
        alone = replay_features(store, {name: value[row : row + 1] for name, value in codes.items()})
        assert torch.equal(alone[0], together[row])


# Live epochs


def test_live_draws_depend_on_seed_epoch_and_sample_alone():
    switch = SourceSwitch()
    rows = picture_dataset().with_transform(replayable())

    def pixels(indices, epoch, seed=3):
        switch.epoch = epoch
        return {
            index: row["pixel_values"]
            for index, row in zip(indices, ReplayDataset(rows, switch, seed).__getitems__(indices), strict=True)
        }

    together = pixels(list(range(16)), epoch=1)
    torch.manual_seed(123)
    backwards = pixels(list(range(15, -1, -1)), epoch=1)
    assert all(torch.equal(together[index], backwards[index]) for index in together)
    for other in (pixels(list(range(16)), epoch=2), pixels(list(range(16)), epoch=1, seed=4)):
        assert not all(torch.equal(together[index], other[index]) for index in together)


def test_plain_trainer_takes_a_replayable_transform(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    run(tiny_vit(), dataset, tmp_path, trainer_class=Trainer, num_train_epochs=1, remove_unused_columns=False)


# Mixing and noise


@pytest.mark.parametrize("own_loss", [False, True])
def test_soft_labels_reach_the_loss_in_live_and_replay_epochs(own_loss, tmp_path):
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    trainer = FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, num_train_epochs=2, remove_unused_columns=False),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(seed=1),
        freeze_cache=manual("1:2", cache="always", mixup_alpha=0.5, cutmix_alpha=0.5),
        **({"compute_loss_func": loss} if own_loss else {}),
    )
    trainer.train()
    assert {phase.mode for phase in trainer.freeze_cache_report().phases} == {"live", "build", "replay"}
    if own_loss:
        assert len(seen) == 8 and all(labels.shape == (8, 5) for labels in seen)
        assert all(torch.allclose(labels.sum(1), torch.ones(8)) for labels in seen)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_loss_of_a_subclass_is_told_about_soft_labels(tmp_path, caplog):
    class OwnLoss(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, **settings):
            return super().compute_loss(model, inputs, **settings)

    logging.getLogger("hf_freezecache").propagate = True
    config = manual("0:2", mixup_alpha=1.0)
    OwnLoss(model=tiny_vit(), args=make_args(tmp_path), train_dataset=pixel_dataset(), freeze_cache=config)
    assert "labels of probabilities" in caplog.text


def test_mixing_and_noise_change_a_replay_epoch(tmp_path):
    found = {}
    for name, settings in {"plain": {}, "mixup": dict(mixup_alpha=1.0), "noise": dict(feature_noise=0.5)}.items():
        trainer, _ = train(pixel_dataset(), tmp_path / name, **settings)
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found["plain"] != found["mixup"] and found["plain"] != found["noise"]


def test_mixing_without_freezing_is_possible(tmp_path):
    config = FreezeCacheConfig(policy="none", mixup_alpha=1.0)
    plain = run(tiny_vit(), pixel_dataset(), tmp_path, FreezeCacheConfig(policy="none"), num_train_epochs=1)
    mixed = run(tiny_vit(), pixel_dataset(), tmp_path, config, num_train_epochs=1)
    first, second = ([entry.get("loss") for entry in trainer.state.log_history] for trainer in (plain, mixed))
    assert first != second
