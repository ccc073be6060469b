"""What a store would hold under a training's settings, and what it would be made from."""

import pytest
from support.helpers import manual, pixel_dataset, run, tiny_vit
from support.images import TO_PIXELS, crop_and_flip, picture_dataset, replayable
from support.packed_stores import stores_of, train_on_rows
from support.view_trainings import train
from torchvision.transforms import v2
from transformers import TrainerCallback

from hf_freezecache import ReplayableTransform


def test_deterministic_data_gets_no_views(tmp_path):
    _, store = train(pixel_dataset(), tmp_path, views=2)
    assert store.manifest.views == 0 and store.views.columns == {}


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


def test_setting_changes_the_fingerprint_only_when_it_is_on(tmp_path):
    made_from = [
        stores_of(train_on_rows(tmp_path / str(lossless), lossless))[2].manifest.made_from
        for lossless in (False, True)
    ]
    assert made_from[1].pop("lossless") == "zstd"
    assert made_from[0] == made_from[1] and "lossless" not in made_from[0]
