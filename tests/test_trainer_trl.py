"""Trainers of TRL behind the mixin, on tiny causal models whose blocks are found. Skipped without TRL."""

from __future__ import annotations

import random

import datasets
import pytest
import torch
from support.helpers import losses, manual, messages
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from hf_freezecache import FreezeCacheMixin

trl = pytest.importorskip("trl")

WORDS = [f"w{number}" for number in range(50)]
VOCABULARY = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
#: What is logged of time, and of FLOPs, of which a replay takes fewer.
UNEQUAL = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}


class SFT(FreezeCacheMixin, trl.SFTTrainer):
    config = trl.SFTConfig


class Reward(FreezeCacheMixin, trl.RewardTrainer):
    config = trl.RewardConfig


class DPO(FreezeCacheMixin, trl.DPOTrainer):
    config = trl.DPOConfig


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def llama(kind=LlamaForCausalLM, **settings):
    """4 layers with dropout in attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        attention_dropout=0.1,
        **settings,
    )
    return kind(config)


def texts(lengths, rows=16, seed=0):
    """Rows of random words of these lengths in turn."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=lengths[row % len(lengths)])) for row in range(rows)]


def train(kind, folder, config, data, model=None, settings=None, **own):
    args = kind.config(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=3,
        dataloader_pin_memory=False,
        **{"max_length": 32, **(settings or {})},
    )
    trainer = kind(
        model=llama() if model is None else model,
        args=args,
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=tokenizer(),
        freeze_cache=config,
        **own,
    )
    trainer.train()
    return trainer


def logged(trainer):
    return [
        {name: value for name, value in entry.items() if name not in UNEQUAL} for entry in trainer.state.log_history
    ]


def test_sft_on_rows_of_several_lengths_is_right(tmp_path):
    """A build may pad to other widths than the training: equal up to the noise of kernels."""
    data = {"text": texts([6, 7, 8, 9, 10])}
    frozen = train(SFT, tmp_path / "frozen", manual("1:2", cache="never"), data)
    cached = train(SFT, tmp_path / "cached", manual("1:2", codec="fp32"), data)
    assert cached.freeze_status().replaying
    assert losses(cached) == pytest.approx(losses(frozen), rel=1e-5)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_sft_on_rows_of_one_length_is_right_without_naming_blocks(with_adapters, tmp_path):
    trained = {}
    for cache in ("never", "always"):
        own = {}
        if with_adapters:
            peft = pytest.importorskip("peft")
            own["peft_config"] = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        config = manual("1:2", cache=cache, codec="fp32")
        torch.manual_seed(0)
        trained[cache] = train(SFT, tmp_path / cache, config, {"text": texts([10])}, **own)
    assert trained["always"].freeze_status().replaying
    assert logged(trained["always"]) == logged(trained["never"]) and len(losses(trained["never"])) == 12
    assert {"entropy", "mean_token_accuracy"} <= logged(trained["never"])[0].keys()


def test_sft_that_packs_is_refused_and_trains_under_the_defaults(tmp_path, caplog):
    data, settings = {"text": texts([6, 9])}, {"packing": True, "max_length": 16}
    with pytest.raises(ValueError, match="'cu_seq_lens_q' is neither one value per sample nor a plain constant"):
        train(SFT, tmp_path / "explicit", manual("1:2"), data, settings=settings)
    ours = train(SFT, tmp_path / "ours", None, data, settings=settings)
    assert ours.freeze_status().cut == 0 and "this is plain training" in messages(caplog)


@pytest.mark.parametrize("kind", [Reward, DPO])
def test_pairs_are_refused_a_cache_and_frozen_without_one(kind, tmp_path):
    """The collator makes two rows of a sample."""
    data = {"chosen": texts([10]), "rejected": texts([10], seed=1)}
    own = {}
    if kind is DPO:
        data["prompt"] = texts([5], seed=2)
        own["ref_model"] = llama()

    def model():
        return llama(LlamaForSequenceClassification, num_labels=1) if kind is Reward else llama()

    with pytest.raises(ValueError, match="the collator returns 8 rows for 4 samples"):
        train(kind, tmp_path / "always", manual("1:2"), data, model(), **own)
    ours = train(kind, tmp_path / "auto", manual("1:2", cache="auto"), data, model(), **own)
    assert ours.freeze_status().cut == 2 and not ours.freeze_status().replaying
