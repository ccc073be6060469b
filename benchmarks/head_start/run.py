"""What a head start costs where blocks are frozen from the start: on samples, from the store, from one that is there.

python -m benchmarks.head_start.run --threads 1
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.training import before_steps

from .._common import QUIET, Claim, in_turn, make_parser, pick, prepare, silence, summary, write_result
from .._images import as_batch, as_interpolated_batch, load_caltech, load_deit

#: On samples before the store is built, as where the first cut comes later; from the store that is built for it; from
#: one of an earlier training; and none at all.
ARMS = ("on samples", "from the store", "from a store that is there", "none")


def train(options: argparse.Namespace, images: Any, model: Any, arm: str, folder: str, cache: str) -> dict[str, Any]:
    """Trains for some steps; returns seconds and FLOPs in all and of the phases.

    Seconds of the processor are those of this process alone, whatever else the machine does.
    """
    set_seed(options.seed)
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        learning_rate=2e-4,
        max_steps=options.steps,
        seed=options.seed,
        **QUIET,
    )
    config = FreezeCacheConfig(
        policy="manual",
        freeze_points=f"0:{options.cut}",
        cache="always",
        codec=options.codec,
        head_start_epochs=0 if arm == "none" else options.head_start_epochs,
        feature_cache_dir=cache,
    )
    trainer = FreezeCacheTrainer(
        model=copy.deepcopy(model),
        args=args,
        train_dataset=images,
        data_collator=as_batch if options.size == 224 else as_interpolated_batch,
        freeze_cache=config,
    )
    begin, processor = time.perf_counter(), time.process_time()
    if arm == "on samples":
        with mock.patch.object(before_steps, "_may_have_store", lambda *args: False):
            silence(trainer).train()
    else:
        silence(trainer).train()
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    report = trainer.freeze_cache_report()
    phases = {phase.mode: phase for phase in report.phases}
    found = {"seconds": seconds, "processor_seconds": processor, "tflop": report.totals.flops / 1e12}
    for mode in ("head_start", "build"):
        if mode in phases:
            found |= {f"{mode}_seconds": phases[mode].seconds, f"{mode}_tflop": phases[mode].flops / 1e12}
    return found


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every arm in turn, some times."""
    images, model = load_caltech(options, "train", options.size, options.rows), load_deit(options)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as kept:
        train(options, images, model, "none", str(Path(kept, "run")), str(Path(kept, "cache")))
        for number in range(options.repeats):
            for arm in in_turn(ARMS, number):
                with tempfile.TemporaryDirectory() as folder:
                    there = arm == "from a store that is there"
                    cache = str(Path(kept if there else folder, "cache"))
                    runs[arm].append(train(options, images, model, arm, folder, cache))
                    print(f"{arm}: {runs[arm][-1]}", flush=True)
    return {
        arm: {name: summary([run[name] for run in found]) for name in found[0]} | {"runs": found}
        for arm, found in runs.items()
    }


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--cut", type=int, default=6)
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--head_start_epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of the training, of which nothing is measured")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rows, options.size, options.batch_size, options.repeats = 32, 112, 8, 1
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    results = measure(options)
    apart, together = (
        statistics.median(run["head_start_tflop"] + run["build_tflop"] for run in results[arm]["runs"])
        for arm in ARMS[:2]
    )
    extra = {
        arm: results[arm]["processor_seconds"]["median"] - results["none"]["processor_seconds"]["median"]
        for arm in ARMS
    }
    claims = [
        Claim("FLOPs of head start and build, from the store relative to on samples", together / apart, at_most=0.75),
        Claim(
            "processor seconds that the head start adds, from the store relative to on samples",
            extra["from the store"] / extra["on samples"],
            at_most=0.75,
        ),
    ]
    settings = pick(options, "rows size cut codec batch_size head_start_epochs steps repeats")
    write_result("head_start", options, settings, results, claims)


if __name__ == "__main__":
    main()
