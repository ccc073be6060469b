"""Records the trainings that the predictor is made from, several at a time.

python -m benchmarks.predictor.record --jobs 1                 # on a CPU
python -m benchmarks.predictor.record --gpu --jobs 14 --seconds 150
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_freezecache.smartfrz.recording import HistoryRecorder, RunFacts

from .._common import QUIET, REPOSITORY, make_parser, prepare, silence
from .networks import NETWORKS, PROBED, Run, load_data, runs


def record(options: argparse.Namespace, run: Run, data: Any) -> float:
    """Trains and records one run.

    Args:
        options: of the command.
        run: the training.
        data: as `load_data` returned it.

    Returns:
        Seconds.
    """
    dataset, collator, rows = data
    network, begin = NETWORKS[run.network], time.perf_counter()
    set_seed(run.seed)
    model = network.make(options)
    extra = dict.fromkeys(network.extra, True)

    def collate(batch: Any) -> dict[str, Any]:
        return {**collator(batch), **extra}

    chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:PROBED].tolist()
    items = dataset.__getitems__(chosen) if hasattr(dataset, "__getitems__") else [dataset[row] for row in chosen]
    probe = {name: value for name, value in collate(items).items() if name != "labels"}
    facts = RunFacts(run.name, run.network, network.data, run.seed, [], {**run.settings, "rows": rows})
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=network.batch_size,
            num_train_epochs=run.epochs,
            learning_rate=run.learning_rate,
            lr_scheduler_type=run.schedule,
            warmup_steps=run.warmup,
            weight_decay=0.05,
            **{**QUIET, "seed": run.seed, "use_cpu": not options.gpu},
        )
        recorder = HistoryRecorder(path_of(options, run), facts, probe, network.blocks)
        trainer = Trainer(model=model, args=args, train_dataset=dataset, data_collator=collate, callbacks=[recorder])
        silence(trainer).train()
    return time.perf_counter() - begin


def path_of(options: argparse.Namespace, run: Run) -> Path:
    return Path(options.output) / ("test" if NETWORKS[run.network].is_test else "train") / f"{run.name}.safetensors"


def work(options: argparse.Namespace, mine: list[Run]) -> None:
    """Records runs one after the other; those whose file is there are left out."""
    data: dict[str, Any] = {}
    for run in mine:
        if path_of(options, run).exists():
            continue
        if options.seconds is not None and time.time() > options.until:
            print(f"left out, as time is up: {run.name}", flush=True)
            continue
        name = NETWORKS[run.network].data
        try:
            if name not in data:
                data[name] = load_data(options, name)
            seconds = record(options, run, data[name])
            print(f"{run.name}: {seconds:.0f} s", flush=True)
        except SystemExit as error:  # data or weights that are not there
            print(f"left out: {run.name}: {error}", flush=True)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--output", default=str(REPOSITORY / "outputs" / "predictor" / "runs"))
    parser.add_argument("--jobs", type=int, default=1, help="processes; files that are there are not made again")
    parser.add_argument("--gpu", action="store_true", help="train on the accelerator")
    parser.add_argument("--seconds", type=float, help="no training begins later")
    parser.add_argument("--seeds", type=int, default=2, help="of each pair of learning rate and number of epochs")
    parser.add_argument("--rows", type=int, default=2000, help="training samples")
    parser.add_argument("--only", help="networks, separated by commas")
    parser.add_argument("--minilm", help="folder with MiniLM's files")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rows, options.seeds = 128, 1
        options.output = str(REPOSITORY / "outputs" / "predictor-smoke" / "runs")
    if options.until is None:
        options.until = time.time() + (options.seconds or 0)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    only = None if options.only is None else options.only.split(",")
    planned = [run for run in runs(options.seeds) if only is None or run.network in only]
    if options.job is not None or options.jobs == 1:
        work(options, planned[options.job or 0 :: options.jobs])
        return
    command = [sys.executable, "-m", "benchmarks.predictor.record", *sys.argv[1:], "--until", str(options.until)]
    jobs = [subprocess.Popen([*command, "--job", str(job)]) for job in range(options.jobs)]
    codes = [job.wait() for job in jobs]
    print(
        json.dumps(
            {"runs": len(list(Path(options.output).rglob("*.safetensors"))), "failed_jobs": sum(map(bool, codes))}
        )
    )
    if any(codes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
