"""`Trainer`'s own ways to the Hub: models or heads, and never a feature store."""

import json

import pytest
import torch
from support.heads import load_base, logits, make_base
from support.helpers import assert_same_weights, make_args, messages, pixel_dataset, weights
from support.hub_server import OWNER, WRITER, Fault
from transformers import ViTForImageClassification

from hf_freezecache import FreezeCacheTrainer, PushError, load_head
from hf_freezecache.hub.left_out import store_patterns

NAME = f"{OWNER}/run"
HEAD = ["README.md", "head.safetensors", "head_config.json"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("vit", tmp_path_factory.mktemp("bases") / "vit")


def make(base, folder, settings=None, **arguments):
    freeze = {"freeze_points": "1:2", "cache": "always", "policy": "manual", **(settings or {})}
    given = {"num_train_epochs": 3, "push_to_hub": True, "save_strategy": "epoch", **arguments}
    return FreezeCacheTrainer(
        model=load_base(base),
        args=make_args(folder, hub_model_id=NAME, **given),
        train_dataset=pixel_dataset(16),
        freeze_cache=freeze,
    )


def wait(trainer):
    trainer._finish_current_push()


def is_of_store(path):
    return path.endswith(".arrow") or "manifest.json" in path or "dataset_info" in path or ".owner" in path


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
@pytest.mark.parametrize("place", ["", "features", "checkpoint-4/deep/features", "[odd] *names?", ".", ".."])
def test_feature_store_is_never_uploaded(strategy, place, base, hub, tmp_path):
    """Wherever it lies, in and around the output folder."""
    folder = tmp_path / "out/run"
    settings = {} if not place else {"feature_cache_dir": str(folder / place)}
    trainer = make(base, folder, settings, hub_strategy=strategy, hub_always_push=True)
    trainer.train()
    assert trainer.freeze_status().store_bytes > 0
    wait(trainer)
    trainer.push_to_hub()
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("kept")
    trainer.save_model()
    store = trainer.freeze_status().store_path.name
    files = hub.uploaded()
    assert {"model.safetensors", "config.json", "README.md", "mine/notes.txt"} <= files
    assert not [path for path in files if is_of_store(path) or store in path]
    assert any("optimizer.pt" in path for path in files) == (strategy in ("checkpoint", "all_checkpoints"))
    loaded = ViTForImageClassification.from_pretrained(NAME)
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_stores_of_other_trainings_and_of_killed_builds_are_left_out(base, hub, tmp_path):
    store = "0123456789abcdef" * 2
    names = [store, f"{store}.partial", f"{store}.tmp-host-1-aa", f"{store}.partial.tmp-host-1-aa"]
    names += [f"{store}.removed.tmp-aa", f"old/{store}", f"old/deep/{store}.partial.removed.tmp-aa"]
    for name in names:
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "data-00000-of-00001.arrow").write_bytes(b"x")
    trainer = make(base, tmp_path / "run", push_to_hub=False)
    trainer.push_to_hub()
    assert "model.safetensors" in hub.uploaded()
    assert not [path for path in hub.uploaded() if is_of_store(path)]


def test_patterns_know_every_name_of_a_store(tmp_path):
    """What `cache.names` calls a store's directory is what is left out."""
    from fnmatch import fnmatch
    from pathlib import Path

    from hf_freezecache.cache import names

    final = tmp_path / ("ab" * 16)
    partial = names.partial_path(final)
    paths = [final, partial, *(names.aside_path(path, "a-host.b", 12) for path in (final, partial))]
    paths += [names.removed_path(path) for path in (final, partial)]
    for path in paths:
        for inside in (Path(path.name), Path("deep") / path.name):
            file = (inside / "data.arrow").as_posix()
            assert any(fnmatch(file, pattern) for pattern in store_patterns(tmp_path, tmp_path.parent)), file
    assert not any(fnmatch("model/weights.bin", pattern) for pattern in store_patterns(tmp_path, tmp_path.parent))


def test_token_of_the_arguments_is_not_uploaded(base, hub, tmp_path, caplog):
    """`Trainer` writes all its arguments to training_args.bin."""
    trainer = make(base, tmp_path / "run", hub_token=WRITER, hub_strategy="all_checkpoints", hub_always_push=True)
    trainer.train()
    wait(trainer)
    trainer.push_to_hub()
    files = hub.repos[NAME].branches["main"]
    assert "model.safetensors" in files and any("optimizer.pt" in path for path in files)
    assert not [path for path, content in files.items() if WRITER.encode() in content]
    assert "training_args.bin is not pushed: it contains hub_token" in messages(caplog)


# Heads


def test_head_alone_is_pushed_and_is_the_trained_model(base, hub, tmp_path):
    trainer = make(base, tmp_path / "run", {"push_head_only": True, "freeze_points": "0:2"})
    trainer.train()
    trainer.push_to_hub()
    assert hub.paths(NAME) == HEAD and hub.uploaded() == {*HEAD}
    assert {message for _, message, _ in hub.repos[NAME].commits} >= {
        "Training in progress, step 2",
        "End of training",
    }
    assert torch.equal(logits(load_head(NAME, base=base)), logits(trainer.model))
    assert (tmp_path / "run/_head/head.safetensors").is_file()


def test_heads_are_pushed_from_the_freeze_on_and_change_no_training(base, hub, tmp_path, caplog):
    trainer = make(base, tmp_path / "run", {"push_head_only": True, "codec": "fp32"}, hub_always_push=True)
    trainer.train()
    wait(trainer)
    messages = [message for _, message, _ in hub.repos[NAME].commits]
    assert messages == ["Training in progress, step 4", "Training in progress, step 6"]
    plain = make(base, tmp_path / "plain", {"codec": "fp32"}, push_to_hub=False)
    plain.train()
    assert_same_weights(weights(trainer), weights(plain))
    included = [part["name"] for part in json.loads(hub.repos[NAME].branches["main"]["head_config.json"])["parts"]]
    assert included == ["vit.embeddings", "vit.layers.0"]


def test_strategy_end_pushes_a_head_when_the_model_is_saved(base, hub, tmp_path):
    trainer = make(base, tmp_path / "run", {"push_head_only": True, "freeze_points": "0:2"}, hub_strategy="end")
    trainer.train()
    assert not hub.repos[NAME].commits
    trainer.save_model()
    assert [message for _, message, _ in hub.repos[NAME].commits] == ["Model save"]


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_heads_and_checkpoints_do_not_go_together(strategy, base, hub, tmp_path):
    with pytest.raises(ValueError, match=f"hub_strategy='{strategy}' whole checkpoints: set hub_strategy='every"):
        make(base, tmp_path / "run", {"push_head_only": True}, hub_strategy=strategy)
    make(base, tmp_path / "run", {"push_head_only": True}, hub_strategy=strategy, push_to_hub=False)


def test_training_survives_a_hub_that_is_gone(base, hub, tmp_path, no_waits, caplog):
    trainer = make(base, tmp_path / "run", {"push_head_only": True, "freeze_points": "0:2"}, hub_always_push=True)
    hub.faults = [Fault("/commit/", 403)]
    trainer.train()
    wait(trainer)
    assert trainer.state.global_step == 6
    assert "The push of a head in the course of the training has failed, the training goes on" in messages(caplog)
    with pytest.raises(PushError, match=r"\(403\).* It is kept in .*/run/_head"):
        trainer.push_to_hub()
    hub.faults = []
    trainer.push_to_hub(commit_message="Now", token=None, private=True)
    assert hub.repos[NAME].commits[-1][1] == "Now"


def test_push_in_the_background_is_a_future(base, hub, tmp_path):
    trainer = make(base, tmp_path / "run", {"push_head_only": True, "freeze_points": "0:2"}, save_strategy="no")
    trainer.train()
    job = trainer.push_to_hub(blocking=False)
    assert job.result(timeout=60).oid == hub.repos[NAME].sha("main")
    assert hub.paths(NAME) == HEAD


def test_repository_is_made_when_it_is_pushed_to_first(base, hub, tmp_path):
    trainer = make(
        base, tmp_path / "run", {"push_head_only": True, "freeze_points": "0:2"}, push_to_hub=False, save_strategy="no"
    )
    trainer.train()
    assert not hub.repos
    trainer.push_to_hub()
    assert hub.paths(NAME) == HEAD
