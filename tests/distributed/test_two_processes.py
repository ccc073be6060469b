"""Launches real process groups (gloo, CPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script_train import augmented
from support.helpers import losses, manual, pixel_dataset, run, tiny_vit

from hf_freezecache import FeatureStore

SCRIPT = Path(__file__).parent / "script_train.py"
ROOT = Path(__file__).parents[2]


def launch(script, arguments, processes=2, timeout=240):
    # `--multi_gpu` is what starts several processes, on a machine without accelerators too (gloo then).
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", str(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-20000:]
    return done.stdout + done.stderr


def seen_by(output: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(output.glob("rank-*.json"))]


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_two_processes_agree_and_one_reads_their_store(model, tmp_path):
    log = launch(SCRIPT, ["--output", tmp_path, "--model", model, "--find_unused", "false"])
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


def test_store_written_by_two_processes_is_reused_by_one(tmp_path):
    launch(SCRIPT, ["--output", tmp_path, "--points", "0:3"])
    config = manual("0:3", cache="always", feature_cache_dir=str(tmp_path / "cache"))
    alone = run(tiny_vit(), pixel_dataset(50), tmp_path / "alone", config, per_device_train_batch_size=4)
    assert [phase.epochs for phase in alone.freeze_cache_report().phases if phase.mode == "build"] == [0]
    fresh = manual("0:3", cache="always", feature_cache_dir=str(tmp_path / "fresh"))
    built = run(tiny_vit(), pixel_dataset(50), tmp_path / "built", fresh, per_device_train_batch_size=4)
    assert losses(built) == losses(alone)  # the bytes do not depend on the number of processes


@pytest.mark.parametrize(("kind", "geometry"), [("crop", "projective"), ("rarely erased", "dense")])
def test_views_of_two_processes_are_those_of_one(kind, geometry, tmp_path):
    """Erased: a single process meets the view that does not fit, and both begin again."""
    launch(SCRIPT, ["--output", tmp_path, "--points", "0:3", "--augmented", kind])
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


@pytest.mark.parametrize(("kind", "geometry"), [("crop", "projective"), ("rarely erased", "dense")])
def test_store_written_through_by_two_processes_is_that_of_a_build(kind, geometry, tmp_path):
    """Erased: a process meets the view that does not fit while it trains, if not before, and both build upfront."""
    launch(SCRIPT, ["--output", tmp_path, "--points", "0:3", "--augmented", kind, "--materialize", "write_through"])
    first, second = seen_by(tmp_path)
    assert first["weights"] == second["weights"] and first["replaying"]
    [path] = (tmp_path / "cache").iterdir()
    written = FeatureStore.open(path)
    assert written.manifest.geometry == geometry and len(written.manifest.shards) == 2 and written.verify()
    config = manual("0:3", cache="always", feature_cache_dir=str(tmp_path / "alone"))
    settings = dict(per_device_train_batch_size=4, remove_unused_columns=False)
    alone = run(tiny_vit(), augmented(kind), tmp_path / "run", config, **settings)
    assert written.dataset[:] == FeatureStore.open(alone.freeze_status().store_path).dataset[:]


@pytest.mark.parametrize("find_unused", ["true", "false"])
def test_freezing_after_the_wrap_neither_hangs_nor_fails(find_unused, tmp_path):
    arguments = ["--cache", "never", "--find_unused", find_unused, "--accumulate", "2"]
    launch(SCRIPT, ["--output", tmp_path, *arguments])
    first, second = seen_by(tmp_path)
    assert first["cut"] == 4 and first["weights"] == second["weights"]


def test_cached_is_freeze_only_in_two_processes(tmp_path):
    for name, arguments in {"frozen": ["--cache", "never"], "cached": ["--codec", "fp32"]}.items():
        (tmp_path / name).mkdir()
        launch(SCRIPT, ["--output", tmp_path / name, "--model", "resnet", *arguments])
    frozen, cached = seen_by(tmp_path / "frozen")[0], seen_by(tmp_path / "cached")[0]
    assert cached["losses"] == frozen["losses"]
    assert cached["weights"] == frozen["weights"]


def test_two_processes_evaluate_from_one_store(tmp_path):
    launch(SCRIPT, ["--output", tmp_path, "--points", "0:3", "--cache_eval"])
    first, second = seen_by(tmp_path)
    logged = [entry["eval_loss"] for entry in first["evaluations"] if "eval_loss" in entry]
    [again] = [entry["eval_cached_loss"] for entry in first["evaluations"] if "eval_cached_loss" in entry]
    assert len(logged) == 4 and again != logged[-1] and again == pytest.approx(logged[-1], rel=2e-3)
    assert first["weights"] == second["weights"]

    stores = [FeatureStore.open(path) for path in sorted((tmp_path / "cache").iterdir())]
    [store] = [store for store in stores if store.manifest.codec == "fp16"]
    assert len(store) == 30 and len(store.manifest.shards) == 2 and store.verify()
