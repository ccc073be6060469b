"""Models of tokens: the tokens stay in the batch in replay epochs, because heads look at them."""

import datasets
import numpy as np
import pytest
import torch
from support.helpers import CLASSES, assert_same_weights, losses, make_args, manual, weights
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_freezecache import BlockChain, FreezeCacheTrainer

BLOCKS = ["transformer.drop", "transformer.h.0", "transformer.h.1", "transformer.h.2"]


def tiny_gpt2():
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_positions=16, n_embd=32, n_layer=3, n_head=2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1)
    return GPT2ForSequenceClassification(GPT2Config(**sizes, **special, num_labels=CLASSES))


def texts(rows=32, length=12):
    """Padded on the right: the head must find each row's last token."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 50, (rows, length))
    for row, end in enumerate(generator.integers(4, length, rows)):
        tokens[row, end:] = 0
    columns = {"input_ids": tokens, "attention_mask": (tokens > 0).astype(int)}
    return datasets.Dataset.from_dict({**columns, "labels": generator.integers(0, CLASSES, rows)}).with_format("torch")


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_suffix_on_tokens_gives_loss_and_logits_of_the_whole_model(cut):
    model, batch = tiny_gpt2().eval(), texts()[:6]
    chain = BlockChain.from_model(model, blocks=BLOCKS, probe=batch)
    with torch.no_grad():
        whole, replayed = model(**batch), chain.suffix(chain.prefix(batch, cut), batch, cut)
    assert torch.equal(whole.loss, replayed.loss) and torch.equal(whole.logits, replayed.logits)


def train(path, cache, **settings):
    trainer = FreezeCacheTrainer(
        model=tiny_gpt2(),
        args=make_args(path),
        train_dataset=texts(),
        freeze_cache=manual("1:2,2:3", cache=cache, blocks=BLOCKS, **settings),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("settings", [{}, {"materialize": "write_through"}, {"deepen": "cache"}])
def test_replay_of_tokens_is_the_frozen_training(settings, tmp_path):
    never = train(tmp_path / "never", "never")
    cached = train(tmp_path / "cached", "always", codec="fp32", **settings)
    assert cached.freeze_status().replaying and losses(cached) == losses(never)
    assert_same_weights(weights(cached), weights(never))


def test_whether_it_pays_can_be_measured(tmp_path, caplog):
    train(tmp_path, "auto")
    assert "could not be measured" not in caplog.text


class Masks(FreezeCacheTrainer):
    """Changes the tokens of a batch, as masked language models do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        tokens = inputs["input_ids"].clone()
        tokens[:, 0] = 2
        return super().compute_loss(model, {**inputs, "input_ids": tokens}, *args, **kwargs)


def test_a_loss_that_changes_the_tokens_is_refused(tmp_path):
    trainer = Masks(
        model=tiny_gpt2(), args=make_args(tmp_path), train_dataset=texts(), freeze_cache=manual("1:2", blocks=BLOCKS)
    )
    with pytest.raises(ValueError, match="input_ids"):
        trainer.train()
