"""Single calls of a module are told apart within a run."""

import torch
from torch import nn

from hf_freezecache.model.record import record_run
from hf_freezecache.model.routing import replacing


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.once = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.once(self.layer(x)))


def test_one_call_of_two_is_replaced_in_every_run():
    model = Twice().eval()
    x = torch.randn(2, 4)
    record = record_run(model, {"x": x}, samples=2)
    second = [call for call in record.calls if call.name == "layer"][1]
    with torch.no_grad():
        expected = model.once(model.layer(x))
        with replacing(model, record, {second: lambda original, args, kwargs: args[0]}):
            assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
    assert "forward" not in model.__dict__ and "forward" not in model.layer.__dict__


def test_calls_within_a_skipped_one_do_not_count():
    model = nn.Sequential(Twice(), nn.ReLU()).eval()
    record = record_run(Wrapper(model), {"x": torch.randn(2, 4)}, samples=2)
    twice = next(call for call in record.calls if call.name == "inner.0")
    live = record.live_calls((twice,))
    assert live[model[0]] == [twice] and model[0].layer not in live and model[1] in live


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)
