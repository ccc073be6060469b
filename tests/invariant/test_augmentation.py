"""Replayed augmentation: equal to the true views where it claims to be, and the same however a training is run."""

import numpy as np
import pytest
import torch
from support.helpers import assert_same_weights, losses, manual, run, tiny_resnet, tiny_vit, weights
from support.images import OpaqueFlip, picture_dataset, replayable
from support.sessions import chain_of, rows_of
from test_equal_trajectories import SaveAt
from torchvision.transforms import v2

from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.replay.dataset import choose_views
from hf_freezecache.replay.decode import replay_features

MODELS = {"vit": (tiny_vit, 16), "resnet": (tiny_resnet, 32)}
# Freeze points at steps 4 and 12 of 20.
SETTINGS = dict(num_train_epochs=5, remove_unused_columns=False)
POINTS = "1:2,3:4"
KEPT = {
    "channels": dict(views=1),
    "two views": dict(views=2, sensitive_fraction=0.5),
    "none": dict(views=1, sensitive_fraction=0.0),
    "whole": dict(views=1, sensitive_fraction=1.0),
    "base": dict(views=0),
}


@pytest.fixture(params=MODELS)
def model_and_data(request):
    make_model, size = MODELS[request.param]
    pipeline = v2.Compose(
        [
            v2.RandomCrop(size, padding=size // 8),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    return make_model, picture_dataset(32, size).with_transform(replayable(pipeline))


@pytest.mark.parametrize("kept", ["whole", "channels", "two views", "none"])
def test_replayed_view_is_prefix_of_the_view(model_and_data, kept, tmp_path):
    """Whole views are exact; else the sensitive channels and the special tokens are."""
    make_model, dataset = model_and_data
    config = manual("0:2", codec="fp32", cache="always", **KEPT[kept])
    trainer = run(make_model(), dataset, tmp_path, config, num_train_epochs=1, remove_unused_columns=False)
    store = FeatureStore.open(trainer.freeze_status().store_path)
    chain, source = chain_of(trainer), rows_of(trainer)
    for view in range(store.manifest.views + 1):
        for batch in range(source.num_ranges):
            rows = source.rows(batch)
            codes = store.read_rows(rows, np.full(len(rows), view))
            replayed = replay_features(store, {name: codes[name] for name in store.code_names(codes)})
            true = chain.prefix({"pixel_values": source.collate(rows, view)["pixel_values"]}, 2)
            if view == 0 or kept == "whole":
                assert torch.equal(replayed, true)
                continue
            special, channels = store.codec.layout.special_tokens, torch.tensor(store.manifest.sensitive_channels)
            assert torch.equal(replayed[:, :special], true[:, :special]) or not special
            own = [
                part.movedim(store.codec.layout.channel_dim + 1, 1)[:, channels.long()] for part in (replayed, true)
            ]
            assert torch.equal(own[0][..., special:], own[1][..., special:])
            assert not torch.equal(replayed, true)


@pytest.mark.parametrize(
    ("kept", "step"),
    [
        *(("two views", step) for step in (2, 4, 6, 12, 14)),
        *((kept, step) for kept in KEPT if kept != "two views" for step in (4, 14)),
    ],
)
def test_resumed_with_random_transform_is_uninterrupted(kept, step, tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    config = manual(POINTS, cache="always", **KEPT[kept])
    whole = run(tiny_vit(), dataset, tmp_path / "run", config, callbacks=[SaveAt([step])], **SETTINGS)
    resumed = run(tiny_vit(seed=7), dataset, tmp_path / "run", config, resume=True, **SETTINGS)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.parametrize("settings", [dict(views=2), dict(mixup_alpha=0.4, cutmix_alpha=1.0, feature_noise=0.05)])
def test_resumed_with_mixing_and_opaque_draws_is_uninterrupted_in_replay(settings, tmp_path):
    dataset = picture_dataset().with_transform(OpaqueFlip())
    config = manual("1:2", cache="always", **settings)
    whole = run(tiny_vit(), dataset, tmp_path / "run", config, callbacks=[SaveAt([10])], **SETTINGS)
    resumed = run(tiny_vit(seed=7), dataset, tmp_path / "run", config, resume=True, **SETTINGS)
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed), weights(whole))


@pytest.mark.slow
def test_number_of_workers_changes_nothing(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    config = manual(POINTS, views=2, cache="always")

    def without_dropout():
        # Loaders draw a seed for their workers, so that dropout draws other numbers behind them.
        model = tiny_vit()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    alone = run(without_dropout(), dataset, tmp_path / "0", config, **SETTINGS)
    for name, persistent in (("fresh", False), ("persistent", True)):
        workers = dict(dataloader_num_workers=2, dataloader_persistent_workers=persistent)
        loaded = run(without_dropout(), dataset, tmp_path / name, config, **SETTINGS, **workers)
        assert losses(loaded) == losses(alone)
        assert_same_weights(weights(loaded), weights(alone))


def test_whole_replayed_views_train_as_the_same_views_drawn_live(tmp_path):
    """The suffix cannot tell a replayed view from the same view run through the frozen prefix."""
    replay = replayable()
    dataset = picture_dataset().with_transform(replay)
    config = manual("0:2", cache="always", codec="fp32", views=2, sensitive_fraction=1.0)
    cached = run(tiny_vit(), dataset, tmp_path / "cached", config, num_train_epochs=3, remove_unused_columns=False)

    class SameViews(torch.utils.data.Dataset):
        """What the store replays, as pixels."""

        epoch, seed = 0, rows_of(cached).seed

        def __len__(self):
            return len(dataset)

        def __getitem__(self, row):
            batch = rows_of(cached).collate([row], int(choose_views(self.seed, self.epoch, [row], 2)[0]))
            return {name: value[0] for name, value in batch.items()}

    views = SameViews()

    class Epochs(SaveAt):
        def on_epoch_begin(self, args, state, control, **kwargs):
            views.epoch = round(state.epoch)

    live = run(
        tiny_vit(),
        views,
        tmp_path / "live",
        manual("0:2", cache="never"),
        num_train_epochs=3,
        callbacks=[Epochs([])],
    )
    assert losses(live) == losses(cached)
    assert_same_weights(weights(live), weights(cached))
