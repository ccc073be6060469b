"""What a traced forward pass tells: the grid of the features, and blocks that cannot be cut."""

import pytest
import torch
from support import zoo
from support.chains import assert_replays
from torch import nn

from hf_freezecache import BlockChain
from hf_freezecache.model.errors import ChainError
from hf_freezecache.model.layout import token_grid

# The grid of tokens and maps


@pytest.mark.parametrize(
    ("model", "special"),
    [
        (zoo.vit, 1),
        (zoo.deit, 2),
        (zoo.dinov2, 1),
        (zoo.dinov2_registers, 4),
        (zoo.beit, 1),
    ],
)
def test_token_layout_counts_special_tokens_and_grid(model, special):
    chain = BlockChain.from_model(model())
    for cut in range(1, len(chain) + 1):
        layout = chain.layout(cut)
        assert (layout.shape, layout.grid, layout.special_tokens) == ((16 + special, 16), (4, 4), special)
        assert layout.dtype == torch.float32
    assert chain.layout(0).shape == (3, 16, 16)


def test_map_layout_is_channels_and_grid():
    chain = BlockChain.from_model(zoo.resnet())
    assert [chain.layout(cut).shape for cut in range(1, 6)] == [(8, 16, 16)] * 3 + [(16, 8, 8)] * 2
    assert all(chain.layout(cut).special_tokens == 0 for cut in range(6))


def test_swin_layout_halves_the_grid_between_stages():
    chain = BlockChain.from_model(zoo.swin())
    assert [chain.layout(cut).grid for cut in range(1, 6)] == [(8, 8), (8, 8), (4, 4), (4, 4), (4, 4)]
    assert [chain.layout(cut).shape for cut in (2, 3)] == [(64, 8), (16, 16)]


@pytest.mark.parametrize(("size", "grid"), [((16, 32), (4, 8)), ((24, 8), (6, 2))])
def test_non_square_image_layout_has_its_aspect(size, grid):
    for build, special in ((zoo.vit, 1), (zoo.deit, 2)):
        chain = BlockChain.from_model(build(image_size=size))
        layout = chain.layout(2)
        assert (layout.grid, layout.special_tokens) == (grid, special)
        x = torch.randn(3, 3, *size)
        assert_replays(chain, x)


def test_special_tokens_that_complete_a_larger_square_are_still_special():
    """4 patches, CLS and 4 registers are 9 tokens, which is not a 3x3 grid."""
    layout = BlockChain.from_model(zoo.dinov2_registers(image_size=8, num_register_tokens=4)).layout(2)
    assert (layout.shape[0], layout.grid, layout.special_tokens) == (9, (2, 2), 5)


def test_layout_dtype_is_the_models():
    chain = BlockChain.from_model(zoo.make("vit").to(torch.bfloat16))
    assert chain.layout(2).dtype == torch.bfloat16
    assert chain.prefix({"pixel_values": zoo.pixels(chain.model).bfloat16()}, 2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tokens", "aspect", "expected"),
    [
        (197, 1.0, ((14, 14), 1)),
        (198, 1.0, ((14, 14), 2)),
        (196, 1.0, ((14, 14), 0)),
        (261, 1.0, ((16, 16), 5)),
        (7, 1.0, ((2, 2), 3)),
        (33, 0.5, ((4, 8), 1)),
        (60, 1.0, ((7, 7), 11)),
        (1000, 7.3, (None, 0)),
    ],
)
def test_token_grid_takes_fewest_special_tokens(tokens, aspect, expected):
    assert token_grid(tokens, aspect) == expected


# Blocks that cannot be cut


def test_block_that_runs_twice_is_refused():
    class Shared(zoo.ConvNet):
        def forward(self, x):
            return super().forward(self.stem(x)[:, :3])

    with pytest.raises(ChainError, match="'stem'.*runs 2 times"):
        BlockChain.from_model(Shared(), blocks=zoo.CONVNET_BLOCKS, probe={"x": torch.randn(2, 3, 8, 8)})


def test_block_that_does_not_run_is_refused():
    model = zoo.ConvNet()
    model.spare = nn.Conv2d(4, 4, 1)
    with pytest.raises(ChainError, match="'spare'.*runs 0 times"):
        BlockChain.from_model(model, blocks=[*zoo.CONVNET_BLOCKS, "spare"], probe={"x": torch.randn(2, 3, 8, 8)})
