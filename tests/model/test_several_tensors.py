"""Cuts at which several tensors cross: side by side in the feature, and apart again in the replay."""

import pytest
import torch
from support.proofs import assert_outputs_equal, assert_steps_equal
from torch import nn

from hf_freezecache import BlockChain


class Stream(nn.Module):
    """A layer of two streams, the second of other channels, positions or type."""

    def __init__(self, first: int, second: int):
        super().__init__()
        self.first, self.second = nn.Linear(first, first), nn.Linear(second, second)

    def forward(self, streams):
        x, y = streams
        return x + self.first(x).tanh(), (y.float() + self.second(y.float()).sin()).to(y.dtype)


class Streams(nn.Module):
    """Two streams that meet at the end.

    Args:
        kind: `channels`: of the same positions; `positions`: one of fewer; `half`: one in half precision; `maps`.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.stem, self.other = nn.Linear(4, 8), nn.Linear(4, 6)
        self.layers = nn.ModuleList(Stream(8, 6) for _ in range(3))
        self.head = nn.Linear(14, 3)

    def forward(self, x):
        first, second = self.stem(x), self.other(x)
        if self.kind == "positions":
            second = second[:, :2]
        if self.kind == "half":
            second = second.bfloat16()
        streams = first, second
        for layer in self.layers:
            streams = layer(streams)
        first, second = streams
        return self.head(torch.cat([first.mean(1), second.float().mean(1)], -1))


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    [
        ("channels", (5, 14), torch.float32),
        ("positions", (5 * 8 + 2 * 6,), torch.float32),
        ("half", (5, 14), torch.float32),
    ],
)
def test_two_streams_cross_as_one_feature(kind, shape, dtype):
    torch.manual_seed(0)
    model = Streams(kind).eval()
    chain = BlockChain.from_model(model, probe={"x": torch.randn(2, 5, 4)})
    assert [chain.crossing(cut) for cut in range(1, len(chain) + 1)][:2] == [2, 2] and len(chain) >= 3
    layout = chain.layout(2)
    assert (layout.shape, layout.dtype) == (shape, dtype)
    batch = {"x": torch.randn(3, 5, 4)}
    cuts = list(range(1, len(chain) + 1))
    assert_outputs_equal(chain, batch, cuts)
    assert_steps_equal(chain, batch, cuts)


class Maps(nn.Module):
    """A feature map beside one that a skip connection adds at the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        first = x = self.stem(x)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head((x + first).mean((2, 3)))


def test_feature_maps_stand_side_by_side_as_channels():
    model = Maps().eval()
    names = ["stem", "layers.0", "layers.1"]
    chain = BlockChain.from_model(model, blocks=names, probe={"x": torch.randn(2, 3, 6, 6)})
    assert chain.layout(2).shape == (8, 6, 6) and chain.layout(2).grid == (6, 6)
    batch = {"x": torch.randn(3, 3, 6, 6)}
    assert_outputs_equal(chain, batch, [1, 2, 3])
    assert_steps_equal(chain, batch, [1, 2, 3])


def test_features_of_two_streams_advance_between_cuts():
    torch.manual_seed(0)
    chain = BlockChain.from_model(Streams("channels").eval(), probe={"x": torch.randn(2, 5, 4)})
    batch = {"x": torch.randn(3, 5, 4)}
    advanced = chain.advance({"x": chain.prefix(batch, 1)}, 1, 2)
    assert torch.equal(advanced, chain.prefix(batch, 2))
