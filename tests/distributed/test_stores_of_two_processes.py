"""Stores that two processes write (gloo, CPU)."""

import pytest
from script_train import augmented
from support.helpers import losses, manual, pixel_dataset, run, tiny_resnet, tiny_vit
from support.images import OpaqueFlip, picture_dataset
from support.launching import launch, seen_by
from support.sized_images import SizedImages, train_sized
from support.sounds import PadSounds, Sounds, wav2vec2
from support.token_rows import Pad, Texts, bert, bert_of_questions

from hf_freezecache import FeatureStore


def epochs_of_builds(trainer):
    """[0] where a store was found and proved, and none was built."""
    return [phase.epochs for phase in trainer.freeze_cache_report().phases if phase.mode == "build"]


def test_store_written_by_two_processes_is_reused_by_one(tmp_path):
    launch(["--output", tmp_path, "--points", "0:3"])
    config = manual("0:3", cache="always", feature_cache_dir=str(tmp_path / "cache"))
    alone = run(tiny_vit(), pixel_dataset(50), tmp_path / "alone", config, per_device_train_batch_size=4)
    assert epochs_of_builds(alone) == [0]
    fresh = manual("0:3", cache="always", feature_cache_dir=str(tmp_path / "fresh"))
    built = run(tiny_vit(), pixel_dataset(50), tmp_path / "built", fresh, per_device_train_batch_size=4)
    assert losses(built) == losses(alone)  # the bytes do not depend on the number of processes

    # Other batches add products up in another order, and a codec is fitted on other samples: that is rounding.
    others = run(tiny_vit(), pixel_dataset(50), tmp_path / "others", config, per_device_train_batch_size=7)
    assert epochs_of_builds(others) == [0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [others.freeze_status().store_path.name]


OTHER_BATCHES = [
    ("fp32", tiny_resnet, lambda: pixel_dataset(50, 32), {}),
    pytest.param("int8", tiny_resnet, lambda: pixel_dataset(50, 32), {}, marks=pytest.mark.slow),
    pytest.param("int4", tiny_vit, lambda: augmented("crop"), {}, marks=pytest.mark.slow),
    pytest.param("fp32", bert, lambda: Texts(70), {"data_collator": Pad()}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("codec", "make", "samples", "settings"), OTHER_BATCHES)
def test_store_is_reused_with_another_batch_size_and_trains_alike(codec, make, samples, settings, tmp_path):
    """Where nothing random depends on the batch, its size is not in the fingerprint."""
    seen = {}
    for name, folder, size in [("before", "cache", 4), ("reused", "cache", 7), ("built", "fresh", 7)]:
        config = manual("0:3", codec=codec, feature_cache_dir=str(tmp_path / folder))
        seen[name] = run(
            make(),
            samples(),
            tmp_path / name,
            config,
            per_device_train_batch_size=size,
            remove_unused_columns=False,
            num_train_epochs=2,
            **settings,
        )
    assert epochs_of_builds(seen["reused"]) == [0] and epochs_of_builds(seen["built"]) == [1]
    names = {trainer.freeze_status().store_path.name for trainer in seen.values()}
    assert len(names) == 1
    assert losses(seen["reused"]) == pytest.approx(losses(seen["built"]), abs=1e-4 if codec == "fp32" else 5e-2)


def test_store_of_whole_random_draws_is_of_one_batch_size(tmp_path):
    """Those draws depend on the batch in which they were made."""
    made = []
    for size in (4, 7):
        config = manual("0:3", codec="fp32", views=1, feature_cache_dir=str(tmp_path / "cache"))
        dataset = picture_dataset(20).with_transform(OpaqueFlip())
        settings = dict(per_device_train_batch_size=size, remove_unused_columns=False, num_train_epochs=1)
        made.append(run(tiny_vit(), dataset, tmp_path / str(size), config, **settings))
    assert [epochs_of_builds(trainer) for trainer in made] == [[1], [1]]


@pytest.mark.parametrize("codec", ["int4", pytest.param("fp32", marks=pytest.mark.slow)])
def test_texts_of_two_processes_are_those_of_one(codec, tmp_path):
    """Ranges on either side of where their parts meet run together, sorted by length."""
    launch(["--output", tmp_path, "--points", "0:3", "--model", "bert", "--codec", codec])
    [path] = (tmp_path / "cache").iterdir()
    together = FeatureStore.open(path)
    config = manual("0:3", cache="always", codec=codec, feature_cache_dir=str(tmp_path / "alone"))
    settings = dict(per_device_train_batch_size=4, remove_unused_columns=False, data_collator=Pad())
    alone = FeatureStore.open(run(bert(), Texts(70), tmp_path / "run", config, **settings).freeze_status().store_path)
    assert len(together.manifest.shards) == 2 and alone.path.name == together.path.name
    assert together.dataset[:] == alone.dataset[:]


@pytest.mark.parametrize(
    ("name", "make", "samples", "collator"),
    [
        pytest.param("bert of questions", bert_of_questions, Texts(70, label="span"), Pad(), marks=pytest.mark.slow),
        pytest.param("wav2vec2", wav2vec2, Sounds(70), PadSounds(), marks=pytest.mark.slow),
    ],
)
def test_samples_of_several_widths_of_two_processes_are_those_of_one(name, make, samples, collator, tmp_path):
    """Both find the same widest sample, and trim to batches of widths of their own."""
    launch(["--output", tmp_path, "--points", "0:3", "--model", name, "--codec", "fp32", "--on_mismatch", "error"])
    first, second = seen_by(tmp_path)
    assert first["weights"] == second["weights"] and first["replaying"] and second["replaying"]
    [path] = (tmp_path / "cache").iterdir()
    together = FeatureStore.open(path)
    config = manual("0:3", cache="always", codec="fp32", feature_cache_dir=str(tmp_path / "alone"))
    settings = dict(per_device_train_batch_size=4, remove_unused_columns=False, data_collator=collator)
    alone = FeatureStore.open(run(make(), samples, tmp_path / "run", config, **settings).freeze_status().store_path)
    assert together.codec.layout.is_trimmed
    assert len(together.manifest.shards) == 2 and alone.path.name == together.path.name
    assert together.dataset[:] == alone.dataset[:]


@pytest.mark.slow
def test_images_of_several_sizes_of_two_processes_are_those_of_one(tmp_path):
    shared = ["--points", "0:3", "--model", "resnet of sizes", "--codec", "fp32", "--on_mismatch", "error"]
    launch(["--output", tmp_path, *shared])
    first, second = seen_by(tmp_path)
    assert first["weights"] == second["weights"] and first["replaying"] and second["replaying"]
    [path] = (tmp_path / "cache").iterdir()
    together = FeatureStore.open(path)
    config = manual("0:3", codec="fp32", feature_cache_dir=str(tmp_path / "alone"))
    trained = train_sized(tiny_resnet, SizedImages(70), tmp_path / "run", config)
    alone = FeatureStore.open(trained.freeze_status().store_path)
    assert len(together.manifest.shards) == 2 and alone.path.name == together.path.name
    assert together.dataset[:] == alone.dataset[:]


AUGMENTED = [("crop", "projective"), pytest.param("rarely erased", "dense", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "geometry"), AUGMENTED)
def test_views_of_two_processes_are_those_of_one(kind, geometry, tmp_path):
    """Erased: a single process meets the view that does not fit, and both begin again."""
    launch(["--output", tmp_path, "--points", "0:3", "--augmented", kind])
    first, second = seen_by(tmp_path)
    assert first["weights"] == second["weights"] and first["replaying"]
    [path] = (tmp_path / "cache").iterdir()
    together = FeatureStore.open(path)
    assert together.manifest.geometry == geometry and len(together.manifest.shards) == 2 and together.verify()

    config = manual("0:3", cache="always", feature_cache_dir=str(tmp_path / "alone"))
    settings = dict(per_device_train_batch_size=4, remove_unused_columns=False)
    alone = run(tiny_vit(), augmented(kind), tmp_path / "run", config, **settings)
    store = FeatureStore.open(alone.freeze_status().store_path)
    assert store.path.name == together.path.name
    assert store.manifest.sensitive_channels == together.manifest.sensitive_channels
    assert store.dataset[:] == together.dataset[:]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "geometry"), AUGMENTED)
def test_store_written_through_by_two_processes_is_that_of_a_build(kind, geometry, tmp_path):
    """Erased: a process meets the view that does not fit while it trains, if not before, and both build upfront."""
    launch(["--output", tmp_path, "--points", "0:3", "--augmented", kind, "--materialize", "write_through"])
    first, second = seen_by(tmp_path)
    assert first["weights"] == second["weights"] and first["replaying"]
    [path] = (tmp_path / "cache").iterdir()
    written = FeatureStore.open(path)
    assert written.manifest.geometry == geometry and len(written.manifest.shards) == 2 and written.verify()
    config = manual("0:3", cache="always", feature_cache_dir=str(tmp_path / "alone"))
    settings = dict(per_device_train_batch_size=4, remove_unused_columns=False)
    alone = run(tiny_vit(), augmented(kind), tmp_path / "run", config, **settings)
    assert written.dataset[:] == FeatureStore.open(alone.freeze_status().store_path).dataset[:]
