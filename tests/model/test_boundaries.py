"""What crosses a boundary of a recorded run, and what is frozen there."""

import torch
from torch import nn

from hf_freezecache.model.boundaries import Flow
from hf_freezecache.model.record import record_run


class Parts(nn.Module):
    """A table that all samples share is made in the first part and read in the second; a buffer is only looked at."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = First(), nn.Linear(4, 4), nn.Linear(4, 2)
        self.bare = nn.Parameter(torch.ones(4))

    def forward(self, x):
        hidden, table = self.first(x)
        hidden = self.second(hidden * self.bare) + table
        return self.head(hidden)


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.position = nn.Linear(4, 4), nn.Linear(1, 4)

    def forward(self, x):
        return self.layer(x), self.position(torch.ones(1, 1))


def flow():
    torch.manual_seed(0)
    model = Parts().eval()
    found = Flow(model, record_run(model, {"x": torch.randn(2, 4)}, samples=2), ("x",), ("x",))
    return found, {call.name: call for call in found.record.calls}


def test_a_call_that_makes_what_all_samples_share_is_entered():
    found, calls = flow()
    boundary = found.behind(calls["first"], calls["second"])
    assert boundary.why_not is None and [call.name for call in boundary.skipped] == ["first.layer"]
    assert boundary.entry is calls["second"]
    # The product with a bare parameter lies before it; the table is made by a replay, too.
    assert boundary.frozen == {"first.layer.weight", "first.layer.bias", "bare", *POSITION}


POSITION = ("first.position.weight", "first.position.bias")


def test_parameters_that_a_replay_reads_for_all_samples_are_shared():
    found, calls = flow()
    assert set(found.behind(calls["first"], calls["second"]).shared) == set(POSITION)


def test_outputs_and_arguments_are_places_for_the_feature():
    found, calls = flow()
    before, after = found.before(calls["head"]), found.after(calls["head"])
    assert before.entry is calls["head"] and before.flops > 0.5 and before.has_parameters_behind
    assert after.entry is None and not after.has_parameters_behind
    assert [place.call.name for place in after.places[0]] == ["head"]
