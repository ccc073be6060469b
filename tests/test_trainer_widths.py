"""Samples of several widths whose padding counts: stored as wide as the widest, and trimmed to each batch."""

import pytest
import torch
from support.helpers import assert_same_weights, losses, make_args, manual, messages, run, weights
from support.pretrained import settle
from support.sounds import CUT_IN_LAYERS, PadSounds, Sounds, wav2vec2, wav2vec2_of_groups, wav2vec2_of_letters
from support.token_rows import Pad, Texts, bert, bert_of_questions, gpt2, xlnet
from transformers import (
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    RobertaConfig,
    RobertaForQuestionAnswering,
    TrainerCallback,
)

from hf_freezecache import FeatureStore, FreezeCacheConfig, plan
from hf_freezecache.cache.names import CHECKSUM

_TINY = dict(vocab_size=64, num_labels=2, pad_token_id=0)


def roberta_of_questions():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    return RobertaForQuestionAnswering(RobertaConfig(**_TINY, **sizes, max_position_embeddings=64))


def distilbert_of_questions():
    torch.manual_seed(0)
    config = DistilBertConfig(**_TINY, dim=32, n_layers=4, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    return DistilBertForQuestionAnswering(config)


class FullBatches(Texts):
    """Every other text is as long as the longest: batches have one width, though nothing pads them to it."""

    def __init__(self, label: str):
        super().__init__(32, 13, 13, label)
        others = Texts(32, 4, 12, label)
        self.rows = [self.rows[row] if row % 2 else others.rows[row] for row in range(32)]


def cached(points="1:3", **settings):
    return manual(points, codec="fp32", on_mismatch="error", **settings)


def train(make, samples, folder, config, collator, **settings):
    settings = {"remove_unused_columns": False, "num_train_epochs": 3, **settings}
    return run(make(), samples, folder, config, data_collator=collator, **settings)


def store_of(folder) -> FeatureStore:
    (path,) = [path.parent for path in folder.rglob("manifest.json")]
    return FeatureStore.open(path)


TEXTS = [
    (bert_of_questions, "span", "right"),
    (distilbert_of_questions, "span", "right"),
    (roberta_of_questions, "span", "right"),
    (xlnet, "class", "right"),
    (xlnet, "class", "left"),
]


@pytest.mark.parametrize(("make", "label", "side"), TEXTS)
def test_texts_whose_padding_counts_are_trimmed_to_the_width_of_a_batch(make, label, side, tmp_path):
    """A build runs batches as wide as the widest: kernels for other widths may round otherwise."""
    texts = Texts(label=label)
    frozen = train(make, texts, tmp_path / "frozen", manual("1:3", cache="never"), Pad(side))
    trained = train(make, texts, tmp_path / "cached", cached(), Pad(side))
    assert trained.freeze_status().replaying
    assert losses(trained) == pytest.approx(losses(frozen), abs=2e-4)
    store = store_of(tmp_path / "cached")
    assert store.codec.layout.is_trimmed and store.codec.layout.shape == (13, 32)
    assert store.manifest.inputs.keys() == {CHECKSUM}


@pytest.mark.parametrize(("make", "label", "side"), TEXTS)
def test_training_is_the_frozen_one_bit_for_bit_where_batches_are_as_wide_as_the_widest(make, label, side, tmp_path):
    texts = FullBatches(label)
    settings = dict(train_sampling_strategy="sequential")
    frozen = train(make, texts, tmp_path / "frozen", manual("1:3", cache="never"), Pad(side), **settings)
    trained = train(make, texts, tmp_path / "cached", cached(), Pad(side), **settings)
    assert store_of(tmp_path / "cached").codec.layout.is_trimmed
    assert losses(trained) == losses(frozen)
    assert_same_weights(weights(trained), weights(frozen))


@pytest.mark.parametrize(
    "settings",
    [
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_accumulation_steps": 2},
        {"include_num_input_tokens_seen": "all"},
    ],
    ids=["workers", "by length", "accumulated", "counted"],
)
def test_ways_to_train_on_trimmed_features(settings, tmp_path):
    texts = Texts(label="span")
    frozen = train(bert_of_questions, texts, tmp_path / "a", manual("1:3", cache="never"), Pad(), **settings)
    trained = train(bert_of_questions, texts, tmp_path / "b", cached(), Pad(), **settings)
    assert trained.freeze_status().replaying
    assert losses(trained) == pytest.approx(losses(frozen), abs=2e-4)
    assert trained.state.num_input_tokens_seen == frozen.state.num_input_tokens_seen


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4", "mixed"])
@pytest.mark.parametrize("lossless", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_codecs_of_trimmed_features(codec, lossless, tmp_path):
    frozen = train(bert_of_questions, Texts(label="span"), tmp_path / "a", manual("1:3", cache="never"), Pad())
    config = manual("1:3", codec=codec, lossless=lossless, on_mismatch="error")
    trained = train(bert_of_questions, Texts(label="span"), tmp_path / "b", config, Pad())
    assert trained.freeze_status().replaying
    assert losses(trained) == pytest.approx(losses(frozen), abs=0.03)


@CUT_IN_LAYERS
@pytest.mark.parametrize(
    ("make", "letters", "points"),
    [(wav2vec2, False, "1:4"), (wav2vec2, False, "1:6"), (wav2vec2_of_letters, True, "1:5")],
)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sounds_of_several_lengths_are_trimmed(make, letters, points, workers, tmp_path):
    """Their positions follow from their lengths by the strides of convolutions."""
    sounds, settings = Sounds(letters=letters), dict(per_device_train_batch_size=4, dataloader_num_workers=workers)
    frozen = train(make, sounds, tmp_path / "frozen", manual(points, cache="never"), PadSounds(), **settings)
    trained = train(make, sounds, tmp_path / "cached", cached(points), PadSounds(), **settings)
    assert trained.freeze_status().replaying
    assert losses(trained) == pytest.approx(losses(frozen), rel=1e-5)
    longest = max(len(row["input_values"]) for row in sounds.rows)
    assert store_of(tmp_path / "cached").codec.layout.shape == (((longest - 5) // 3 + 1 - 3) // 2 + 1, 32)


@CUT_IN_LAYERS
@pytest.mark.parametrize(
    ("make", "collator"),
    [
        (wav2vec2_of_groups, PadSounds(masks=False)),  # numbers are normalized over the length of a batch
        (wav2vec2, PadSounds(masks=False)),  # attention reads padding
        (wav2vec2, PadSounds(side="left")),  # strides count from the left
    ],
    ids=["groups", "no mask", "left"],
)
def test_sounds_whose_features_the_width_reaches_are_refused_before_the_first_step(make, collator, tmp_path, caplog):
    why = "the width of a batch changes them"
    with pytest.raises(ValueError, match=rf"samples have no common width.*{why}"):
        train(make, Sounds(), tmp_path / "always", cached("1:4"), collator)
    caplog.set_level("WARNING")
    trained = train(lambda: settle(make()), Sounds(), tmp_path / "auto", manual("1:4", cache="auto"), collator)
    assert trained.freeze_status().cut == 4 and not trained.freeze_status().replaying


def test_vectors_that_have_no_width_are_stored_as_they_are(tmp_path):
    """The pooler's output is one vector for each text, not for each token: there is nothing to trim."""
    blocks = ["bert.embeddings", "bert.encoder.layer.0", "bert.pooler"]
    frozen = train(bert, Texts(), tmp_path / "frozen", manual("1:3", cache="never", blocks=blocks), Pad())
    trained = train(bert, Texts(), tmp_path / "cached", cached(blocks=blocks), Pad())
    assert store_of(tmp_path / "cached").codec.layout.shape == (32,)
    assert losses(trained) == pytest.approx(losses(frozen), abs=2e-4)


class Changing:
    """One sample is another one from some time on, of the same width.

    Args:
        samples: the data set.
        name: of the entry that changes.
    """

    def __init__(self, samples, name):
        self.samples, self.name, self.is_changed = samples, name, False

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        sample = self.samples[row]
        if self.is_changed and row == 5:
            sample[self.name] = sample[self.name][::-1] if isinstance(sample[self.name], list) else -sample[self.name]
        return sample


@pytest.mark.parametrize(
    ("make", "samples", "name", "collator"),
    [
        (bert_of_questions, Texts(label="span"), "input_ids", Pad()),
        (wav2vec2, Sounds(), "input_values", PadSounds()),
    ],
    ids=["texts", "sounds"],
)
def test_a_sample_that_changes_is_seen_and_runs_as_it_is(make, samples, name, collator, tmp_path, caplog):
    changing = Changing(samples, name)

    class Change(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            changing.is_changed |= state.global_step == state.max_steps // 3  # the first replayed batch is there

    def trained(folder, config):
        changing.is_changed = False
        settings = dict(callbacks=[Change()], per_device_train_batch_size=2)
        return train(make, changing, tmp_path / folder, config, collator, **settings)

    frozen = trained("frozen", manual("1:3", cache="never"))
    found = trained("cached", manual("1:3", codec="fp32"))
    assert losses(found) == pytest.approx(losses(frozen), abs=2e-4)
    assert "are others than when the feature store was built" in messages(caplog)


def test_padding_that_changes_its_side_within_an_epoch_is_seen(tmp_path, caplog):
    class Turn(TrainerCallback):
        def __init__(self, collator):
            self.collator = collator

        def on_step_begin(self, args, state, control, **kwargs):
            self.collator.side = "left" if state.global_step >= 5 else "right"

    def trained(folder, config):
        collator = Pad()
        return train(xlnet, Texts(), tmp_path / folder, config, collator, callbacks=[Turn(collator)])

    frozen = trained("frozen", manual("1:3", cache="never"))
    found = trained("cached", manual("1:3", codec="fp32"))
    assert losses(found) == pytest.approx(losses(frozen), abs=2e-4)
    assert "the side of their padding are others" in messages(caplog)


class Louder(Sounds):
    """Sounds that are drawn louder or quieter."""

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        return {**sample, "input_values": sample["input_values"] * (1 + torch.rand(()))}


def test_sounds_drawn_at_random_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="numbers of a sample, or what .* are drawn at random|cannot be told how"):
        train(wav2vec2, Louder(), tmp_path, cached("1:4"), PadSounds())


class FillsAtRandom(PadSounds):
    """Pads with noise."""

    def _pad(self, sound, width):
        return torch.cat([sound, torch.randn(width - len(sound)).to(sound)])


def test_padding_of_several_values_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="cannot be told how the collator pads 'input_values'"):
        train(wav2vec2, Sounds(), tmp_path, cached("1:4"), FillsAtRandom(masks=False))


@pytest.mark.parametrize(
    ("make", "samples", "collator", "points"),
    [
        (bert_of_questions, Texts(label="span"), Pad(), "1:3"),
        pytest.param(wav2vec2, Sounds(), PadSounds(), "1:4", marks=[pytest.mark.slow, CUT_IN_LAYERS]),
    ],
    ids=["texts", "sounds"],
)
class TestStores:
    def test_a_resumed_training_is_the_uninterrupted_one(self, make, samples, collator, points, tmp_path):
        settings = dict(save_strategy="epoch", eval_dataset=samples, eval_strategy="epoch")
        whole = train(make, samples, tmp_path / "run", cached(points), collator, **settings)
        steps = whole.state.global_step // 3
        checkpoint = str(tmp_path / "run" / f"checkpoint-{2 * steps}")
        resumed = train(make, samples, tmp_path / "run", cached(points), collator, resume=checkpoint, **settings)
        assert resumed.freeze_status().replaying
        assert losses(resumed)[-steps:] == losses(whole)[-steps:]
        assert_same_weights(weights(resumed), weights(whole))

    def test_stores_are_reused_by_trainings_on_the_same_samples(
        self, make, samples, collator, points, tmp_path, caplog
    ):
        changing = Changing(samples, "input_values" if make is wav2vec2 else "input_ids")
        config = cached(points.replace("1:", "0:"), feature_cache_dir=str(tmp_path / "stores"))
        for name, is_changed in (("first", False), ("second", False), ("third", True)):
            changing.is_changed = is_changed
            caplog.clear()
            train(make, changing, tmp_path / name, config, collator, num_train_epochs=1)
            assert ("Reusing the feature store" in messages(caplog)) == (name == "second")

    def test_evaluations_run_on_samples(self, make, samples, collator, points, tmp_path, caplog):
        caplog.set_level("WARNING")
        settings = dict(eval_dataset=samples, eval_strategy="epoch")
        frozen = train(make, samples, tmp_path / "a", manual(points, cache="never"), collator, **settings)
        trained = train(make, samples, tmp_path / "b", cached(points, cache_eval=True), collator, **settings)
        found, expected = (
            [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
            for trainer in (trained, frozen)
        )
        assert trained.freeze_status().replaying and found == pytest.approx(expected, abs=2e-4)
        assert "evaluations run on samples" in messages(caplog)

    def test_planned_bytes_are_those_of_the_store(self, make, samples, collator, points, tmp_path):
        args, config = make_args(tmp_path / "plan", remove_unused_columns=False), manual(points, codec="int8")
        cut = int(points[2:])
        [row] = plan(make(), samples, config, args=args, data_collator=collator, batches=1, cuts=[cut]).rows
        train(make, samples, tmp_path / "cached", config, collator)
        assert row.bytes == store_of(tmp_path / "cached").bytes

    def test_other_ways_to_make_a_store_fall_back_to_builds(self, make, samples, collator, points, tmp_path, caplog):
        caplog.set_level("WARNING")
        for setting, why in (
            ({"deepen": "cache"}, "several widths run again from their own inputs"),
            ({"materialize": "write_through"}, "these samples have several"),
        ):
            trained = train(make, samples, tmp_path / why[:5], cached(f"0:1,{points}", **setting), collator)
            assert trained.freeze_status().replaying
            assert why in messages(caplog)

    def test_defaults_decide_by_what_they_measure(self, make, samples, collator, points, tmp_path):
        trained = train(lambda: settle(make()), samples, tmp_path, None, collator, num_train_epochs=6)
        assert trained.freeze_status().cut


def test_several_cuts_are_stored_one_after_the_other(tmp_path):
    """Some of them lie where sounds have another number of positions."""
    points = "0:1,1:3,2:5"
    frozen = train(wav2vec2, Sounds(), tmp_path / "frozen", manual(points, cache="never"), PadSounds())
    trained = train(wav2vec2, Sounds(), tmp_path / "cached", cached(points), PadSounds())
    assert [phase.mode for phase in trained.freeze_cache_report().phases].count("replay") == 3
    assert losses(trained) == pytest.approx(losses(frozen), rel=1e-5)


def test_a_gpt2_padded_on_the_left_with_positions_of_its_own_needs_no_padding(tmp_path):
    class Positions(Pad):
        def __call__(self, samples):
            batch = super().__call__(samples)
            return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)}

    frozen = train(gpt2, Texts(), tmp_path / "frozen", manual("1:3", cache="never"), Positions("left"))
    trained = train(gpt2, Texts(), tmp_path / "cached", cached(), Positions("left"))
    assert trained.freeze_status().replaying
    assert losses(trained) == pytest.approx(losses(frozen), abs=2e-4)


def test_defaults_freeze_alone_where_features_cannot_be_trimmed(tmp_path, caplog):
    caplog.set_level("WARNING")
    trained = train(lambda: settle(gpt2()), Texts(), tmp_path, FreezeCacheConfig(), Pad("left"))
    assert trained.freeze_status().cut and not trained.freeze_status().replaying


class FeelsTheWidth(torch.nn.Module):
    """From some time on, it turns around what it gives where that is narrower than the widest."""

    is_on = False

    def __init__(self, inner, widest):
        super().__init__()
        self.inner, self.widest = inner, widest

    def forward(self, input_ids, *args, **kwargs):
        found = self.inner(input_ids, *args, **kwargs)
        return found.flip(-1) if self.is_on and input_ids.shape[1] < self.widest else found


def test_features_that_come_to_depend_on_the_width_are_seen_at_the_next_epoch(tmp_path, caplog):
    """Rows as wide as the widest, which the store holds, do not show it."""

    class TurnOn(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            FeelsTheWidth.is_on |= round(state.epoch) == 2

    def make():
        model = bert_of_questions()
        model.bert.embeddings.word_embeddings = FeelsTheWidth(model.bert.embeddings.word_embeddings, 13)
        return model

    def trained(folder, config):
        FeelsTheWidth.is_on = False
        return train(make, Texts(label="span"), tmp_path / folder, config, Pad(), callbacks=[TurnOn()])

    frozen = trained("frozen", manual("1:3", cache="never"))
    found = trained("cached", manual("1:3", codec="fp32"))
    assert losses(found) == pytest.approx(losses(frozen), abs=2e-4)
    assert "the width of a batch changes them" in messages(caplog) and not found.freeze_status().replaying


@pytest.mark.parametrize("letters", [False, True], ids=["a vector of a sound", "one of each position"])
def test_a_head_start_takes_sounds_of_several_lengths(letters, tmp_path, caplog):
    """Also where what the head gets has a vector for each position, and so another shape in each batch."""
    caplog.set_level("INFO", logger="hf_freezecache")
    make = wav2vec2_of_letters if letters else wav2vec2
    config = cached("1:2", head_start_epochs=2, head_start_lr=0.01)
    head = "lm_head" if letters else "classifier"
    trained = train(lambda: settle(make(), head), Sounds(letters=letters), tmp_path, config, PadSounds())
    [phase] = [phase for phase in trained.freeze_cache_report().phases if phase.mode == "head_start"]
    assert phase.steps == 6 and f"{head}.weight, {head}.bias trained alone on features of 24 samples" in caplog.text
