"""Replays on inputs of other sizes than the recorded one's."""

import pytest
import torch
from support.helpers import tiny_resnet
from support.sounds import CUT_IN_LAYERS, PadSounds, Sounds, wav2vec2
from support.token_rows import Choices, Pad, PadChoices, Texts, bert_of_choices, bert_of_questions

from hf_freezecache import BlockChain
from hf_freezecache.model.errors import ChainError
from hf_freezecache.model.layout import to_positions
from hf_freezecache.model.padding import Trimming
from hf_freezecache.model.resizing import resize


def inputs(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "start_positions", "end_positions")}


def sounds_of(length, rows=3):
    return inputs(PadSounds()([*Sounds(rows, length, length)]))


def trimmed_chain(make, probe, cut):
    chain = BlockChain.from_model(make().eval(), probe=probe)
    chain.padding.trim(cut, Trimming("right", {name: value[:2] for name, value in probe.items()}))
    return chain


@pytest.mark.parametrize("cut", [1, 2, 3, pytest.param(4, marks=CUT_IN_LAYERS), pytest.param(6, marks=CUT_IN_LAYERS)])
def test_shapes_of_sounds_of_other_lengths_are_those_of_a_run(cut):
    chain = trimmed_chain(wav2vec2, sounds_of(200), cut)
    for length in (37, 60, 61, 62, 63, 64, 65, 66, 199):
        batch = sounds_of(length)
        found = resize(chain.model, chain.own_trace(), cut, batch).layout.shape
        assert found == tuple(chain.prefix(batch, cut).shape[1:])
        with torch.no_grad():
            replayed = chain.suffix(chain.prefix(batch, cut), batch, cut).logits
            assert torch.equal(replayed, chain.model(**batch).logits)


def test_shapes_are_found_without_values():
    """A stand-in takes the sound's place: there is nothing to read."""
    chain = trimmed_chain(wav2vec2, sounds_of(200), 4)
    trace, batch = chain.own_trace(), sounds_of(90)
    batch["input_values"] = trace.main_stand_in(3, torch.device("cpu"), (90,))
    assert resize(chain.model, trace, 4, batch).layout.shape == (((90 - 5) // 3 + 1 - 3) // 2 + 1, 32)
    assert resize(chain.model, trace, 4, batch) is resize(chain.model, trace, 4, sounds_of(90))  # remembered


def test_models_that_read_values_are_asked_with_zeros():
    model = wav2vec2().eval()
    forward = model.wav2vec2.feature_projection.forward

    def reads(hidden_states):
        assert float(hidden_states.abs().sum()) >= 0
        return forward(hidden_states)

    chain = trimmed_chain(lambda: model, sounds_of(200), 4)
    model.wav2vec2.feature_projection.forward = reads
    batch = sounds_of(90)
    batch["input_values"] = chain.own_trace().main_stand_in(3, torch.device("cpu"), (90,))
    assert resize(model, chain.own_trace(), 4, batch).layout.shape[0] == ((90 - 5) // 3 + 1 - 3) // 2 + 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_features_are_trimmed_on_the_side_of_the_padding(side):
    probe = inputs(Pad(side, width=20)([*Texts(4)]))
    chain = BlockChain.from_model(bert_of_questions().eval(), probe=probe)
    chain.padding.trim(2, Trimming(side, probe))
    features = torch.randn(4, 20, 32)
    own = chain.padding.fit_features(features, inputs(Pad(side, width=15)([*Texts(4)])), 2)
    assert torch.equal(own, features[:, :15] if side == "right" else features[:, 5:])
    layout = chain.stored_layout(2)
    assert layout.is_trimmed and layout.shape == (20, 32)


def test_features_of_choices_are_trimmed_text_by_text():
    probe = inputs(PadChoices(width=20)([*Choices(4)]))
    chain = BlockChain.from_model(bert_of_choices().eval(), probe=probe)
    chain.padding.trim(2, Trimming("right", probe))
    features = torch.randn(4, 3 * 20, 32)
    own = chain.padding.fit_features(features, inputs(PadChoices(width=15)([*Choices(4)])), 2)
    assert torch.equal(own, features.unflatten(1, (3, 20))[:, :, :15].flatten(1, 2))


def test_trace_of_the_widest_is_made_again_where_another_one_has_taken_its_place():
    chain = trimmed_chain(wav2vec2, sounds_of(200), 4)
    chain.trace(sounds_of(70))
    assert chain.stored_layout(4).shape[0] == ((200 - 5) // 3 + 1 - 3) // 2 + 1
    assert chain.own_trace().size == (200,)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_features_of_images_of_any_size_are_those_of_a_run(cut):
    chain = BlockChain.from_model(tiny_resnet().eval(), probe={"pixel_values": torch.randn(2, 3, 32, 32)})
    chain.padding.keep_sizes(cut)
    layout = chain.stored_layout(cut)
    assert layout.is_token and layout.shape == (chain.layout(cut).channels,)
    trace = chain.own_trace()
    for size in ((32, 48), (64, 32), (40, 56), (32, 32)):
        images = {"pixel_values": torch.randn(3, 3, *size)}
        features = chain.prefix(images, cut)
        shapes = {"pixel_values": trace.main_stand_in(3, torch.device("cpu"), (3, *size))}
        assert chain.padding.positions(shapes, cut) == features.shape[2] * features.shape[3]
        fitted = chain.padding.fit_features(to_positions(features), shapes, cut)
        assert torch.equal(fitted, features) and chain.own_trace() is trace
        with torch.no_grad():
            assert torch.equal(chain.suffix(fitted, images, cut).logits, chain.model(**images).logits)
    with pytest.raises(ChainError, match="and the store 7 positions of"):
        chain.padding.fit_features(torch.randn(3, 7, layout.channels), images, cut)
