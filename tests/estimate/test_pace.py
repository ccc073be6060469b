"""What is declined before anything is measured: short trainings, by the seconds that their live epochs have taken."""

import pytest

from hf_freezecache.estimate.costs import Work
from hf_freezecache.estimate.pace import LEAST_BUILD_SECONDS, Pace, why_hopeless

WORK = Work(ranges=10)


def test_a_step_from_a_store_saves_loading_and_the_prefix_at_most():
    assert Pace(step=0.05, load=0.01, start=0.0, prefix_share=0.25).most_saved == pytest.approx(0.01 + 0.04 / 4)
    assert Pace(step=0.05, load=0.05, start=0.0, prefix_share=0.25).most_saved == 0.05


def test_fewer_epochs_than_the_build_runs_are_hopeless_without_a_pace():
    assert why_hopeless(WORK, 0.9, from_images=True) == "less than one epoch remains"
    assert "save as many runs at most" in why_hopeless(WORK, 1.0, from_images=True)
    assert why_hopeless(WORK, 1.1, from_images=True) is None
    assert why_hopeless(WORK, 1.0, from_images=False) is None, "deeper blocks alone are run"
    assert "runs the frozen blocks over the data 3 times" in why_hopeless(
        Work(ranges=10, views=2, views_run=2), 3.0, from_images=True
    )


def test_a_training_that_is_over_before_measuring_would_be_is_hopeless_and_the_numbers_are_said():
    """10 ranges of 10 ms, of which 4 could be saved; the build runs them once, and measuring 6 of them."""
    pace = Pace(step=0.010, load=0.001, start=0.0, prefix_share=1 / 3)
    assert pace.most_saved == pytest.approx(0.004)
    enough = 1 + (6 + LEAST_BUILD_SECONDS / 0.004) / 10
    reason = why_hopeless(WORK, enough - 0.01, True, pace)
    assert f"{enough - 0.01:.3g} epochs left take about " in reason and " at most" in reason
    assert why_hopeless(WORK, enough + 0.01, True, pace) is None
    # Two processes have half of the ranges each.
    assert why_hopeless(Work(ranges=10, processes=2), enough + 0.01, True, pace) is not None
    assert why_hopeless(Work(ranges=20, processes=2), enough + 0.01, True, pace) is None


def test_samples_that_are_yet_to_be_looked_at_count():
    pace = Pace(step=0.010, load=0.005, start=0.0, prefix_share=0.5)
    assert why_hopeless(WORK, 5.0, True, pace) is None
    assert why_hopeless(WORK, 5.0, True, pace, looks=100) is not None


def test_loader_processes_that_start_slowly_must_be_paid_for_too():
    quick, slow = (Pace(step=0.010, load=0.0, start=start, prefix_share=0.5) for start in (0.0, 2.0))
    assert why_hopeless(WORK, 5.0, True, quick) is None
    assert why_hopeless(WORK, 5.0, True, slow) is not None


def test_steps_of_several_forward_passes_save_as_many_runs():
    """The build runs the frozen blocks once; an epoch of steps with two losses runs them twice."""
    twice = Work(ranges=10, passes=2)
    assert why_hopeless(twice, 1.0, from_images=True) is None
    three_runs = Work(ranges=10, views=2, views_run=2, passes=2)
    assert "would save 2 runs each at most" in why_hopeless(three_runs, 1.5, from_images=True)
    assert why_hopeless(three_runs, 1.6, from_images=True) is None
