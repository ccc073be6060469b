"""What policies observe."""

import pytest
import torch
from support.helpers import tiny_vit

from hf_freezecache import BlockChain
from hf_freezecache.training.recorder import BlockRecorder


@pytest.fixture
def recorder():
    return BlockRecorder(BlockChain.from_model(tiny_vit().eval()))


def test_unknown_signal_is_refused_by_name(recorder):
    with pytest.raises(ValueError, match=r"\['losses'\].*activations, gradients, weights"):
        recorder.watch({"weights", "losses"})


def test_only_training_steps_are_recorded_and_only_live_blocks_returned(recorder):
    chain, pixels = recorder.chain, torch.randn(2, 3, 16, 16)
    recorder.watch({"activations"})
    chain.model(pixel_values=pixels)
    assert [block.activation for block in recorder.blocks()] == [None] * 4
    recorder.active = True
    chain.model(pixel_values=pixels)
    chain.freeze(2)
    blocks = recorder.blocks()
    assert [block.index for block in blocks] == [2, 3]
    assert all(block.activation.shape == (2, 17, 32) for block in blocks)
    assert [block.activation for block in recorder.blocks()] == [None, None]
    recorder.active = False
    assert torch.equal(blocks[0].activation, chain.prefix({"pixel_values": pixels}, 3))


def test_nothing_is_recorded_for_a_policy_that_observes_weights_alone(recorder):
    recorder.watch({"weights", "gradients"})
    recorder.active = True
    recorder.chain.model(pixel_values=torch.randn(2, 3, 16, 16))
    blocks = recorder.blocks()
    assert [block.activation for block in blocks] == [None] * 4 and all(block.parameters for block in blocks)


def test_closed_recorder_leaves_no_hook(recorder):
    recorder.watch({"activations"})
    recorder.close()
    assert not any(module._forward_hooks for module in recorder.chain.model.modules())
