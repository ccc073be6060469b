"""Texts of differing length on a GPU: plain, freeze-only and cached trainings of an encoder and of a causal LM.

python -m benchmarks.gpu.texts
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer

from .._common import describe_machine, make_parser, pick, prepare, result_folder, silence, write_json
from .workload import describe_card, synchronize, use_gpu

_VOCABULARY, _CLASSES, _PADDING = 30_000, 77, 0
#: Arm -> `cache` and `codec` of the config; None: `Trainer`.
ARMS: dict[str, tuple[str, str] | None] = {
    "plain": None,
    "freeze_only": ("never", "fp32"),
    "cached_fp16": ("always", "fp16"),
    "cached_int8": ("always", "int8"),
    "cached_int4": ("always", "int4"),
}


class RandomTexts(Dataset):
    """Random tokens; lengths are log-normal, as those of instructions are.

    Args:
        rows: number of texts.
        longest: most tokens of a text.
        seed: of lengths and tokens.
        is_causal: labels are the tokens of the second half of each text, else a class.
    """

    def __init__(self, rows: int, longest: int, seed: int, is_causal: bool):
        generator = torch.Generator().manual_seed(seed)
        lengths = (longest / 4 * torch.randn(rows, generator=generator).mul(0.6).exp()).round().clamp(8, longest)
        self.tokens = [
            torch.randint(5, _VOCABULARY, (int(length),), generator=generator, dtype=torch.int64) for length in lengths
        ]
        self.classes = torch.randint(0, _CLASSES, (rows,), generator=generator)
        self.is_causal = is_causal

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Any]:
        tokens = self.tokens[row]
        if not self.is_causal:
            return {"input_ids": tokens, "labels": self.classes[row]}
        labels = tokens.clone()
        labels[: len(labels) // 2] = -100
        return {"input_ids": tokens, "labels": labels}


def pad(samples: list[dict[str, Any]], width: int | None = None) -> dict[str, torch.Tensor]:
    """Pads to the longest of a batch, or to a width."""
    width = width or max(len(sample["input_ids"]) for sample in samples)
    shape = len(samples), width
    batch = {
        "input_ids": torch.full(shape, _PADDING),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, -100)
        if samples[0]["labels"].ndim
        else torch.zeros(len(samples), dtype=torch.int64),
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        batch["input_ids"][row, :length], batch["attention_mask"][row, :length] = sample["input_ids"], 1
        if sample["labels"].ndim:
            batch["labels"][row, :length] = sample["labels"]
        else:
            batch["labels"][row] = sample["labels"]
    return batch


def make_model(name: str, smoke: bool) -> nn.Module:
    """BERT-base with 77 classes, or GPT-2 of 124 M parameters; tiny ones for a smoke run. Weights are random."""
    size = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128) if smoke else {}
    if name == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=_VOCABULARY, num_labels=_CLASSES, **size))
    size = dict(n_embd=64, n_layer=4, n_head=4) if smoke else {}
    return GPT2LMHeadModel(GPT2Config(vocab_size=_VOCABULARY, pad_token_id=_PADDING, **size))


class EpochSeconds(TrainerCallback):
    """Seconds of every epoch, the GPU idle at both ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        synchronize()
        self._start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def train(
    name: str, arm: str, options: argparse.Namespace, seed: int, bf16: bool = True, collate: Callable = pad
) -> tuple[dict[str, Any], list[float]]:
    """Trains an arm; its measurements, and the losses of its steps."""
    set_seed(seed)
    model, clock = make_model(name, options.smoke), EpochSeconds()
    texts = RandomTexts(options.rows, options.longest, seed, is_causal=name == "gpt2")
    cut = (4 if name == "bert" else 3) if options.smoke else (10 if name == "bert" else 7)
    with tempfile.TemporaryDirectory() as folder:
        kwargs: dict[str, Any] = {
            "model": model,
            "args": TrainingArguments(
                output_dir=folder,
                num_train_epochs=options.epochs,
                per_device_train_batch_size=options.batch_size,
                learning_rate=1e-4,
                bf16=bf16 and use_gpu(),
                use_cpu=not use_gpu(),
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                seed=seed,
            ),
            "train_dataset": texts,
            "data_collator": collate,
            "callbacks": [clock],
        }
        settings = ("always", "fp32") if arm == "exact" else ARMS[arm]
        if settings is None:
            trainer = Trainer(**kwargs)
        else:
            cache, codec = settings
            config = FreezeCacheConfig(policy="manual", freeze_points=f"0:{cut}", cache=cache, codec=codec)
            trainer = FreezeCacheTrainer(**kwargs, freeze_cache=config)
        if use_gpu():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        silence(trainer).train()
        synchronize()
        tokens = sum(map(len, texts.tokens))
        result: dict[str, Any] = {
            "run_seconds": time.perf_counter() - start,
            "epoch_seconds": clock.seconds,
            "tokens_per_second": tokens / min(clock.seconds[1:] or clock.seconds),
            "tokens": tokens,
        }
        if use_gpu():
            result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if settings is not None and settings[0] == "always":
            store = FeatureStore.open(trainer.freeze_status().store_path)
            result |= {"bytes_per_token": store.bytes / tokens, "store_bytes": store.bytes}
            result["build_seconds"] = trainer.freeze_cache_report().totals.build_seconds
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        shutil.rmtree(folder, ignore_errors=True)
    del trainer, kwargs, model
    gc.collect()
    return result, losses


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--output")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="seeds of every comparison")
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.longest, options.epochs, options.rounds = 64, 32, 2, 1
    prepare(options)
    start, folder = time.perf_counter(), Path(options.output or result_folder("gpu", options.smoke))
    content: dict[str, Any] = {
        "benchmark": "gpu-texts",
        "settings": pick(options, "rows longest epochs batch_size rounds seed smoke"),
        "machine": {**describe_machine(), **describe_card()},
        "equality": {},
        "trainings": {},
    }

    def publish() -> None:
        write_json(folder / "texts.json", content)

    def attempt(part: str, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception:  # the other parts still run; a later call may have no GPU to try again on
            content.setdefault("failed", {})[part] = traceback.format_exc()
        publish()

    few = argparse.Namespace(**{**vars(options), "rows": min(options.rows, 512), "epochs": 2})
    attempt("warm-up", lambda: train("bert", "freeze_only", few, 0) and None)
    for name in ("bert", "gpt2"):
        attempt(f"equality of {name}", partial(compare_exactly, name, few, content["equality"]))
    for seed in range(options.rounds):
        for name in ("bert", "gpt2"):
            arms = list(ARMS)
            for arm in arms[seed % len(arms) :] + arms[: seed % len(arms)]:
                if time.perf_counter() - start > options.seconds:
                    content["cut_off"] = True
                else:
                    attempt(f"{name} {arm}", partial(measure, name, arm, seed, options, content["trainings"]))
    return 1 if "failed" in content else 0


def compare_exactly(name: str, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Largest difference of a step's loss in fp32, cached against freeze-only; and of two equal freeze-only runs."""
    for kind, width in (("one width", options.longest), ("longest of a batch", None)):
        collate = partial(pad, width=width)
        losses = [train(name, arm, options, 0, bf16=False, collate=collate)[1] for arm in ("freeze_only",) * 2]
        cached = train(name, "exact", options, 0, bf16=False, collate=collate)[1]
        results[f"{name}, {kind}"] = {
            "steps": len(cached),
            "cached_against_freeze_only": max(abs(a - b) for a, b in zip(losses[0], cached, strict=True)),
            "freeze_only_against_itself": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        }


def measure(name: str, arm: str, seed: int, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """One training of an arm."""
    result, losses = train(name, arm, options, seed)
    entry = results.setdefault(name, {}).setdefault(arm, [])
    entry.append({**result, "mean_of_last_losses": statistics.mean(losses[-10:])})
    print(name, arm, seed, f"{result['run_seconds']:.2f} s", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
