"""A small causal language model, trained on real English in minutes: Llama's blocks, a tokenizer of its own.

python -m benchmarks.text.language_model --threads 1

Texts: the documentation and the docstrings of Python's standard library (PSF licence), and the training questions of
BANKING77 (CC BY 4.0). Model and tokenizer are saved below outputs/; other experiments make them if they are absent.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import re
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .._common import QUIET, REPOSITORY, describe_machine, make_parser, pick, prepare, silence, write_json
from .sources import add_text_options, load_questions

LAYERS = 6
SETTINGS = "lm_epochs lm_learning_rate lm_batch_size vocabulary width longest seed"
#: Every so many documents are kept for tests.
_HELD_OUT = 20
_LEAST_CHARACTERS = 80
_NOT_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


def add_language_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the language model's training."""
    parser.add_argument("--lm_epochs", type=float, default=2.0)
    parser.add_argument("--lm_learning_rate", type=float, default=2e-3)
    parser.add_argument("--lm_batch_size", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--longest", type=int, default=128, help="tokens of a piece of text, BOS and EOS included")


def read_documents(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Documents to train on, and others of the same kinds."""
    library = [*topics.values(), *_docstrings()]
    library = [re.sub(r"[ \t]+", " ", text).strip() for text in library]
    train = [text for number, text in enumerate(library) if number % _HELD_OUT]
    test = library[::_HELD_OUT]
    train += load_questions(options, "train")["text"]
    test += load_questions(options, "test")["text"][::_HELD_OUT]
    return (train[:200], test[:40]) if options.smoke else (train, test)


def _docstrings() -> list[str]:
    """Every docstring of the standard library once, in the order of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library's own examples of broken files
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= _LEAST_CHARACTERS:
                    found[text] = None
    return list(found)


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; padding, beginning and end have tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="right"
    )


def as_pieces(documents: list[str], tokenizer: PreTrainedTokenizerFast, longest: int) -> Dataset:
    """Documents as pieces of at most `longest` tokens; each begins with BOS, a document ends with EOS."""
    rows = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids = [*ids, tokenizer.eos_token_id]
        for start in range(0, len(ids), longest - 1):
            piece = [tokenizer.bos_token_id, *ids[start : start + longest - 1]]
            if len(piece) > 3:
                rows.append(piece)
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def train_language_model(options: argparse.Namespace, folder: Path) -> None:
    """Trains tokenizer and model and saves them with what was measured."""
    set_seed(options.seed)
    start = time.perf_counter()
    train, test = read_documents(options)
    tokenizer = train_tokenizer(train, options.vocabulary)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.width,
            intermediate_size=options.width * 8 // 3 // 32 * 32,
            num_hidden_layers=LAYERS,
            num_attention_heads=options.width // 48,
            max_position_embeddings=4 * options.longest,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pieces, others = (as_pieces(documents, tokenizer, options.longest) for documents in (train, test))
    args = TrainingArguments(
        output_dir=str(folder / "training"),
        num_train_epochs=options.lm_epochs,
        max_steps=4 if options.smoke else -1,
        per_device_train_batch_size=options.lm_batch_size,
        per_device_eval_batch_size=options.lm_batch_size,
        learning_rate=options.lm_learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        train_sampling_strategy="group_by_length",
        seed=options.seed,
        **QUIET,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=pieces,
        eval_dataset=others,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    silence(trainer).train()
    loss = trainer.evaluate()["eval_loss"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(
        folder / "trained.json",
        {
            "settings": pick(options, SETTINGS),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "training_tokens": sum(map(len, pieces["input_ids"])),
            "training_pieces": len(pieces),
            "held_out_loss": loss,
            "held_out_perplexity": math.exp(loss),
            "seconds": time.perf_counter() - start,
            "machine": describe_machine(),
        },
    )


def language_model_folder(options: argparse.Namespace) -> Path:
    """Where the trained model is."""
    return REPOSITORY / "outputs" / "benchmarks" / ("text-smoke" if options.smoke else "text") / "language_model"


def load_language_model(options: argparse.Namespace) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The trained model and its tokenizer; they are trained first if they are absent or were trained otherwise."""
    folder = language_model_folder(options)
    notes = folder / "trained.json"
    if not notes.exists() or json.loads(notes.read_text())["settings"] != pick(options, SETTINGS):
        train_language_model(options, folder)
    return LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def sample_text(options: argparse.Namespace, prompt: str = "How do I", tokens: int = 24) -> str:
    """What the model writes, greedily: a look at what it has learned."""
    model, tokenizer = load_language_model(options)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    return tokenizer.decode(model.generate(ids, max_new_tokens=tokens, do_sample=False)[0])


def main() -> None:
    parser = make_parser(__doc__)
    add_text_options(parser)
    add_language_model_options(parser)
    options = parser.parse_args()
    if options.smoke:
        options.width, options.vocabulary = 96, 400
    prepare(options)
    random.seed(options.seed)
    train_language_model(options, language_model_folder(options))
    print((language_model_folder(options) / "trained.json").read_text())
    print(sample_text(options))


if __name__ == "__main__":
    main()
