"""Replays that are given their features: what the model may be called on, and what bypassed blocks answer."""

import pytest
import torch
from support.helpers import CLASSES, tiny_resnet, tiny_vit

from hf_freezecache import BlockChain
from hf_freezecache.model.stand_ins import FrozenOutputError, StandIn


def batch_of(size, rows=3):
    torch.manual_seed(0)
    return {"pixel_values": torch.randn(rows, 3, size, size), "labels": torch.arange(rows) % CLASSES}


@pytest.fixture(params=[tiny_vit, tiny_resnet])
def chain_and_batch(request):
    chain, batch = BlockChain.from_model(request.param().eval()), batch_of(16 if request.param is tiny_vit else 32)
    chain.trace(batch)
    return chain, batch


def test_suffix_gives_loss_and_logits_of_the_whole_model(chain_and_batch):
    chain, batch = chain_and_batch
    with torch.no_grad():
        whole = chain.model(**batch)
        for cut in range(len(chain) + 1):
            replayed = chain.suffix(chain.prefix(batch, cut), {"labels": batch["labels"]}, cut)
            assert torch.equal(whole.loss, replayed.loss) and torch.equal(whole.logits, replayed.logits)


def test_hidden_states_of_bypassed_blocks_raise_when_they_are_read(chain_and_batch):
    chain, batch = chain_and_batch
    with torch.no_grad():
        whole = chain.model(**batch, output_hidden_states=True)
        features = chain.prefix(batch, 2)
        replayed = chain.suffix(features, {"labels": batch["labels"], "output_hidden_states": True}, 2)
    assert torch.equal(replayed.hidden_states[-1], whole.hidden_states[-1])
    assert isinstance(replayed.hidden_states[0], StandIn)
    with pytest.raises(FrozenOutputError, match="the output of the frozen block"):
        replayed.hidden_states[0].mean().item()


def replaying(chain, batch, call, cut=2):
    features = chain.prefix(batch, cut)
    main_input = chain.input_of_replay(features, {})
    with torch.no_grad(), chain.replay(cut, features, main_input):
        return call(main_input)


@pytest.mark.parametrize(
    "change", [lambda x: x.flip(-1), lambda x: x[:1], lambda x: torch.randn(3, 3, 16, 16), lambda x: torch.cat([x, x])]
)
def test_calls_on_other_images_than_those_of_the_batch_are_errors(change):
    chain, batch = BlockChain.from_model(tiny_vit().eval()), batch_of(16)
    with pytest.raises(FrozenOutputError, match="other than those of the batch, or changed ones"):
        replaying(chain, batch, lambda x: chain.model(pixel_values=change(x)))
    with pytest.raises(FrozenOutputError, match="other than those of the batch, or changed ones"):
        replaying(chain, batch, lambda x: chain.model.vit(change(x)))


def test_a_part_of_the_model_can_be_called_and_the_model_twice():
    chain, batch = BlockChain.from_model(tiny_vit().eval()), batch_of(16)
    with torch.no_grad():
        expected = chain.model.vit(batch["pixel_values"]).last_hidden_state
    once = replaying(chain, batch, lambda x: chain.model.vit(x).last_hidden_state)
    twice = replaying(chain, batch, lambda x: [chain.model.vit(x).last_hidden_state for _ in range(2)])
    assert all(torch.equal(found, expected) for found in (once, *twice))


def test_the_stand_in_of_images_looks_like_them():
    chain, batch = BlockChain.from_model(tiny_vit().eval()), batch_of(16)
    stand_in = chain.input_of_replay(chain.prefix(batch, 2), {})
    assert (stand_in.shape, stand_in.dtype) == (batch["pixel_values"].shape, torch.float32) and stand_in.is_input
