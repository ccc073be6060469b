"""Texts of differing length as tokens, tiny models of them, and a collator that pads to the longest of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    XLNetConfig,
    XLNetForSequenceClassification,
)

VOCABULARY, LABELS = 64, 3
_TOKENS = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_BART = dict(layers=2, attention_heads=4, ffn_dim=64)
_BERT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    num_labels=LABELS,
)


def bert(kind=BertForSequenceClassification, **settings):
    """5 blocks, stem included."""
    torch.manual_seed(0)
    return kind(BertConfig(**{**_BERT, **settings}))


def bert_of_tokens():
    return bert(BertForTokenClassification)


def bert_of_questions():
    return bert(BertForQuestionAnswering, num_labels=2)


def bert_of_choices():
    return bert(BertForMultipleChoice)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_positions=64, n_embd=32, n_layer=4, n_head=4, num_labels=LABELS, **_TOKENS)
    return GPT2ForSequenceClassification(config)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, **_TOKENS)
    return LlamaForCausalLM(config)


def xlnet():
    """Its summary is the last position of a batch, whether that is a token or padding."""
    torch.manual_seed(0)
    config = XLNetConfig(d_model=32, n_layer=4, n_head=4, d_inner=64, num_labels=LABELS, **_TOKENS)
    return XLNetForSequenceClassification(config)


def bart():
    """Its decoder gets the labels, shifted; without them it gets the text."""
    torch.manual_seed(0)
    layers = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in _BART.items()}
    config = BartConfig(d_model=32, max_position_embeddings=64, decoder_start_token_id=2, **layers, **_TOKENS)
    return BartForConditionalGeneration(config)


class Texts(Dataset):
    """Tokens of texts; the first of each is 1 and the last is 2.

    Args:
        rows: number of texts.
        shortest, longest: numbers of tokens.
        label: of a text: `class`, `tokens` (one each), `span` (where an answer begins and ends), `next` (the tokens),
            `summary` (some of the tokens).
    """

    def __init__(self, rows: int = 32, shortest: int = 4, longest: int = 13, label: str = "class"):
        generator = torch.Generator().manual_seed(7)
        self.rows: list[dict[str, Any]] = []
        for _ in range(rows):
            length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
            tokens = [1, *torch.randint(5, VOCABULARY, (length - 2,), generator=generator).tolist(), 2]
            first = int(torch.randint(0, LABELS, (1,), generator=generator))
            labels: dict[str, Any] = {
                "class": {"labels": first},
                "tokens": {"labels": [token % LABELS for token in tokens]},
                "span": {"start_positions": 1, "end_positions": length - 2},
                "next": {"labels": tokens},
                "summary": {"labels": tokens[: 2 + length // 3]},
            }
            self.rows.append({"input_ids": tokens, **labels[label]})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self.rows[row])


class Choices(Dataset):
    """Questions: several texts each, of which one is the answer.

    Args:
        rows: number of questions.
        choices: texts of each.
    """

    def __init__(self, rows: int = 32, choices: int = 3):
        texts = Texts(rows * choices)
        self.rows = [
            {
                "input_ids": [texts[row * choices + choice]["input_ids"] for choice in range(choices)],
                "labels": row % choices,
            }
            for row in range(rows)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self.rows[row])


class PadChoices:
    """Pads the texts of all questions of a batch to the longest, or to a width, on one side."""

    def __init__(self, side: str = "right", width: int | None = None):
        self.pad = Pad(side, width)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        texts = self.pad([{"input_ids": text} for sample in samples for text in sample["input_ids"]])
        choices = len(samples[0]["input_ids"])
        batch = {name: value.unflatten(0, (len(samples), choices)) for name, value in texts.items()}
        return {**batch, "labels": torch.tensor([sample["labels"] for sample in samples])}


class Pad:
    """Pads to the longest of a batch, or to a width, on one side."""

    def __init__(self, side: str = "right", width: int | None = None):
        self.side, self.width = side, width

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        width = self.width or max(len(sample["input_ids"]) for sample in samples)
        batch: dict[str, Any] = {
            "input_ids": self._pad([sample["input_ids"] for sample in samples], 0, width),
            "attention_mask": self._pad([[1] * len(sample["input_ids"]) for sample in samples], 0, width),
        }
        for name in samples[0].keys() - {"input_ids"}:
            values = [sample[name] for sample in samples]
            if isinstance(values[0], list):
                batch[name] = self._pad(values, -100, self.width or max(map(len, values)))
            else:
                batch[name] = torch.tensor(values)
        return batch

    def _pad(self, rows: Sequence[list[int]], value: int, width: int) -> torch.Tensor:
        padded = [[value] * (width - len(row)) for row in rows]
        if self.side == "right":
            return torch.tensor([[*row, *padding] for row, padding in zip(rows, padded, strict=True)])
        return torch.tensor([[*padding, *row] for row, padding in zip(rows, padded, strict=True)])
