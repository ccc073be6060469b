"""One of two processes meets a problem in the middle of a replay epoch: the frozen training without a cache is right.

50 samples in two processes of 4 make 7 steps an epoch; replay begins with step 7.
"""

import pytest
from support.launching import launch, seen_by


def train(output, *arguments):
    """What both processes have seen, and what they have logged."""
    output.mkdir()
    log = launch(["--output", output, "--points", "1:3", "--codec", "fp32", *arguments], timeout=120)
    return seen_by(output), log


# BatchNorm: a step that runs again on one process must not wait for buffers of the others.
@pytest.mark.parametrize(
    ("trouble", "model", "rank"),
    [
        pytest.param("loses", "vit", 1, marks=pytest.mark.slow),
        pytest.param("changes", "vit", 1, marks=pytest.mark.slow),
        pytest.param("peeks", "resnet", 0, marks=pytest.mark.slow),
        pytest.param("peeks", "resnet", 1, marks=pytest.mark.slow),
    ],
)
def test_trouble_of_one_process_costs_no_training(trouble, model, rank, tmp_path):
    arguments = ["--model", model, "--trouble", trouble, "--trouble_rank", rank, "--trouble_step", 10]
    frozen, _ = train(tmp_path / "frozen", *arguments, "--cache", "never")
    cached, log = train(tmp_path / "cached", *arguments)
    for one, other in zip(cached, frozen, strict=True):
        assert one["losses"] == other["losses"] and one["weights"] == other["weights"]
    replays = trouble == "loses"  # from another store, which the next epoch opens or builds
    assert [seen["replaying"] for seen in cached] == [replays, replays]
    assert ("was lost while it was in use" if replays else "training goes on from samples") in log


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_trouble_in_the_last_epoch_is_told(rank, tmp_path):
    cached, log = train(tmp_path / "cached", "--trouble", "changes", "--trouble_rank", rank, "--trouble_step", 26)
    assert log.count("training goes on from samples") == 1
    assert [seen["replaying"] for seen in cached] == [False, False]


@pytest.mark.slow
def test_mismatch_of_one_process_is_an_error_of_all_where_that_is_asked_for(tmp_path):
    arguments = ["--trouble", "changes", "--trouble_rank", 1, "--trouble_step", 10, "--on_mismatch", "error"]
    first, second = train(tmp_path / "cached", *arguments)[0]
    assert "were changed while it is frozen" in first["error"] and first == second


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_evaluation_that_reads_images_on_one_process_runs_on_images_on_all(rank, tmp_path):
    arguments = ["--cache_eval", "--trouble", "peeks in evaluation", "--trouble_rank", rank, "--trouble_step", 10]
    frozen, _ = train(tmp_path / "frozen", *arguments, "--cache", "never")
    cached, log = train(tmp_path / "cached", *arguments)
    assert log.count("Evaluations cannot run on features") == 1
    for one, other in zip(cached, frozen, strict=True):
        assert one["losses"] == other["losses"] and one["weights"] == other["weights"]
    [on_images, declined] = [
        [seen[0]["evaluations"][place]["eval_loss"] for place in (1, 2)] for seen in (frozen, cached)
    ]
    assert declined == on_images
