"""Two processes train together (gloo, CPU)."""

import pytest
import torch
from support.launching import launch, launch_by_command, seen_by

from hf_freezecache import FeatureStore


@pytest.mark.parametrize("model", [pytest.param("vit", marks=pytest.mark.slow), "resnet"])
def test_two_processes_agree_and_one_reads_their_store(model, tmp_path):
    log = launch_by_command(["--output", tmp_path, "--model", model, "--find_unused", "false"])
    first, second = seen_by(tmp_path)
    assert first["processes"] == 2
    assert (first["cut"], first["replaying"], first["modes"]) == (
        4,
        True,
        ["live", "build", "replay", "build", "replay"],
    )
    assert first["weights"] == second["weights"] and first["store"] == second["store"]
    assert "find_unused_parameters" not in log and "FutureWarning" not in log

    [path] = (tmp_path / "cache").iterdir()  # that of the first cut was removed
    store = FeatureStore.open(path)
    assert store.manifest.cut == 4 and store.verify()
    assert len(store.manifest.shards) == 2 and all(shard.rows for shard in store.manifest.shards)
    assert store.dataset["sample_id"][:] == list(range(50))
    assert torch.isfinite(store.read([0, 49, 25])).all()


@pytest.mark.parametrize("find_unused", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_freezing_after_the_wrap_neither_hangs_nor_fails(find_unused, tmp_path):
    arguments = ["--cache", "never", "--find_unused", find_unused, "--accumulate", "2"]
    launch(["--output", tmp_path, *arguments])
    first, second = seen_by(tmp_path)
    assert first["cut"] == 4 and first["weights"] == second["weights"]


def test_cached_is_freeze_only_in_two_processes(tmp_path):
    for name, arguments in {"frozen": ["--cache", "never"], "cached": ["--codec", "fp32"]}.items():
        (tmp_path / name).mkdir()
        launch(["--output", tmp_path / name, "--model", "resnet", *arguments])
    frozen, cached = seen_by(tmp_path / "frozen")[0], seen_by(tmp_path / "cached")[0]
    assert cached["losses"] == frozen["losses"]
    assert cached["weights"] == frozen["weights"]


def test_two_processes_try_freezing_together(tmp_path):
    """With a head start of the trial alone; the held-out samples of both count."""
    launch(["--output", tmp_path, "--tries_freezing", "--cache", "never"])
    first, second = seen_by(tmp_path)
    assert first["modes"][0] == "trial" and "on 8 held-out training samples" in first["why"]
    assert first["why"] == second["why"] and first["cut"] == second["cut"] > 0
    assert first["weights_by_epoch"] == second["weights_by_epoch"]


@pytest.mark.slow
def test_two_processes_train_one_head_before_the_first_step(tmp_path):
    launch(["--output", tmp_path, "--head_start_epochs", "2", "--points", "1:2", "--cache", "never"])
    first, second = seen_by(tmp_path)
    assert first["modes"][0] == second["modes"][0] == "head_start"
    assert first["weights"] == second["weights"]


def test_two_processes_train_the_head_on_the_store_of_both(tmp_path):
    for name, arguments in {"samples": ["--cache", "never"], "store": ["--codec", "fp32"]}.items():
        (tmp_path / name).mkdir()
        launch(["--output", tmp_path / name, "--head_start_epochs", "2", "--points", "0:2", *arguments])
    samples, store = seen_by(tmp_path / "samples")[0], seen_by(tmp_path / "store")[0]
    assert samples["modes"][:1] == ["head_start"] and store["modes"][:2] == ["build", "head_start"]
    assert store["losses"] == samples["losses"] and store["weights"] == samples["weights"]


@pytest.mark.slow
def test_two_processes_start_heads_on_as_many_batches_of_several_sizes(tmp_path):
    """Each sorts its own images by size, so that they come to different numbers of batches."""
    arguments = ["--model", "resnet of sizes", "--points", "0:2", "--codec", "fp32", "--head_start_epochs", "1"]
    launch(["--output", tmp_path, *arguments])
    first, second = seen_by(tmp_path)
    assert first["modes"][:2] == ["build", "head_start"] and first["weights"] == second["weights"]


@pytest.mark.parametrize(
    "arguments", [pytest.param(["--layer_decay", "0.5"], marks=pytest.mark.slow), ["--main_decides"]]
)
def test_learning_rates_of_blocks_are_the_same_in_two_processes(arguments, tmp_path):
    """Also where the processes would decide differently: the main one's decision falls in both."""
    launch(["--output", tmp_path, "--anneal", "cosine", "--points", "2:2", "--cache", "never", *arguments])
    first, second = seen_by(tmp_path)
    assert first["cut"] == second["cut"] == 2
    assert len(first["weights_by_epoch"]) == 4 and first["weights_by_epoch"] == second["weights_by_epoch"]


@pytest.mark.parametrize("model", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("signal", ["gradients", "similarities"])
def test_two_processes_freeze_what_the_main_one_has_observed(model, signal, tmp_path):
    """Only that one reads samples; BatchNorm statistics differ between the two until a block freezes."""
    launch(["--output", tmp_path, "--observes", signal, "--model", model, "--codec", "fp32"])
    first, second = seen_by(tmp_path)
    assert first["cut"] == second["cut"] > 0 and first["weights_by_epoch"] == second["weights_by_epoch"]
    assert first["replaying"] and first["store"] == second["store"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_padding_that_counts_in_one_process_is_kept_in_both(rank, tmp_path):
    """Else one of them would store rows without padding, or wait for the other, which stores none."""
    shared = ["--model", "bert", "--points", "1:3", "--left_at_first", rank]
    for name, arguments in {"frozen": ["--cache", "never"], "cached": ["--codec", "fp32"]}.items():
        (tmp_path / name).mkdir()
        launch(["--output", tmp_path / name, *shared, *arguments], timeout=120)
    frozen, cached = seen_by(tmp_path / "frozen"), seen_by(tmp_path / "cached")
    for one, other in zip(cached, frozen, strict=True):
        assert one["replaying"] and one["padding"][0] == []
        assert one["losses"] == other["losses"] and one["weights"] == other["weights"]
    why = [one["padding"][1] for one in cached]
    assert "texts are padded on the left" in why[rank] and why[0] == why[1]
    assert cached[0]["store"] == cached[1]["store"]


@pytest.mark.slow
def test_a_step_that_one_process_runs_again_on_images_waits_for_nobody(tmp_path):
    """BatchNorm statistics are sent around before a forward pass, and the other process makes only one."""
    for name, arguments in {"frozen": ["--cache", "never"], "cached": ["--codec", "fp32"]}.items():
        (tmp_path / name).mkdir()
        shared = ["--model", "resnet", "--points", "1:2", "--mirror_in_step", "10"]
        launch(["--output", tmp_path / name, *shared, *arguments], timeout=120)
    (first, second), frozen = seen_by(tmp_path / "cached"), seen_by(tmp_path / "frozen")[0]
    assert first["weights"] == second["weights"] == frozen["weights"]
    assert first["losses"] == frozen["losses"]
    assert not first["replaying"]


def test_two_processes_evaluate_from_one_store(tmp_path):
    launch(["--output", tmp_path, "--points", "0:3", "--cache_eval"])
    first, second = seen_by(tmp_path)
    logged = [entry["eval_loss"] for entry in first["evaluations"] if "eval_loss" in entry]
    [again] = [entry["eval_cached_loss"] for entry in first["evaluations"] if "eval_cached_loss" in entry]
    assert len(logged) == 4 and again != logged[-1] and again == pytest.approx(logged[-1], rel=2e-3)
    assert first["weights"] == second["weights"]

    stores = [FeatureStore.open(path) for path in sorted((tmp_path / "cache").iterdir())]
    [store] = [store for store in stores if store.manifest.codec == "fp16"]
    assert len(store) == 30 and len(store.manifest.shards) == 2 and store.verify()
