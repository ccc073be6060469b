"""Texts of differing length: stored without padding, and padded at replay by the user's own collator."""

import pytest
import torch
from support.helpers import assert_same_weights, losses, make_args, manual, messages, run, weights
from support.pretrained import settle
from support.token_rows import (
    Choices,
    Pad,
    PadChoices,
    Texts,
    bart,
    bert,
    bert_of_choices,
    bert_of_questions,
    bert_of_tokens,
    gpt2,
    llama,
    xlnet,
)

from hf_freezecache import BlockChain, FeatureStore, FreezeCacheConfig, FreezeCacheTrainer, plan
from hf_freezecache.cache.names import CHECKSUM, TOKENS


def train(make, texts, folder, config, collator=None, **settings):
    settings = {"remove_unused_columns": False, "num_train_epochs": 3, **settings}
    return run(make(), texts, folder, config, data_collator=collator or Pad(), **settings)


def cached(points="1:3", **settings):
    return manual(points, codec="fp32", on_mismatch="error", **settings)


def store_of(folder) -> FeatureStore:
    (path,) = [path.parent for path in folder.rglob("manifest.json")]
    return FeatureStore.open(path)


@pytest.mark.parametrize(
    ("make", "label"),
    [(bert, "class"), (bert_of_tokens, "tokens"), (gpt2, "class"), (llama, "next")],
)
def test_training_on_features_is_the_frozen_one_where_batches_have_one_width(make, label, tmp_path):
    """Some rows are padded, to the width of all batches: then it is the same bit for bit."""
    texts, collator = Texts(label=label), Pad(width=13)
    frozen = train(make, texts, tmp_path / "frozen", manual("1:3", cache="never"), collator)
    trained = train(make, texts, tmp_path / "cached", cached(), collator)
    assert trained.freeze_status().replaying
    assert losses(trained) == losses(frozen)
    assert_same_weights(weights(trained), weights(frozen))
    store = store_of(tmp_path / "cached")
    lengths = [len(row["input_ids"]) for row in texts.rows]
    assert store.codec.layout.is_token and store.manifest.inputs.keys() == {TOKENS, CHECKSUM}
    assert store.read_rows(range(len(texts)))["base"].shape == (sum(lengths), 32 * 4)


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dataloader_num_workers": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_accumulation_steps": 2},
    ],
    ids=["alone", "workers", "by length", "accumulated"],
)
def test_training_on_features_is_close_to_the_frozen_one_where_batches_are_padded_to_their_longest(
    make, settings, tmp_path
):
    """A build runs in other company: kernels for batches of other widths round otherwise."""
    texts = Texts(label="next" if make is llama else "class")
    frozen = train(make, texts, tmp_path / "frozen", manual("1:3", cache="never"), **settings)
    trained = train(make, texts, tmp_path / "cached", cached(), **settings)
    assert trained.freeze_status().replaying
    assert losses(trained) == pytest.approx(losses(frozen), abs=2e-4)


@pytest.mark.parametrize("width", [13, None], ids=["one width", "to the longest"])
def test_choices_are_stored_without_the_padding_of_their_texts(width, tmp_path):
    questions, collator = Choices(), PadChoices(width=width)
    frozen = train(bert_of_choices, questions, tmp_path / "frozen", manual("1:3", cache="never"), collator)
    trained = train(bert_of_choices, questions, tmp_path / "cached", cached(), collator)
    assert trained.freeze_status().replaying
    assert losses(trained) == (losses(frozen) if width else pytest.approx(losses(frozen), abs=2e-4))
    store = store_of(tmp_path / "cached")
    tokens = sum(len(text) for row in questions.rows for text in row["input_ids"])
    assert store.read_rows(range(len(questions)))["base"].shape == (tokens, 32 * 4)


def test_a_question_of_another_number_of_choices_is_never_cached(tmp_path):
    """One at a time they can be collated; what crosses a cut then has another number of rows for each sample."""
    questions = Choices(8)
    lengths = [sum(map(len, row["input_ids"])) for row in questions.rows]
    middle = sorted(range(8), key=lengths.__getitem__)[4]  # not one of those that the model is looked at with
    questions.rows[middle] |= {"input_ids": [*questions.rows[middle]["input_ids"], [1, 2]]}
    settings = dict(per_device_train_batch_size=1, num_train_epochs=2, collator=PadChoices())
    with pytest.raises((RuntimeError, ValueError), match="texts each|sizes"):
        train(bert_of_choices, questions, tmp_path / "always", cached(cache="always"), **settings)
    trained = train(lambda: settle(bert_of_choices()), questions, tmp_path / "defaults", None, **settings)
    assert trained.state.global_step == 16 and not trained.freeze_status().replaying


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4", "mixed"])
@pytest.mark.parametrize("lossless", [False, True])
def test_codecs_of_tokens(codec, lossless, tmp_path):
    frozen = train(bert, Texts(), tmp_path / "frozen", manual("1:3", cache="never"))
    config = manual("1:3", codec=codec, lossless=lossless, on_mismatch="error")
    trained = train(bert, Texts(), tmp_path / "cached", config)
    assert trained.freeze_status().replaying
    assert losses(trained) == pytest.approx(losses(frozen), abs=0.03)


def test_texts_padded_on_the_left_are_replayed_where_padding_there_changes_nothing(tmp_path):
    texts = Texts(label="next")
    frozen = train(llama, texts, tmp_path / "frozen", manual("1:3", cache="never"), Pad("left"))
    trained = train(llama, texts, tmp_path / "cached", cached(), Pad("left"))
    assert trained.freeze_status().replaying and store_of(tmp_path / "cached").codec.layout.is_token
    assert losses(trained) == pytest.approx(losses(frozen), abs=2e-4)


@pytest.mark.parametrize(
    ("make", "label", "side"),
    [(gpt2, "class", "left"), (xlnet, "class", "right"), (bert_of_questions, "span", "right")],
)
def test_where_padding_counts_it_is_stored_too(make, label, side, tmp_path):
    texts, collator = Texts(label=label), Pad(side, width=13)
    frozen = train(make, texts, tmp_path / "frozen", manual("1:3", cache="never"), collator)
    trained = train(make, texts, tmp_path / "cached", cached(), collator)
    assert trained.freeze_status().replaying
    assert losses(trained) == losses(frozen)
    assert store_of(tmp_path / "cached").codec.layout.shape == (13, 32)


def test_where_padding_counts_and_the_width_reaches_the_features_the_training_is_refused_before_its_first_step(
    tmp_path, caplog
):
    """GPT-2's positions are counted from the left of a batch, padding included."""
    with pytest.raises(
        ValueError, match=r"(?s)padded on the left.*the width of a batch changes.*padding='max_length'"
    ):
        train(gpt2, Texts(), tmp_path / "cached", cached(), Pad("left"))
    caplog.set_level("WARNING")
    config = FreezeCacheConfig(policy="manual", freeze_points="1:3", cache="never")
    frozen = train(gpt2, Texts(), tmp_path / "frozen", config, Pad("left"))
    assert losses(frozen)


def test_encoders_of_sequence_to_sequence_models_whose_labels_have_a_width_of_their_own(tmp_path):
    texts = Texts(label="summary")
    frozen = train(bart, texts, tmp_path / "frozen", manual("1:2", cache="never"))
    trained = train(bart, texts, tmp_path / "cached", cached("1:2"))
    assert trained.freeze_status().replaying and store_of(tmp_path / "cached").codec.layout.is_token
    assert losses(trained) == pytest.approx(losses(frozen), abs=2e-4)


def test_frozen_blocks_that_read_the_labels_are_refused_before_the_first_step(tmp_path):
    """Here most labels are the text, which the decoder gets where there are none."""
    texts = Texts(label="next")
    texts.rows[5]["labels"] = [*texts.rows[5]["labels"][:-2], 7, 2]
    blocks = len(BlockChain.from_model(bart(), probe=Pad()([*Texts(4, label="next")])))
    with pytest.raises(ValueError, match="read the labels"):
        train(bart, texts, tmp_path, cached(f"1:{blocks}"))


class Positions(Pad):
    """Returns positions for all rows at once, and an entry that no block reads."""

    def __call__(self, samples):
        batch = super().__call__(samples)
        width = batch["input_ids"].shape[1]
        return {**batch, "position_ids": torch.arange(width)[None]}


def test_positions_of_all_rows_at_once(tmp_path):
    frozen = train(bert, Texts(), tmp_path / "frozen", manual("1:3", cache="never"), Positions())
    trained = train(bert, Texts(), tmp_path / "cached", cached(), Positions())
    assert trained.freeze_status().replaying
    assert losses(trained) == pytest.approx(losses(frozen), abs=2e-4)


class TypedTexts(Texts):
    """Token types that are drawn for one text in eight."""

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        length = len(sample["input_ids"])
        drawn = int(torch.randint(2, ())) if row % 8 == 3 else 0
        return {**sample, "token_type_ids": [drawn] * length}


class PadTypes(Pad):
    def __call__(self, samples):
        types = [{"input_ids": sample.pop("token_type_ids")} for sample in samples]
        return {**super().__call__(samples), "token_type_ids": super().__call__(types)["input_ids"]}


def test_what_the_frozen_blocks_read_beside_tokens_must_not_be_random_either(tmp_path):
    with pytest.raises(ValueError, match="or what the frozen blocks read beside them, are drawn at random"):
        train(bert, TypedTexts(), tmp_path, cached(), PadTypes())


class AddsTypes(FreezeCacheTrainer):
    """What the embeddings read is added behind the collator."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        types = torch.zeros_like(inputs["input_ids"]) if "input_ids" in inputs else None
        return inputs if types is None else {**inputs, "token_type_ids": types}


@pytest.mark.parametrize(
    "config", [None, manual("1:3", cache="auto"), manual("1:3")], ids=["defaults", "auto", "always"]
)
def test_what_the_frozen_blocks_read_must_be_in_the_batch(config, tmp_path, caplog):
    args = make_args(tmp_path, remove_unused_columns=False, num_train_epochs=3)
    trainer = AddsTypes(settle(bert()), args, train_dataset=Texts(), data_collator=Pad(), freeze_cache=config)
    why = "the frozen blocks read 'token_type_ids', which the collator does not return"
    if config is not None and config.cache == "always":
        with pytest.raises(ValueError, match=why):
            trainer.train()
        assert trainer.state.global_step == 0
        return
    trainer.train()
    status = trainer.freeze_status()
    assert status.cut and not status.replaying and why in messages(caplog)


class TurnsLeft(Pad):
    """Pads on the left from some time on, as a tokenizer does that was used to generate text meanwhile."""

    def __call__(self, samples):
        self.side = "left" if self.is_turned else "right"
        return super().__call__(samples)

    is_turned = False


def test_padding_that_changes_its_side_within_an_epoch_is_seen(tmp_path, caplog):
    from transformers import TrainerCallback

    def trained(name, config):
        collator = TurnsLeft()

        class Turn(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                collator.is_turned |= state.global_step == 5

        return train(bert, Texts(), tmp_path / name, config, collator, callbacks=[Turn()])

    frozen = trained("frozen", manual("1:3", cache="never"))
    found = trained("cached", manual("1:3", codec="fp32"))
    assert losses(found) == pytest.approx(losses(frozen), abs=2e-4)
    assert "texts are padded on the left" in messages(caplog)


class Masks(Pad):
    """Replaces tokens at random, as for masked language models."""

    def __call__(self, samples):
        batch = super().__call__(samples)
        batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.3] = 3
        return batch


@pytest.mark.parametrize("width", [None, 13])
def test_tokens_drawn_at_random_are_refused_or_stored_as_they_are_drawn(width, tmp_path):
    if width is None:
        with pytest.raises(ValueError, match="tokens of a text, or what .* are drawn at random"):
            train(bert, Texts(), tmp_path, cached(), Masks())
        return
    trained = train(bert, Texts(), tmp_path, cached("1:3", views=1), Masks(width=width))
    assert trained.freeze_status().replaying and not store_of(tmp_path).codec.layout.is_token


class Changing(Texts):
    """One text is another one from some time on."""

    is_changed = False

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        if self.is_changed and row == 5:
            sample["input_ids"] = [1, 9, 9, 2]
        return sample


def test_a_text_that_changes_in_a_training_is_seen_and_runs_as_it_is(tmp_path, caplog):
    from transformers import TrainerCallback

    texts = Changing()

    class Change(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            texts.is_changed |= state.global_step == 5

    def trained(name, config):
        texts.is_changed = False
        return train(bert, texts, tmp_path / name, config, callbacks=[Change()])

    frozen = trained("frozen", manual("1:3", cache="never"))
    found = trained("cached", manual("1:3", codec="fp32"))
    assert losses(found) == pytest.approx(losses(frozen), abs=2e-4)
    assert "other tokens, or other inputs beside them, than when the feature store was built" in messages(caplog)


def test_stores_of_texts_are_reused_and_those_of_other_texts_are_not(tmp_path, caplog):
    texts, folder = Changing(), str(tmp_path / "stores")
    for name, is_changed in (("first", False), ("second", False), ("third", True)):
        texts.is_changed = is_changed
        caplog.clear()
        train(bert, texts, tmp_path / name, cached(points="0:3", feature_cache_dir=folder))
        assert ("Reusing the feature store" in messages(caplog)) == (name == "second")


def test_resumed_training_on_texts_is_the_uninterrupted_one(tmp_path):
    whole = train(bert, Texts(), tmp_path / "whole", cached(), save_strategy="epoch")
    resumed = train(bert, Texts(), tmp_path / "whole", cached(), resume=str(tmp_path / "whole" / "checkpoint-8"))
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    assert_same_weights(weights(resumed), weights(whole))


def test_evaluations_of_answers_for_each_position_run_on_texts(tmp_path, caplog):
    """A metric may read what is at padding, which no store holds."""
    caplog.set_level("WARNING")
    settings = dict(eval_dataset=Texts(12, label="tokens"), eval_strategy="epoch")
    train(bert_of_tokens, Texts(label="tokens"), tmp_path, cached(cache_eval=True), **settings)
    assert "the model answers for each position of a text, padding included" in messages(caplog)


def test_evaluations_of_texts_from_a_store(tmp_path):
    settings = dict(eval_dataset=Texts(12), eval_strategy="epoch")
    frozen = train(bert, Texts(), tmp_path / "frozen", manual("1:3", cache="never"), **settings)
    trained = train(bert, Texts(), tmp_path / "cached", cached(cache_eval=True), **settings)
    found, expected = (
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (trained, frozen)
    )
    assert found == pytest.approx(expected, abs=2e-3)
    assert any("_cached_" in name for entry in trained.state.log_history for name in entry)


def test_a_store_of_texts_keeps_to_its_budget(tmp_path, caplog):
    config = manual("1:3", codec="fp32", cache_budget="20 kB")
    trained = train(bert, Texts(), tmp_path, config)
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.arrow")]
    assert sum(sizes) < 20_000 and (sizes or not trained.freeze_status().replaying)


def test_plans_of_texts_leave_out_cuts_at_which_the_width_reaches_the_features(tmp_path):
    args = make_args(tmp_path, remove_unused_columns=False)
    config = FreezeCacheConfig(blocks=["transformer.wte", "transformer.h.0"])
    with pytest.raises(ValueError, match=r"the features at cut \d include padding.*the width of a batch changes them"):
        plan(gpt2(), Texts(), config, args=args, data_collator=Pad("left"), batches=1)


def test_planned_bytes_of_texts_are_those_of_the_store(tmp_path):
    texts = Texts(64)
    args = make_args(tmp_path / "plan", remove_unused_columns=False)
    config = manual("1:3", codec="int8")
    [row] = plan(bert(), texts, config, args=args, data_collator=Pad(), batches=1, cuts=[3]).rows
    train(bert, texts, tmp_path / "cached", config)
    assert row.bytes == pytest.approx(store_of(tmp_path / "cached").bytes, rel=0.02)
