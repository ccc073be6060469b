"""Main inputs that are no image: one number a sample, and several images a sample."""

import copy

import pytest
import torch
from support.helpers import assert_same_weights, losses, manual, run, weights
from torch import nn


class Scaled(nn.Module):
    """Numbers of any shape, each a feature."""

    main_input_name = "values"

    def __init__(self, numbers):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(numbers, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, values, labels=None):
        x = self.second(self.first(values.flatten(1) if values.ndim > 1 else values[:, None]).tanh()).tanh()
        y = self.head(x).squeeze(-1)
        return {"logits": y} if labels is None else {"loss": nn.functional.mse_loss(y, labels), "logits": y}


class Values(torch.utils.data.Dataset):
    def __init__(self, shape):
        self.values = torch.randn(32, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 32

    def __getitem__(self, row):
        return {"values": self.values[row], "labels": self.values[row].sum()}


@pytest.mark.parametrize("shape", [(), (2, 3, 4, 4)], ids=["a number", "several images"])
def test_cached_training_is_the_frozen_one(shape, tmp_path):
    torch.manual_seed(0)
    model = Scaled(Values(shape)[0]["values"].numel())
    trained = []
    for cache in ("never", "always"):
        config = manual("1:2", cache=cache, codec="fp32", blocks=["first", "second"])
        settings = dict(include_num_input_tokens_seen="all")
        trained.append(run(copy.deepcopy(model), Values(shape), tmp_path / cache, config, **settings))
    never, always = trained
    assert always.freeze_status().replaying
    assert losses(always) == losses(never)
    assert always.state.num_input_tokens_seen == never.state.num_input_tokens_seen > 0
    assert_same_weights(weights(always), weights(never))
