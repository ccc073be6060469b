"""Of two processes that train together, one is killed: the other ends, and both, resumed, end as if nobody was."""

import pytest

from benchmarks.faults.groups import run_whole_group, tell_story_of_group
from benchmarks.faults.kills import PLANS, tell_stories
from benchmarks.faults.trainings import PHASES

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_kills_of_one_of_two_processes_in_any_phase_lose_nothing(processes, tmp_path):
    wholes = {plan: run_whole_group(plan, tmp_path / plan) for plan in PLANS}
    phases = [phase for phase in PHASES if phase != "resuming"]
    stories = list(tell_stories(wholes, 3, len(phases), tmp_path / "killed", phases, tell_story_of_group))
    assert [story for story in stories if not story.survived] == []
    assert sum(len(story.killed_in) for story in stories) == len(phases)
    assert {process for story in stories for process in story.processes} == {0, 1}
