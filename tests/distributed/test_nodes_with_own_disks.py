"""Processes on several "machines", each with a folder of its own for stores (gloo, CPU)."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.launching import launch, seen_by
from support.processes import ROOT

from hf_freezecache import FeatureStore

SCRIPT = Path(__file__).with_name("script_nodes.py")


def train(output, *arguments, processes=2, nodes=2):
    """What every process has seen, and what all have logged."""
    log = launch(["--output", output, *arguments], processes, script=SCRIPT, nodes=nodes)
    return seen_by(output), log


def check_epochs(seen, epochs, nodes, rows=50):
    """Every replay epoch reads every row once, but for what fills up batches; labels are right."""
    for epoch in map(str, epochs):
        owners: dict[int, set] = {}
        assert len({each["batches"][epoch] for each in seen}) == 1
        total = 0
        for rank, each in enumerate(seen):
            total += len(each["rows"][epoch])
            for number, label in each["rows"][epoch]:
                assert label == each["labels"][number]
                owners.setdefault(number, set()).add(rank * nodes // len(seen))
        assert set(owners) == set(range(rows)) and all(len(node) == 1 for node in owners.values())
        live = [each["batches"][epoch] * 4 for each in seen]
        assert total == sum(live)  # nothing but what live epochs fill up as well


@pytest.mark.parametrize(("processes", "nodes"), [pytest.param(4, 2, marks=pytest.mark.slow), (2, 2)])
def test_each_node_stores_and_replays_its_own_share(processes, nodes, tmp_path):
    seen, log = train(tmp_path, "--points", "0:2,2:4", "--epochs", "3", processes=processes, nodes=nodes)
    assert [each["modes"] for each in seen] == [["build", "replay", "build", "replay"]] * processes
    assert len({each["weights"] for each in seen}) == 1
    check_epochs(seen, range(3), nodes)
    shares = {tuple(each["share"]) for each in seen}
    assert len(shares) == nodes and sorted(row for share in shares for row in share) == list(range(50))
    dealt = [{number for number, _ in seen[0]["rows"][epoch]} for epoch in "012"]
    assert dealt[0] == dealt[1] != dealt[2] or processes > nodes  # the next build deals anew
    for node in range(nodes):
        [path] = (tmp_path / f"cache-{node}").iterdir()  # that of the first cut was deleted
        store = FeatureStore.open(path)
        assert store.verify() and store.manifest.made_from["share"]["node"] == node
        assert len(store.manifest.shards) == processes // nodes
    assert "those of the first of 2 nodes" in log


@pytest.mark.slow
def test_nodes_of_accelerate_launch_are_told_apart(tmp_path):
    """Two launchers, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(machine: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
        command += ["--num_processes", "4", "--machine_rank", str(machine), "--main_process_ip", "127.0.0.1"]
        command += ["--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--num_cpu_threads_per_process", "1", "--rdzv_backend", "static", str(SCRIPT)]
        command += ["--output", str(tmp_path), "--points", "0:2", "--epochs", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(start, range(2)):
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-10000:]
    seen = seen_by(tmp_path)
    assert len(seen) == 4 and len({each["weights"] for each in seen}) == 1
    check_epochs(seen, range(2), nodes=2)
    assert seen[0]["share"] == seen[1]["share"] != seen[2]["share"] == seen[3]["share"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [3, 6, 14])
def test_resumed_training_of_nodes_equals_the_uninterrupted_one(checkpoint, tmp_path):
    """7 steps an epoch, frozen from epoch 1 on: before the freeze, in the first epoch, and after a whole one."""
    arguments = ["--points", "1:3", "--epochs", "3", "--codec", "fp32"]
    whole, _ = train(tmp_path, *arguments, "--save_steps", checkpoint)
    again, log = train(tmp_path, *arguments, "--resume", f"checkpoint-{checkpoint}")
    assert [each["weights"] for each in again] == [each["weights"] for each in whole]
    assert again[0]["losses"] == whole[0]["losses"] and all(each["replaying"] for each in again)
    assert "Reusing the feature store" in log and "other nodes" not in log
    assert {each["owner"] for each in again + whole} == {whole[0]["owner"]}


@pytest.mark.slow
def test_node_that_has_lost_its_disk_builds_its_share_again(tmp_path):
    arguments = ["--points", "1:3", "--epochs", "3", "--codec", "fp32"]
    whole, _ = train(tmp_path, *arguments, "--save_steps", "10")
    again, log = train(tmp_path, *arguments, "--resume", "checkpoint-10", "--lost", "1")
    assert [each["weights"] for each in again] == [each["weights"] for each in whole]
    assert all(len(list((tmp_path / f"cache-{node}").iterdir())) == 1 for node in range(2))


@pytest.mark.slow
def test_resume_on_other_nodes_says_so_and_trains(tmp_path):
    train(tmp_path, "--points", "0:2", "--epochs", "2", "--save_steps", "7")
    again, log = train(tmp_path, "--points", "0:2", "--epochs", "2", "--resume", "checkpoint-7", processes=3, nodes=3)
    assert "has dealt its rows to other nodes" in log and all(each["replaying"] for each in again)
    shares = {tuple(each["share"]) for each in again}
    assert sorted(row for share in shares for row in share) == list(range(50))


@pytest.mark.slow
def test_node_that_cannot_store_leaves_all_on_samples(tmp_path):
    """The folder of one is a file: explicit settings make that an error of all."""
    seen, _ = train(tmp_path, "--points", "0:2", "--epochs", "2", "--unwritable", "1")
    assert all("error" in each and "not writable" in each["error"] for each in seen)


@pytest.mark.slow
def test_build_that_fails_on_one_node_leaves_all_on_samples(tmp_path):
    seen, log = train(tmp_path, "--points", "0:2", "--epochs", "2", "--fails_in_build", "1")
    assert "process 1: the disk is full" in log and len({each["weights"] for each in seen}) == 1
    assert all(each["cut"] == 2 and not each["replaying"] and each["rows"] == {} for each in seen)
    assert not any(list((tmp_path / f"cache-{node}").iterdir()) for node in range(2))  # the other one's was deleted


@pytest.mark.slow
def test_loader_processes_read_the_share_of_their_node(tmp_path):
    arguments = ["--points", "0:2,1:3", "--epochs", "3", "--codec", "fp32"]
    for name, workers in (("here", "0"), ("there", "2")):
        (tmp_path / name).mkdir()
        seen, _ = train(tmp_path / name, *arguments, "--workers", workers)
        check_epochs(seen, range(3), nodes=2)
    assert seen_by(tmp_path / "here")[1]["losses"] == seen[1]["losses"]


@pytest.mark.slow
def test_nodes_that_share_a_folder_keep_their_shares_apart_in_it(tmp_path):
    seen, _ = train(tmp_path, "--points", "0:2,1:3", "--epochs", "3", "--one_folder")
    check_epochs(seen, range(3), nodes=2)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.slow
def test_processes_of_a_node_that_see_other_folders_are_found_at_the_start(tmp_path):
    seen, _ = train(tmp_path, "--folder_of_each", processes=4)
    assert all("FREEZECACHE_NODE" in each["error"] and "process 1 on" in each["error"] for each in seen)


@pytest.mark.slow
def test_store_that_one_node_loses_is_built_again_there_alone(tmp_path):
    seen, log = train(tmp_path, "--points", "0:2", "--epochs", "3", "--loses_in_step", "1")
    assert all(each["replaying"] for each in seen) and len({each["weights"] for each in seen}) == 1
    check_epochs(seen, [1, 2], nodes=2)
    assert "was lost while it was in use" in log


@pytest.mark.slow
def test_views_of_shares_are_replayed(tmp_path):
    seen, _ = train(tmp_path, "--points", "0:2", "--epochs", "3", "--augmented")
    assert all(each["replaying"] for each in seen) and len({each["weights"] for each in seen}) == 1
    first, second = (FeatureStore.open(next((tmp_path / f"cache-{node}").iterdir())) for node in range(2))
    assert first.manifest.views == second.manifest.views == 1
    assert first.manifest.sensitive_channels == second.manifest.sensitive_channels


@pytest.mark.slow
def test_split_batches_are_read_by_the_nodes_that_store_them(tmp_path):
    seen, _ = train(tmp_path, "--points", "0:2", "--epochs", "2", "--split")
    owners = {}
    for rank, each in enumerate(seen):
        for number, _ in each["rows"]["1"]:
            owners.setdefault(number, set()).add(rank)
    assert set(owners) == set(range(50)) and all(len(node) == 1 for node in owners.values())


@pytest.mark.slow
def test_head_start_of_nodes_takes_the_features_that_each_stores(tmp_path):
    """Of 51 rows the first node stores 27, the second one 24, and both of its processes get 12."""
    arguments = ["--points", "0:2", "--epochs", "2", "--rows", "51", "--codec", "fp32", "--head_start_epochs", "1"]
    seen, log = train(tmp_path, *arguments, processes=4, nodes=2)
    assert all(each["modes"] == ["build", "head_start", "replay"] for each in seen)
    assert len({each["weights"] for each in seen}) == 1 and "from the feature store" in log
    learned = [set(each["learned"]) for each in seen]
    assert all(rows <= set(each["share"]) for rows, each in zip(learned, seen, strict=True))
    assert [len(rows) for rows in learned] == [12] * 4 and len(set.union(*learned)) == 48


@pytest.mark.slow
def test_head_start_of_nodes_takes_samples_if_one_has_lost_its_store(tmp_path):
    arguments = ["--points", "0:2", "--epochs", "2", "--head_start_epochs", "1", "--loses_before_head_start"]
    seen, log = train(tmp_path, *arguments)
    assert "The head start takes samples" in log and len({each["weights"] for each in seen}) == 1
    assert all(not each["learned"] and "head_start" in each["modes"] for each in seen)


@pytest.mark.slow
def test_budget_of_the_fullest_disk_chooses_one_codec_for_all(tmp_path):
    arguments = ["--points", "0:2", "--epochs", "2", "--rows", "200", "--codec", "fp32", "--cache_budget", "150KB"]
    seen, log = train(tmp_path, *arguments)
    stores = [FeatureStore.open(next((tmp_path / f"cache-{node}").iterdir())) for node in range(2)]
    assert stores[0].manifest.codec == stores[1].manifest.codec != "fp32" and all(each["replaying"] for each in seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampling", "sequential"], "SequentialSampler draws them otherwise"),
        (["--sampling", "group_by_length"], "LengthGroupedSampler draws them otherwise"),
        (["--dispatch"], "dispatch_batches"),
    ],
)
def test_order_that_nodes_cannot_keep_is_refused_by_all(arguments, message, tmp_path):
    seen, _ = train(tmp_path, *arguments)
    assert all(message in each["error"] for each in seen)


@pytest.mark.parametrize("scope", ["explicit", pytest.param("by default", marks=pytest.mark.slow)])
def test_folder_that_processes_do_not_share_is_found_at_the_start(scope, tmp_path):
    if scope == "explicit":
        seen, _ = train(tmp_path, "--cache_scope", "shared", "--epochs", "2")
        assert all("cache_scope='node'" in each["error"] and "process 1 on" in each["error"] for each in seen)
        assert not any((tmp_path / f"cache-{node}").exists() for node in range(2))
        return
    seen, log = train(tmp_path, "--by_default", "--epochs", "4")
    assert log.count("is not the same for all processes") == 1 and all(each["cut"] > 0 for each in seen)
    assert not any("build" in each["modes"] or "replay" in each["modes"] for each in seen)
