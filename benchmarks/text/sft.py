"""Supervised fine-tuning of a small causal language model, its first half frozen: cached against freeze-only.

python -m benchmarks.text.sft --threads 1
python -m benchmarks.text.sft --threads 1 --collect      # the table of what is finished, nothing is trained

A row is a question of BANKING77 (the prompt) and the name of its intent (the completion); labels are -100 on the
prompt and on the padding, which is on the right and as wide as the longest row of a batch asks.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, TrainingArguments, set_seed

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer

from .._common import QUIET, Claim, make_parser, pick, prepare, quiet, result_folder, silence, write_result
from .._partials import add_run_options, read_measurements, run_experiments, settle_run_options, write_measurements
from .._statistics import markdown_table, spread
from .language_model import SETTINGS, add_language_model_options, load_language_model
from .sources import add_text_options, load_questions

NAME = "sft"
FREEZE_ONLY, EXACT = "freeze-only", "cached fp32"
#: Freezing alone, batches padded to multiples of eight: what the width of padding alone changes.
WIDER = "freeze-only, padded to eights"
#: Arm -> its codec; None: nothing is cached.
ARMS = {
    FREEZE_ONLY: None,
    WIDER: None,
    EXACT: "fp32",
    "cached fp16": "fp16",
    "cached int8": "int8",
    "cached default": FreezeCacheConfig().codec,
}
#: The embedding and three of six layers.
_CUT = 4


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    names = f"{SETTINGS} rows test_rows epochs batch_size learning_rate sampling"
    return {**pick(options, names), "cut": _CUT}


def load_rows(options: argparse.Namespace, split: str, count: int, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Prompts and completions as tokens, each row of its own length."""
    questions = load_questions(options, split).shuffle(seed=0)
    names = questions.features["label"].names
    rows = []
    for question in questions.select(range(min(count, len(questions)))):
        intent = names[question["label"]].replace("_", " ")
        texts = [f"Question: {question['text']}\nIntent:", f" {intent}"]
        prompt, completion = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        prompt = [tokenizer.bos_token_id, *prompt]
        completion = [*completion, tokenizer.eos_token_id]
        ids = [*prompt, *completion]
        labels = [-100] * len(prompt) + completion
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return Dataset.from_list(rows)


def run_seed(seed: int, options: argparse.Namespace) -> None:
    """Trains the arms with a seed; finished ones are skipped."""
    quiet()
    torch.set_num_threads(options.threads)
    settings = settings_of(options)
    done = read_measurements(options.output_dir, NAME, seed, settings)
    # The order changes from seed to seed, so that a drift of the machine hits all arms.
    names = [*list(ARMS)[seed % len(ARMS) :], *list(ARMS)[: seed % len(ARMS)]]
    for name in names:
        if name not in done:
            done[name] = result = train_arm(name, seed, options)
            write_measurements(options.output_dir, NAME, seed, settings, done)
            print(
                f"seed {seed}, {name}: test loss {result['test_loss']:.4f}, run {result['run_seconds']:.1f} s, "
                f"{result['tokens_per_second']:.0f} tokens a second after the first epoch",
                flush=True,
            )


def train_arm(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm and returns its measurements, the loss of every step among them."""
    codec = ARMS[name]
    target = Path(options.output_dir) / f"training-{seed}"
    shutil.rmtree(target, ignore_errors=True)
    model, tokenizer = load_language_model(options)
    train = load_rows(options, "train", options.rows, tokenizer)
    test = load_rows(options, "test", options.test_rows, tokenizer)
    set_seed(seed)
    args = TrainingArguments(
        output_dir=str(target),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        train_sampling_strategy=options.sampling,
        seed=seed,
        **{**QUIET, "logging_strategy": "steps", "logging_steps": 1},
    )
    cache = "never" if codec is None else "always"
    config = FreezeCacheConfig(policy="manual", freeze_points=f"0:{_CUT}", cache=cache, codec=codec or "fp32")
    start = time.perf_counter()
    trainer = FreezeCacheTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8 if name == WIDER else None),
        freeze_cache=config,
    )
    silence(trainer).train()
    run_seconds = time.perf_counter() - start
    report = trainer.freeze_cache_report()
    phases = report.to_dict()["phases"]
    steps = [phase for phase in phases if phase["mode"] in ("live", "replay")]
    tokens = sum(map(len, train["input_ids"]))
    seconds = sum(phase["seconds"] for phase in steps)
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "test_loss": trainer.evaluate()["eval_loss"],
        "run_seconds": run_seconds,
        "build_seconds": report.totals.build_seconds,
        "phases": phases,
        "tokens": tokens,
        "tokens_per_second": tokens * sum(phase["epochs"] for phase in steps) / seconds,
    }
    if codec is not None:
        store = FeatureStore.open(trainer.freeze_status().store_path)
        result |= {"codec": store.manifest.codec, "store_bytes": store.bytes, "bytes_per_token": store.bytes / tokens}
    del trainer
    gc.collect()
    shutil.rmtree(target, ignore_errors=True)
    return result


def collect(options: argparse.Namespace) -> None:
    """Table and JSON of the seeds that are finished.

    Raises:
        SystemExit: if none is.
    """
    settings = settings_of(options)
    runs = {seed: read_measurements(options.output_dir, NAME, seed, settings) for seed in options.seeds}
    runs = {seed: done for seed, done in runs.items() if all(arm in done for arm in ARMS)}
    if not runs:
        raise SystemExit("no seed is finished yet.")
    arms = {name: one_arm(name, runs) for name in ARMS}
    text = table(arms, len(runs))
    print(text)
    (result_folder("text", options.smoke) / "sft.md").write_text(text)
    settings |= {"seeds": list(runs), "jobs": options.jobs, "threads": options.threads}
    claims = [
        Claim(
            f"{EXACT}: mean difference of a step's loss, relative to that of other padding",
            arms[EXACT]["mean_step_difference"] / max(arms[WIDER]["mean_step_difference"], 1e-9),
            at_most=2.0,
        ),
        Claim(
            "cached default: difference of the test loss, nats",
            arms["cached default"]["test_loss_difference"]["median"],
            at_most=0.05,
        ),
        Claim("cached default: speed of a step over freeze-only", arms["cached default"]["speed"], at_least=1.3),
        Claim(
            "cached default: speed of a step over freeze-only, relative to that by FLOPs",
            arms["cached default"]["speed"] / arms["cached default"]["speed_by_flops"],
            at_least=0.9,
        ),
    ]
    write_result("text", options, settings, {"arms": arms, "runs": runs}, claims, "sft.json")


def one_arm(name: str, runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """An arm over all seeds, and its distance to freezing without a cache, step by step."""
    rows = [done[name] for done in runs.values()]
    frozen = [done[FREEZE_ONLY] for done in runs.values()]
    pairs = list(zip(rows, frozen, strict=True))
    steps = [abs(a - b) for row, base in pairs for a, b in zip(row["losses"], base["losses"], strict=True)]
    speeds = [row["tokens_per_second"] for row in rows]
    return {
        "test_loss": spread([row["test_loss"] for row in rows]),
        "test_loss_difference": spread([row["test_loss"] - base["test_loss"] for row, base in pairs]),
        "largest_step_difference": max(steps),
        "mean_step_difference": statistics.mean(steps),
        "run_seconds": spread([row["run_seconds"] for row in rows]),
        "build_seconds": statistics.median(row["build_seconds"] for row in rows),
        "tokens_per_second": spread(speeds),
        "speed": statistics.median(row["tokens_per_second"] / base["tokens_per_second"] for row, base in pairs),
        "speed_by_flops": step_flops(frozen[0]) / step_flops(rows[0]),
        "speed_of_run": spread([base["run_seconds"] / row["run_seconds"] for row, base in pairs]),
        "bytes_per_token": rows[0].get("bytes_per_token"),
    }


def step_flops(row: dict[str, Any]) -> float:
    """FLOPs of the steps of an arm, builds left out."""
    return sum(phase["flops"] for phase in row["phases"] if phase["mode"] in ("live", "replay"))


def table(arms: dict[str, dict[str, Any]], seeds: int) -> str:
    header = (
        "arm | test loss (min to max) | minus freeze-only | largest; mean difference of a step's loss | run s (min to "
        "max) | of it build s | tokens/s of steps | over freeze-only: steps; by FLOPs; run | bytes a token"
    )
    rows = []
    for name, arm in arms.items():
        loss, difference, seconds = arm["test_loss"], arm["test_loss_difference"], arm["run_seconds"]
        rows.append(
            (
                name,
                f"{loss['median']:.4f} ({loss['min']:.4f} to {loss['max']:.4f})",
                f"{difference['median']:+.4f} ({difference['min']:+.4f} to {difference['max']:+.4f})",
                f"{arm['largest_step_difference']:.2g}; {arm['mean_step_difference']:.2g}",
                f"{seconds['median']:.1f} ({seconds['min']:.1f} to {seconds['max']:.1f})",
                f"{arm['build_seconds']:.1f}",
                f"{arm['tokens_per_second']['median']:,.0f}",
                f"{arm['speed']:.2f}; {arm['speed_by_flops']:.2f}; {arm['speed_of_run']['median']:.2f}",
                "" if arm["bytes_per_token"] is None else f"{arm['bytes_per_token']:.0f}",
            )
        )
    title = f"SFT of a Llama of 3.4 M parameters, {_CUT} of 7 blocks frozen from epoch 0, {seeds} seeds: medians"
    return "\n".join([title, "", *markdown_table(header, rows)]) + "\n"


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_run_options(parser)
    add_text_options(parser)
    add_language_model_options(parser)
    parser.set_defaults(seeds=[0, 1, 2], batch_size=16)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--test_rows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--sampling", default="random", choices=["random", "group_by_length"])
    options = parser.parse_args(argv)
    if options.smoke:
        options.width, options.vocabulary = 96, 400
        options.rows, options.test_rows, options.epochs, options.seeds = 64, 32, 2, [0, 1]
    settle_run_options(options, "text", options.jobs)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    run_experiments(options, {NAME: run_seed}, collect)


if __name__ == "__main__":
    main()
