"""Transformers' examples for texts (`run_glue`, `run_ner`, `run_qa`, `run_swag`, `run_clm`, SFT), one class switched.

Rows have lengths of their own and their collator pads each batch. Cached training in full precision is compared with
the same freezing without a cache: losses and weights, bit for bit.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.texts import sentences, tiny_bert, tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer

ROWS = 20


@dataclass(frozen=True)
class Example:
    """A script of Transformers' examples.

    Args:
        model: makes the model of a folder.
        rows: as the script's preprocessing leaves them.
        collator: makes the collator of a tokenizer.
        causal: whether the folder holds a Llama, else a BERT.
        settings: of `TrainingArguments`.
    """

    model: Any
    rows: Any
    collator: Any
    causal: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def tokens(tokenizer):
    return tokenizer(sentences(ROWS))["input_ids"]


def as_rows(ids, **columns):
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], **columns})


def classified(tokenizer):
    return as_rows(tokens(tokenizer), label=[row % 2 for row in range(ROWS)])


def tagged(tokenizer):
    ids = tokens(tokenizer)
    return as_rows(ids, labels=[[-100, *(token % 2 for token in row[1:-1]), -100] for row in ids])


def answered(tokenizer):
    ids = tokens(tokenizer)
    ends = [len(row) - 2 for row in ids]
    return as_rows(ids, start_positions=[1] * ROWS, end_positions=ends)


def chosen(tokenizer):
    texts = sentences(2 * ROWS)
    ids = [tokenizer([texts[row], texts[2 * row]])["input_ids"] for row in range(ROWS)]
    mask = [[[1] * len(choice) for choice in row] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": mask, "label": [row % 2 for row in range(ROWS)]})


def written(tokenizer):
    return as_rows(tokens(tokenizer))


def prompted(tokenizer):
    ids = tokens(tokenizer)
    return as_rows(ids, labels=[[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids])


def causal_collator(tokenizer):
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def left(tokenizer):
    tokenizer.padding_side = "left"
    return DataCollatorForSeq2Seq(tokenizer)


def of_eight(tokenizer):
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)


GLUE = (AutoModelForSequenceClassification.from_pretrained, classified, DataCollatorWithPadding)
SFT = (AutoModelForCausalLM.from_pretrained, prompted, DataCollatorForSeq2Seq, True)
QA = (AutoModelForQuestionAnswering.from_pretrained, answered, DataCollatorWithPadding)
EXAMPLES = {
    "run_glue": Example(*GLUE),
    "run_glue grouped by length": Example(*GLUE, settings={"train_sampling_strategy": "group_by_length"}),
    "run_glue padded to eights": Example(*GLUE[:2], of_eight),
    "run_glue with loader processes": Example(*GLUE, settings={"dataloader_num_workers": 2}),
    "run_glue smoothed": Example(*GLUE, settings={"label_smoothing_factor": 0.1}),
    "run_ner": Example(AutoModelForTokenClassification.from_pretrained, tagged, DataCollatorForTokenClassification),
    "run_qa": Example(*QA),
    "run_qa grouped by length": Example(*QA, settings={"train_sampling_strategy": "group_by_length"}),
    # Not by Adam, which makes steps of gradients that are nothing but noise: those of what is added to all scores.
    "run_qa padded to eights": Example(*QA[:2], of_eight, settings={"optim": "sgd"}),
    "run_qa with loader processes": Example(*QA, settings={"dataloader_num_workers": 2}),
    "run_swag": Example(AutoModelForMultipleChoice.from_pretrained, chosen, DataCollatorForMultipleChoice),
    "run_clm": Example(AutoModelForCausalLM.from_pretrained, written, causal_collator, True),
    "sft": Example(*SFT),
    "sft padded on the left": Example(*SFT[:2], left, True),
    "sft accumulated": Example(*SFT, settings={"gradient_accumulation_steps": 3}),
}
#: Padding of other widths than a build's changes the last bits of the features here.
NOISE = {"run_glue padded to eights", "run_qa padded to eights", "sft padded on the left"}


def train(example, trainer_class, folder, **extra):
    """Trains and returns the trainer, the losses and the weights."""
    model = (tiny_llama if example.causal else tiny_bert)(folder / "model")
    tokenizer = tiny_tokenizer()
    set_seed(0)
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **example.settings,
    )
    trainer = trainer_class(
        model=example.model(model, ignore_mismatched_sizes=True),
        args=args,
        train_dataset=example.rows(tokenizer),
        data_collator=example.collator(tokenizer),
        **extra,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses, trainer.model.state_dict()


def assert_equal(expected, got, noise=0.0):
    torch.testing.assert_close(got[1:], expected[1:], rtol=noise, atol=noise)


def config(cache):
    return FreezeCacheConfig(policy="manual", freeze_points="1:3", cache=cache, codec="fp32")


@pytest.mark.parametrize("name", EXAMPLES)
def test_cached_training_of_an_example_is_the_frozen_one(name, tmp_path):
    expected = train(EXAMPLES[name], FreezeCacheTrainer, tmp_path / "never", freeze_cache=config("never"))
    got = train(EXAMPLES[name], FreezeCacheTrainer, tmp_path / "always", freeze_cache=config("always"))
    assert_equal(expected, got, noise=1e-5 if name in NOISE else 0.0)
    phases = {phase.mode: phase.epochs for phase in got[0].freeze_cache_report().phases}
    assert phases["replay"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_switched_class_trains_an_example_as_trainer(name, tmp_path):
    expected = train(EXAMPLES[name], Trainer, tmp_path / "trainer")
    none = FreezeCacheConfig(policy="none")
    assert_equal(expected, train(EXAMPLES[name], FreezeCacheTrainer, tmp_path / "switched", freeze_cache=none))
    never = train(
        EXAMPLES[name], FreezeCacheTrainer, tmp_path / "never", freeze_cache=FreezeCacheConfig(cache="never")
    )
    assert_equal(never, train(EXAMPLES[name], FreezeCacheTrainer, tmp_path / "defaults"))
