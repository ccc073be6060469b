"""The head alone, on what it gets: the outputs of the whole model."""

import pytest
import timm
import torch
import torchvision
from support.helpers import tiny_resnet, tiny_vit
from support.pretrained import settle
from support.token_rows import Pad, Texts, bert, bert_of_tokens, gpt2
from torch import nn

from hf_freezecache import BlockChain, wrap_classifier
from hf_freezecache.model.errors import ChainError
from hf_freezecache.model.head import Head


def images():
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def texts():
    batch = Pad()([*Texts(4)])
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def of_timm():
    return wrap_classifier(timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=5))


def of_torchvision():
    return wrap_classifier(torchvision.models.resnet18(num_classes=4))


def of_two_layers():
    model = tiny_vit()
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 5))
    return model


@pytest.mark.parametrize(
    ("make", "inputs", "head", "shape"),
    [
        (tiny_vit, images, "classifier", (32,)),
        (of_two_layers, images, "classifier", (32,)),
        (tiny_resnet, images, "classifier", (16,)),
        (of_timm, images, "model.head", (192,)),
        (of_torchvision, images, "model.fc", (512,)),
        (bert, texts, "classifier", (32,)),
        (bert_of_tokens, texts, "classifier", (None, 32)),
    ],
)
def test_a_new_head_runs_alone_on_one_feature_of_a_sample(make, inputs, head, shape):
    model, batch = settle(make(), head).eval(), inputs()
    chain = BlockChain.from_model(model, probe=batch)
    found = Head(chain, is_new=True)
    assert all(name.startswith(head) for name in found.parameters) and len(found.parameters) in (2, 4)
    features = found.features(batch)
    assert len(features.shape) == 1 + len(shape) and features.shape[-1] == shape[-1]
    with torch.no_grad():
        main_input = chain.input_of_replay(features, batch)
        with found.replay(features, main_input):
            alone = model(**{**batch, chain.main_input: main_input})
        assert torch.equal(alone.logits, model(**batch).logits)


def test_a_trained_head_is_none_to_start_but_where_it_is_asked_for():
    chain = BlockChain.from_model(settle(tiny_vit(), head="none"), probe=images())
    assert not Head(chain, is_new=True).parameters
    assert Head(chain, is_new=False).parameters.keys() >= {"classifier.weight", "classifier.bias"}


def test_a_head_without_a_bias_is_not_known_to_be_new():
    chain = BlockChain.from_model(settle(gpt2(), head="score"), probe=texts())
    assert not Head(chain, is_new=True).parameters
    assert "score.weight" in Head(chain, is_new=False).parameters


def test_a_model_that_answers_otherwise_with_its_head_alone_is_refused():
    class Counts(nn.Linear):
        """Adds what is not in its input."""

        times = 0

        def forward(self, x):
            self.times += 1
            return super().forward(x) + self.times

    model = settle(tiny_vit())
    model.classifier = Counts(32, 5)
    head = Head(BlockChain.from_model(model, probe=images()), is_new=True)
    with pytest.raises(ChainError, match="does not answer as the whole model does"):
        head.prove(images())


def test_frozen_parameters_are_no_part_of_a_head():
    model = settle(tiny_vit())
    model.classifier.bias.requires_grad_(False)
    assert [*Head(BlockChain.from_model(model, probe=images()), True).parameters] == ["classifier.weight"]
