"""The head alone, on what it gets: the outputs of the whole model."""

import pytest
import timm
import torch
import torchvision
from support.helpers import tiny_resnet, tiny_vit
from support.pretrained import settle
from support.sounds import wav2vec2, wav2vec2_of_letters
from support.token_rows import Pad, Texts, bert, bert_of_tokens, gpt2, xlnet
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


def test_what_an_outer_module_holds_itself_does_not_move_the_head():
    """XLNet's stack of blocks holds a parameter that no run on texts alone reads."""
    model = settle(xlnet()).eval()
    head = Head(BlockChain.from_model(model, probe=texts()), is_new=False)
    assert "transformer.mask_emb" in head.parameters and head.cut.boundary.flops > 0.5
    head.prove(texts())


@pytest.mark.parametrize("make", [tiny_resnet, wav2vec2, wav2vec2_of_letters], ids=["images", "sounds", "letters"])
def test_a_head_runs_alone_on_inputs_of_other_sizes(make):
    """Of letters there is one for every position, so that features have the sizes of sounds."""
    model = settle(make(), head="lm_head" if make is wav2vec2_of_letters else "classifier").eval()
    sizes = [(3, 3, 32, 32), (4, 3, 40, 24), (2, 3, 64, 48)] if make is tiny_resnet else [(3, 90), (4, 70), (2, 200)]
    generator = torch.Generator().manual_seed(0)
    batches = [{model.main_input_name: torch.randn(*size, generator=generator)} for size in sizes]
    head = Head(BlockChain.from_model(model, probe=batches[0]), is_new=True)
    found = [(head.features(batch), head.answers(batch)) for batch in batches]
    for batch, (features, answers) in zip(batches, found, strict=True):
        head.compare(batch, features, answers)
        assert head.fits(tuple(batch[model.main_input_name].shape[1:]))
    shapes = {tuple(features.shape[1:]) for features, _ in found}
    assert len(shapes) == (3 if make is wav2vec2_of_letters else 1)


def test_what_is_kept_from_runs_of_other_sizes_is_seen():
    class Remembers(nn.Module):
        """Tells the head, past its feature, how wide the last images were."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.width = inner, [0]

        def forward(self, x):
            self.width[0] = x.shape[-1]
            return self.inner(x)

    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.width[0]

    model = settle(tiny_resnet()).eval()
    first = model.resnet.embedder.embedder = Remembers(model.resnet.embedder.embedder)
    model.classifier[1] = Reads(16, 5)
    model.classifier[1].width = first.width
    narrow, wide = ({"pixel_values": torch.randn(2, 3, 32, width)} for width in (32, 48))
    head = Head(BlockChain.from_model(model, probe=narrow), is_new=True)
    features, expected = head.features(narrow), head.answers(narrow)
    head.compare(narrow, features, expected)
    head.features(wide)
    with pytest.raises(ChainError, match="does not answer as the whole model does, on samples of shape"):
        head.compare(narrow, features, expected)


def test_blocks_up_to_a_cut_are_left_out_where_the_feature_there_is_known():
    model, batch = settle(tiny_vit()).eval(), images()
    chain = BlockChain.from_model(model, probe=batch)
    head, known = Head(chain, is_new=True), chain.prefix(batch, 2)
    inputs = {"pixel_values": chain.input_of_replay(known, batch)}
    assert torch.equal(head.features(inputs, 2, known), head.features(batch))
    assert torch.equal(head.answers(inputs, 2, known)[("logits",)], model(**batch).logits)


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
