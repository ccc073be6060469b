"""Settings of dropout and of the classes of a head, tried on the frozen part."""

import pytest
import torch
from support.helpers import tiny_vit
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_freezecache.model.chain import BlockChain
from hf_freezecache.model.neutral import neutral_settings
from hf_freezecache.model.proving import is_neutral


def state(model):
    configs = [dict(vars(module.config)) for module in model.modules() if "config" in vars(module)]
    attributes = [{**vars(module), "_modules": None, "config": None} for module in model.modules()]
    return repr(configs), repr(attributes)


@pytest.mark.parametrize("fails", [False, True])
def test_settings_are_put_back(fails):
    model = tiny_vit(num_labels=7, attention_probs_dropout_prob=0.2)
    before = state(model)
    with pytest.raises(KeyError) if fails else torch.no_grad(), neutral_settings(model):
        assert model.config.num_labels == model.num_labels == 2
        assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0}
        assert model.vit.layers[0].attention.attention_dropout == 0
        if fails:
            raise KeyError
    assert state(model) == before


def test_dropout_of_a_head_that_takes_the_models_is_neutral_too():
    model = BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    assert model.config.classifier_dropout is None
    with neutral_settings(model):
        assert model.config.classifier_dropout == 0
    assert model.config.classifier_dropout is None


class Reading(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.read, self.drop = read, 0.1

    def forward(self, x):
        return self.read(self, x)


READ = {
    "nothing": (lambda module, x: x, True),
    "only in training": (lambda module, x: x * (1 - module.drop) if module.training else x, True),
    "always": (lambda module, x: x * (1 - module.drop), False),
    "not 0": (lambda module, x: x / module.drop, False),
    "raises": (lambda module, x: x if 1 / module.drop else x, False),
}


@pytest.mark.parametrize("kind", READ)
def test_what_the_frozen_part_reads_in_eval_mode_is_not_neutral(kind):
    read, expected = READ[kind]
    model, inputs = tiny_vit(), {"pixel_values": torch.randn(4, 3, 16, 16)}
    model.vit.layers[0].dropout = Reading(read)
    chain = BlockChain.from_model(model, probe=inputs)
    generator = torch.get_rng_state()
    assert is_neutral(chain, inputs, 2) == expected
    assert is_neutral(chain, inputs, 1)  # it runs behind this cut
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.vit.layers[0].dropout.drop == 0.1
