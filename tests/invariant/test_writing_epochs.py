"""Write-through: the store that a build would make, the training that live epochs would be, wherever it is resumed."""

import shutil

import pytest
import torch
from support.helpers import assert_same_weights, losses, manual, pixel_dataset, run, tiny_resnet, tiny_vit, weights
from support.images import OpaqueFlip, picture_dataset, replayable
from support.sessions import rows_of
from test_augmentation import model_and_data  # noqa: F401
from test_equal_trajectories import SaveAt

from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.replay.dataset import WriteRound, rotate_views

# Freeze at step 4 of 24; with one view the epochs from step 4 and from step 8 write, replay begins at step 12.
SETTINGS = dict(num_train_epochs=6, remove_unused_columns=False)
KEPT = {
    "channels": dict(views=1),
    "two views": dict(views=2, sensitive_fraction=0.5),
    "geometry alone": dict(views=1, sensitive_fraction=0.0),
    "whole": dict(views=1, sensitive_fraction=1.0),
    "base": dict(views=0),
}


def through(points="1:2", **settings):
    return manual(points, cache="always", materialize="write_through", **settings)


def store_of(trainer) -> FeatureStore:
    return FeatureStore.open(trainer.freeze_status().store_path)


@pytest.mark.parametrize(("kept", "codec"), [*((kept, "fp32") for kept in KEPT), ("two views", "int4")])
def test_finished_store_is_the_upfront_one(model_and_data, kept, codec, tmp_path):  # noqa: F811
    make_model, dataset = model_and_data
    settings, epochs = {**KEPT[kept], "codec": codec}, dict(num_train_epochs=4, remove_unused_columns=False)
    built = run(make_model(), dataset, tmp_path / "built", manual("0:2", cache="always", **settings), **epochs)
    written = run(make_model(), dataset, tmp_path / "written", through("0:2", **settings), **epochs)
    first, second = store_of(written), store_of(built)
    assert first.verify() and first.path.name != second.path.name
    assert first.manifest.made_from == {**second.manifest.made_from, "materialize": "write_through"}
    assert first.dataset[:] == second.dataset[:]
    assert sorted(path.name for path in first.path.iterdir()) == sorted(path.name for path in second.path.iterdir())
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("settings", [{}, dict(mixup_alpha=0.4, cutmix_alpha=1.0, feature_noise=0.05)])
def test_write_through_of_exact_features_is_upfront_training(settings, workers, tmp_path):
    """Data without chance: the epoch that writes is the replay epoch that it stands for, mixing included."""
    for make_model, size in ((tiny_vit, 16), (tiny_resnet, 32)):
        dataset, loading = pixel_dataset(30, size), dict(dataloader_num_workers=workers)
        folder = tmp_path / make_model.__name__
        built = run(make_model(), dataset, folder / "b", manual("1:2", codec="fp32", **settings), **loading)
        written = run(make_model(), dataset, folder / "w", through(codec="fp32", **settings), **loading)
        assert losses(written) == losses(built)
        assert_same_weights(weights(written), weights(built))


def test_writing_epochs_train_as_the_same_views_drawn_live(model_and_data, tmp_path):  # noqa: F811
    make_model, dataset = model_and_data
    settings = dict(num_train_epochs=4, remove_unused_columns=False)
    written = run(make_model(), dataset, tmp_path / "written", through("0:2", views=2), **settings)

    class SameViews(torch.utils.data.Dataset):
        """What the first three epochs draw, as pixels."""

        epoch, source = 0, rows_of(written)

        def __len__(self):
            return len(dataset)

        def __getitem__(self, row):
            [view] = rotate_views(self.source.seed, WriteRound(self.epoch, 2), [row])
            return {name: value[0] for name, value in self.source.collate([row], int(view)).items()}

    views = SameViews()

    class Epochs(SaveAt):
        def on_epoch_begin(self, args, state, control, **kwargs):
            views.epoch = round(state.epoch)

    live = run(
        make_model(), views, tmp_path / "live", manual("0:2", cache="never"), callbacks=[Epochs([])], **settings
    )
    assert losses(live)[:12] == losses(written)[:12]
    assert losses(live)[12:] != losses(written)[12:]


@pytest.mark.parametrize("left", ["directory", "nothing", "store"])
@pytest.mark.parametrize(("kept", "step"), [("channels", step) for step in (4, 6, 8, 11)] + [("whole", 6)])
def test_resumed_is_uninterrupted(kept, step, left, tmp_path):
    """At, in the middle of and after the epochs that write; with what a killed run leaves, and without."""
    dataset = picture_dataset(30).with_transform(replayable())
    config = through(**KEPT[kept])
    cache, aside = tmp_path / "run" / "_freeze_cache", tmp_path / "aside"

    class Kill(SaveAt):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == step + (step % 4 == 0):
                shutil.copytree(cache, aside)

    whole = run(tiny_vit(), dataset, tmp_path / "run", config, callbacks=[Kill([step])], **SETTINGS)
    if left != "store":
        shutil.rmtree(cache)
    if left == "directory":
        assert [path.suffix for path in aside.iterdir()] == [".partial"]
        shutil.move(aside, cache)
    resumed = run(tiny_vit(seed=7), dataset, tmp_path / "run", config, resume=True, **SETTINGS)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))
    assert resumed.freeze_status() == whole.freeze_status()
    assert [path.suffix for path in cache.iterdir()] == [""]


@pytest.mark.parametrize("step", [6, 8, 10])
def test_resumed_with_opaque_draws_is_uninterrupted_if_the_directory_is_kept(step, tmp_path):
    dataset = picture_dataset(30).with_transform(OpaqueFlip())
    cache, aside = tmp_path / "run" / "_freeze_cache", tmp_path / "aside"

    class Kill(SaveAt):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == step:
                shutil.copytree(cache, aside)

    whole = run(tiny_vit(), dataset, tmp_path / "run", through(), callbacks=[Kill([step])], **SETTINGS)
    shutil.rmtree(cache)
    shutil.move(aside, cache)
    resumed = run(tiny_vit(seed=7), dataset, tmp_path / "run", through(), resume=True, **SETTINGS)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))


def test_number_of_workers_changes_nothing(tmp_path):
    dataset = picture_dataset(30).with_transform(replayable())

    def without_dropout():
        # Loaders draw a seed for their workers, so that dropout draws other numbers behind them.
        return tiny_vit(hidden_dropout_prob=0.0)

    alone = run(without_dropout(), dataset, tmp_path / "0", through(views=2), **SETTINGS)
    for name, persistent in (("fresh", False), ("persistent", True)):
        workers = dict(dataloader_num_workers=2, dataloader_persistent_workers=persistent)
        loaded = run(without_dropout(), dataset, tmp_path / name, through(views=2), **SETTINGS, **workers)
        assert losses(loaded) == losses(alone)
        assert_same_weights(weights(loaded), weights(alone))
        assert store_of(loaded).dataset[:] == store_of(alone).dataset[:]


def test_drop_last_and_accumulation_leave_the_store_complete(tmp_path):
    dataset = picture_dataset(30).with_transform(replayable())
    settings = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3, dataloader_drop_last=True)
    written = run(tiny_vit(), dataset, tmp_path / "written", through(), **SETTINGS, **settings)
    built = run(tiny_vit(), dataset, tmp_path / "built", manual("1:2", cache="always"), **SETTINGS, **settings)
    assert store_of(written).dataset[:] == store_of(built).dataset[:]
    assert written.freeze_status().replaying
