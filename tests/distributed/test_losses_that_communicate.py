"""A loss that communicates, and reads images: now and then, on one of two processes or on both.

50 samples in two processes of 4 make 7 steps an epoch; replay begins with step 7.
"""

import pytest
from support.launching import launch, seen_by


def train(output, when, ranks, *arguments, **settings):
    """What the processes have seen, and what they have logged."""
    output.mkdir()
    trouble = ["--communicates", when, "--trouble_rank", ranks, "--trouble_step", 10]
    log = launch(["--output", output, "--points", "1:3", "--codec", "fp32", *trouble, *arguments], **settings)
    return seen_by(output), log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "ranks"), [("step, before", "1"), ("step, before", "0"), ("step, after", "01"), ("step, before", "01")]
)
def test_step_that_can_be_run_again_costs_no_training(when, ranks, tmp_path):
    frozen, _ = train(tmp_path / "frozen", when, ranks, "--cache", "never")
    cached, log = train(tmp_path / "cached", when, ranks)
    assert "training goes on from samples" in log
    for one, other in zip(cached, frozen, strict=True):
        assert one["losses"] == other["losses"] and one["weights"] == other["weights"]
        assert not one["replaying"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_step_that_one_process_alone_cannot_run_again_is_an_error_in_words(rank, tmp_path):
    seen, log = train(tmp_path / "cached", "step, after", rank, timeout=120, fails=True)
    assert len(seen) == 1 and "Connection" in log  # the other process has broken off, as its neighbour was gone
    assert "'pixel_values' is read" in seen[0]["error"]
    assert "it has communicated with the other processes, which do not run it again" in seen[0]["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("when", "ranks"), [("before", "1"), ("before", "01"), ("after", "01")])
def test_rehearsal_and_evaluation_stay_in_step(when, ranks, tmp_path):
    first, second = train(tmp_path / "rehearsed", f"rehearsal, {when}", ranks)[0]
    assert "'pixel_values' is read" in first["error"] and "'pixel_values' is read" in second["error"]
    arguments = ["--cache_eval"]
    frozen, _ = train(tmp_path / "frozen", f"evaluation, {when}", ranks, *arguments, "--cache", "never")
    cached, log = train(tmp_path / "cached", f"evaluation, {when}", ranks, *arguments)
    assert log.count("Evaluations cannot run on features") == 1
    for one, other in zip(cached, frozen, strict=True):
        assert one["losses"] == other["losses"] and one["weights"] == other["weights"]


@pytest.mark.slow
def test_processes_end_by_themselves_after_a_rehearsal_that_failed_on_one(tmp_path):
    first, second = train(tmp_path / "ended", "rehearsal, before", "1", "--ends_itself", timeout=90)[0]
    assert "'pixel_values' is read" in first["error"] and "'pixel_values' is read" in second["error"]
