"""A parameter that several blocks use is found, however it is shared."""

import re

import pytest
import torch
from support import zoo
from support.helpers import tiny_vit
from torch import nn

from hf_freezecache import BlockChain
from hf_freezecache.model.errors import ChainError
from hf_freezecache.model.sharing import check_sharing

BLOCKS = ["embed", "first", "second"]


class Tied(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.embed, self.first, self.second = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if how == "name":
            self.head.weight = self.embed.weight
        elif how == "blocks":
            self.second.weight = self.first.weight

    def forward(self, input_ids):
        x = self.second(self.first(self.embed(input_ids)))
        if self.how == "function":
            return x @ self.embed.weight.T
        return self.head(x.to(self.embed.weight.dtype))  # to read a parameter's dtype is no use of it


def check(model, names=BLOCKS):
    chain = BlockChain.from_model(model, names, probe={"input_ids": torch.arange(6).reshape(2, 3)})
    return check_sharing(chain)


def test_shared_parameter_is_refused_by_name():
    message = r"'first.weight' \(also 'second.weight'\).*is used by 'first' and by 'second'.*policy='none'"
    with pytest.raises(ChainError, match=message):
        check(Tied("blocks"))


@pytest.mark.parametrize(("how", "names"), [("name", r" \(also 'head.weight'\)"), ("function", "")])
def test_embedding_table_that_the_head_reads_is_said(how, names):
    (sentence,) = check(Tied(how))
    assert re.match(rf"'embed.weight'{names} of Tied is used by 'embed' and by 'the head': it is frozen", sentence)


def test_parameters_of_one_block_are_fine():
    assert check(Tied("not")) == []


def test_shared_parameter_that_the_user_has_frozen_is_fine():
    model = Tied("name")
    model.embed.weight.requires_grad_(False)
    assert check(model) == []


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "beit_relative", "swin", "convnext", "resnet", "mobilenet"])
def test_declared_families_share_nothing(name):
    model = zoo.make(name)
    assert check_sharing(BlockChain.from_model(model)) == []


def test_position_biases_of_all_layers_are_shared():
    model = zoo.make("beit_shared")
    with pytest.raises(ChainError, match="relative_position_bias"):
        check_sharing(BlockChain.from_model(model))


def test_check_leaves_no_hooks_and_modes_behind():
    model = tiny_vit().train()
    state = torch.get_rng_state()
    check_sharing(BlockChain.from_model(model, probe={"pixel_values": torch.zeros(2, 3, 16, 16)}))
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
