"""Hidden states of real texts at every cut: of MiniLM on BANKING77, and of the small causal language model.

Batches have one width, so that a model is traced once; what a codec gets are the vectors of real tokens alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_freezecache import BlockChain
from hf_freezecache.build.fisher import fisher_weights
from hf_freezecache.model.layout import FeatureLayout

from .._common import QUIET, REPOSITORY, silence
from .language_model import as_pieces, load_language_model, read_documents
from .sources import load_minilm, load_questions, tokenized

#: Kinds of tokens: the first of a text (CLS, BOS), its end (SEP, EOS), full stops and line breaks, all others.
FIRST, END, STOP, OTHER = range(4)
KINDS = ("first", "end", "stop", "other")
_FINE_TUNED_CUT = 5


@dataclass(frozen=True)
class Vectors:
    """Real tokens of some texts.

    Args:
        values: float32 `(N, C)`.
        kinds: int64 `(N,)`, of `KINDS`.

    Shapes: N tokens, C channels.
    """

    values: torch.Tensor
    kinds: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A model at a cut, with features of texts to fit codecs on and of others to measure codecs with.

    Args:
        model: `minilm` or `lm`.
        cut: frozen blocks.
        chain: of the model.
        fit: batches of model inputs.
        test: batches of other texts, labels included.
        kinds: kind of every token id, int64 `(vocabulary,)`.
        options: with `fisher_batches` and `seed`.
        planted: what the first tokens get more in two channels, in medians of all absolute values; taken off again
            behind the codec. Large language models have such activations by themselves.
    """

    model: str
    cut: int
    chain: BlockChain
    fit: list[dict[str, torch.Tensor]]
    test: list[dict[str, torch.Tensor]]
    kinds: torch.Tensor
    options: argparse.Namespace
    planted: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.model} cut {self.cut}" + (f", {self.planted:g} planted" if self.planted else "")

    @cached_property
    def fit_vectors(self) -> Vectors:
        return self.vectors(self.fit, self.features(self.fit))

    @cached_property
    def test_features(self) -> list[torch.Tensor]:
        return self.features(self.test)

    @cached_property
    def test_vectors(self) -> Vectors:
        return self.vectors(self.test, self.test_features)

    @property
    def layout(self) -> FeatureLayout:
        """Of one token."""
        return FeatureLayout((self.fit_vectors.values.shape[1],), None, 0, torch.float32)

    @cached_property
    def weights(self) -> torch.Tensor:
        """Fisher weights of the channels."""
        batches = [without_labels(batch) for batch in self.fit[: self.options.fisher_batches]]
        return fisher_weights(self.chain, self.cut, batches, self.options.seed)

    @cached_property
    def answers(self) -> list[torch.Tensor]:
        """Log probabilities of what the labels are compared with, on the features themselves, by batch."""
        return self.run_suffix(self.test_features)

    def features(self, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [self.chain.prefix(without_labels(batch), self.cut) for batch in batches]

    def vectors(self, batches: list[dict[str, torch.Tensor]], features: list[torch.Tensor]) -> Vectors:
        """The vectors of real tokens, and their kinds."""
        real = [batch["attention_mask"].bool() for batch in batches]
        kinds = torch.cat([self.kinds[batch["input_ids"]][mask] for batch, mask in zip(batches, real, strict=True)])
        values = torch.cat([part[mask] for part, mask in zip(features, real, strict=True)])
        return Vectors(values + self._plants(kinds), kinds)

    def _plants(self, kinds: torch.Tensor) -> torch.Tensor:
        """What is planted in the tokens of some kinds, `(N, C)`."""
        plants = torch.zeros(len(kinds), self.chain.layout(self.cut).channels)
        if self.planted:
            plants[kinds == FIRST, :2] = self.planted * self._unit
        return plants

    @cached_property
    def _unit(self) -> float:
        return float(torch.cat([part.flatten() for part in self.features(self.fit[:1])]).abs().median())

    def with_vectors(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The test features with other vectors of the real tokens, `(N, C)`."""
        values = values - self._plants(self.test_vectors.kinds)
        replaced, start = [], 0
        for batch, feature in zip(self.test, self.test_features, strict=True):
            real = batch["attention_mask"].bool()
            feature = feature.clone()
            feature[real] = values[start : start + int(real.sum())]
            start += int(real.sum())
            replaced.append(feature)
        return replaced

    def run_suffix(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Log probabilities by batch: of intents `(B, 77)`, or of the next tokens `(n, vocabulary)`."""
        with torch.no_grad():
            return [self._run_batch(*pair) for pair in zip(features, self.test, strict=True)]

    def _run_batch(self, features: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self.chain.suffix(features, without_labels(batch), self.cut)["logits"]
        return (logits if logits.ndim == 2 else logits[:, :-1][predicted(batch)]).double().log_softmax(-1)

    def targets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What `run_suffix` predicts of a batch: intents, or next tokens."""
        return batch["labels"] if self.model == "minilm" else batch["input_ids"][:, 1:][predicted(batch)]


def predicted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions whose next token is a real one, bool `(B, T - 1)`."""
    return batch["attention_mask"][:, 1:].bool()


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def make_cases(options: argparse.Namespace) -> Iterator[Case]:
    """Both models at every cut, one after the other."""
    for name, load in (("minilm", _load_minilm), ("lm", _load_lm)):
        if options.planted and name != "lm":
            continue
        model, kinds, fit, test = load(options)
        chain = BlockChain.from_model(model.eval(), probe=without_labels(fit[0]))
        for cut in range(1, len(chain) + 1):
            if not options.planted and (not options.cuts or cut in options.cuts):
                yield Case(name, cut, chain, fit, test, kinds, options)
        if name == "lm" and options.planted:
            yield Case(name, (len(chain) + 1) // 2, chain, fit, test, kinds, options, options.planted)


def _load_minilm(options: argparse.Namespace) -> tuple[PreTrainedModel, torch.Tensor, list, list]:
    folder = REPOSITORY / "outputs" / "benchmarks" / ("text-smoke" if options.smoke else "text") / "classifier"
    if not (folder / "config.json").exists():
        fine_tune(options, folder)
    model = BertForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    counts = {"train": options.fit_texts, "test": options.test_texts}
    batches = []
    for split, count in counts.items():
        texts = load_questions(options, split).shuffle(seed=options.seed).select(range(count))
        rows = list(tokenized(texts, tokenizer, options.width_of_questions))
        batches.append(as_batches(rows, tokenizer, options.width_of_questions, options.batch_size))
    return model, kinds_of_tokens(tokenizer, tokenizer.cls_token_id, tokenizer.sep_token_id), *batches


def fine_tune(options: argparse.Namespace, folder: Path) -> None:
    """Trains MiniLM's last two layers and its head on BANKING77, for a model whose answers mean something."""
    set_seed(options.seed)
    model, tokenizer = load_minilm(options)
    rows = load_questions(options, "train").shuffle(seed=options.seed)
    rows = tokenized(rows.select(range(options.fine_tuning_rows)), tokenizer)
    probe = dict(DataCollatorWithPadding(tokenizer)([rows[0], rows[1]]))
    BlockChain.from_model(model, probe=probe).freeze(_FINE_TUNED_CUT)
    args = TrainingArguments(
        output_dir=str(folder / "training"),
        num_train_epochs=options.fine_tuning_epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.fine_tuning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        seed=options.seed,
        train_sampling_strategy="group_by_length",
        **QUIET,
    )
    silence(
        Trainer(model=model, args=args, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    ).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load_lm(options: argparse.Namespace) -> tuple[PreTrainedModel, torch.Tensor, list, list]:
    model, tokenizer = load_language_model(options)
    train, test = read_documents(options)
    batches = []
    for documents, count in ((train, options.fit_texts // 2), (test, options.test_texts // 4)):
        pieces = as_pieces(documents, tokenizer, options.longest).shuffle(seed=options.seed)
        rows = [pieces[number] for number in range(min(count, len(pieces)))]
        batches.append(as_batches(rows, tokenizer, options.longest, options.batch_size // 2))
    return model, kinds_of_tokens(tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id), *batches


def as_batches(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, width: int, size: int
) -> list[dict[str, torch.Tensor]]:
    """Rows padded to one width, in batches of one size."""
    collator = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=width)
    return [dict(collator(rows[start : start + size])) for start in range(0, len(rows) - size + 1, size)]


def kinds_of_tokens(tokenizer: PreTrainedTokenizerBase, first: int, end: int) -> torch.Tensor:
    """The kind of every token id, int64 `(vocabulary,)`."""
    kinds = torch.full((len(tokenizer),), OTHER)
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if token in (".", "Ċ", "ĊĊ", ".Ċ", ".ĊĊ"):  # Ċ is a line break in byte-level BPE
            kinds[number] = STOP
    kinds[first], kinds[end] = FIRST, END
    return kinds
