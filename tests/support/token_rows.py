"""Texts of differing length as tokens, tiny models of them, and a collator that pads to the longest of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
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


class Texts(Dataset):
    """Tokens of texts; the first of each is 1 and the last is 2.

    Args:
        rows: number of texts.
        shortest, longest: numbers of tokens.
        label: of a text: `class`, `tokens` (one each), `span` (where an answer begins and ends), `next` (the tokens).
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
            }
            self.rows.append({"input_ids": tokens, **labels[label]})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self.rows[row])


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
            batch[name] = self._pad(values, -100, width) if isinstance(values[0], list) else torch.tensor(values)
        return batch

    def _pad(self, rows: Sequence[list[int]], value: int, width: int) -> torch.Tensor:
        padded = [[value] * (width - len(row)) for row in rows]
        if self.side == "right":
            return torch.tensor([[*row, *padding] for row, padding in zip(rows, padded, strict=True)])
        return torch.tensor([[*padding, *row] for row, padding in zip(rows, padded, strict=True)])
