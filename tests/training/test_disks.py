"""Nodes with disks of their own fail together, whoever of them waits for whom."""

import pytest
from support.builds import Meeting, on_every_process

from hf_freezecache.nodes import NodeGroup
from hf_freezecache.training.disks import Disks


class SimulatedNode(NodeGroup):
    """Two simulated processes of one node."""

    def _gather(self, value):
        return self.handle.exchange(self.rank, value)


def on_two_nodes(work):
    """Runs `work(disks)` on two nodes of two simulated processes each; what it returns or raises, by rank."""
    meetings = [Meeting(2), Meeting(2)]

    def on_process(group):
        node, rank = divmod(group.rank, 2)
        meetings[node].turn = group.meeting.turn
        return work(Disks(group, SimulatedNode(rank, 2, node, (2 * node, 2 * node + 1), meetings[node])), group.rank)

    return on_every_process(4, on_process)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_process_that_fails_where_others_of_its_node_wait_ends_the_step_for_all(failing):
    def work(disks, rank):
        def step():
            if rank == failing:
                raise OSError(5, "the disk does not answer")
            return disks.group.gather("value")

        return disks.on_all(step)

    errors = on_two_nodes(work)
    assert [type(error) for error in errors] == [OSError] * 4
    assert all("the disk does not answer" in str(error) for error in errors)


def test_step_that_fails_nowhere_gives_each_node_its_own():
    found = on_two_nodes(lambda disks, rank: disks.on_all(lambda: disks.on_main(lambda: f"node {disks.node}")))
    assert found == ["node 0", "node 0", "node 1", "node 1"]
