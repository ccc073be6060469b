"""Seconds of a build, of opening and verifying a store, and of a replay step, and memory, against rows and bytes.

python -m benchmarks.scale.run                # 10 GB of temporary disk
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from hf_freezecache import FeatureStore, FreezeCacheConfig, FreezeCacheTrainer

from .._common import QUIET, Claim, interleave, make_parser, pick, prepare, result_folder, silence, write_result
from .._images import Pixels, as_batch
from .._statistics import markdown_table
from ..memory.run import CLASSES, INPUTS, MemorySampler, WideModel

CODEC = "int8"
#: Tokens and channels of a row: a tiny one, and one of a ViT-Base, 151 kB.
TINY, WIDE = (8, 16), (197, 768)
#: Steps that are timed of each training.
STEPS = 200


class StepClock(TrainerCallback):
    """Seconds from the training's beginning to its first step, and of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.before_first = 0.0
        self._begin = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.steps:
            self.before_first = time.perf_counter() - self._begin
        self._step = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(time.perf_counter() - self._step)


def train(folder: Path, rows: Pixels, shape: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Some steps from the store, which is built, or opened and proved where it is there."""
    torch.manual_seed(options.seed)
    clock = StepClock()
    trainer = FreezeCacheTrainer(
        model=WideModel(*shape),
        args=TrainingArguments(
            output_dir=str(folder / "training"),
            max_steps=min(STEPS, len(rows) // options.batch_size),
            per_device_train_batch_size=options.batch_size,
            **{**QUIET, "seed": options.seed},
        ),
        train_dataset=rows,
        data_collator=as_batch,
        callbacks=[clock],
        freeze_cache=FreezeCacheConfig(
            policy="manual",
            freeze_points="0:1",
            blocks=["stem", "block"],
            cache="always",
            codec=CODEC,
            feature_cache_dir=str(folder / "cache"),
        ),
    )
    silence(trainer).train()
    phases = trainer.freeze_cache_report().phases
    if not any(phase.mode == "replay" for phase in phases):
        raise SystemExit("nothing was replayed.")
    return {
        "build_seconds": sum(phase.seconds for phase in phases if phase.mode == "build"),
        "before_first_step_seconds": clock.before_first,
        "step_seconds": statistics.median(clock.steps[5:]),
        "path": trainer.freeze_status().store_path,
    }


def forget_pages(store: Path) -> None:
    """Drops the store's files from the page cache."""
    for path in store.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(rows: int, shape: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    """A store of one size: build, open and verify with cold pages, a second training from it."""
    generator = torch.Generator().manual_seed(options.seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    samples = Pixels(torch.randn(rows, INPUTS, generator=generator), labels)
    sampler = MemorySampler(0.05)
    with tempfile.TemporaryDirectory() as folder:
        sampler.start()
        first = train(Path(folder), samples, shape, options)
        sampler.stop()
        path = Path(first.pop("path"))
        forget_pages(path)
        begin = time.perf_counter()
        store = FeatureStore.open(path)
        opened = time.perf_counter()
        if not store.verify():
            raise SystemExit(f"{path} is damaged.")
        verified = time.perf_counter()
        forget_pages(path)
        again = train(Path(folder), samples, shape, options)
        anon = [sample[2] for sample in sampler.samples]
        return {
            "rows": rows,
            "store_bytes": store.bytes,
            **first,
            "open_seconds": opened - begin,
            "verify_seconds": verified - opened,
            "reuse_seconds": again["before_first_step_seconds"],
            "step_of_second_training_seconds": again["step_seconds"],
            "anon_at_start": anon[0],
            "anon_at_end": anon[-1],
            "anon_largest": max(anon),
        }


def bare_verify_rate(megabytes: int = 512) -> float:
    """Bytes a second that SHA-256 takes of memory: the least that any verification takes."""
    import hashlib

    block = os.urandom(1 << 20)

    def digest() -> None:
        hashed = hashlib.sha256()
        for _ in range(megabytes):
            hashed.update(block)

    return (megabytes << 20) / statistics.median(interleave({"sha256": digest}, 3)["sha256"])


def table(points: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            f"{point['rows']:,}",
            f"{point['store_bytes'] / 1e9:.3f}",
            f"{point['build_seconds']:.1f}",
            f"{1e6 * point['build_seconds'] / point['rows']:.0f}",
            f"{point['open_seconds']:.2f}; {point['verify_seconds']:.2f}",
            f"{point['reuse_seconds']:.1f}",
            f"{1000 * point['step_seconds']:.2f}; {1000 * point['step_of_second_training_seconds']:.2f}",
            f"{(point['anon_largest'] - point['anon_at_start']) / 1e6:.0f}",
        ]
        for point in points
    ]
    return markdown_table(
        "rows | store, GB | build, s | build, us a row | open; verify, cold, s | until the first step of a second "
        "training, s | replay step, ms: first; second training | largest RssAnon above that at the start, MB",
        rows,
    )


def make_claims(tiny: list[dict[str, Any]], wide: list[dict[str, Any]]) -> list[Claim]:
    """Linear cost, flat steps, flat memory."""
    claims = []
    for name, points, unit in (("rows", tiny, "rows"), ("bytes", wide, "store_bytes")):
        small, large = points[-2], points[-1]
        for what in ("build_seconds", "verify_seconds"):
            ratio = (large[what] / large[unit]) / (small[what] / small[unit])
            claims.append(Claim(f"{name}: {what} per unit, largest / second largest", ratio, at_most=1.25))
        steps = [point["step_seconds"] for point in points[1:]]
        claims.append(Claim(f"{name}: replay step, slowest / fastest size", max(steps) / min(steps), at_most=1.25))
        growth = large["anon_largest"] - points[0]["anon_largest"]
        claims.append(Claim(f"{name}: RssAnon, largest - smallest size, MB", growth / 1e6, at_most=100.0))
    large = wide[-1]
    seconds = large["open_seconds"] + large["verify_seconds"]
    claims.append(Claim(f"open + verify of {large['store_bytes'] / 1e9:.1f} GB, cold, s", seconds, at_most=60.0))
    return claims


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 262144], help="tiny ones")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 2, 4, 8], help="of rows of 151 kB")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rows, options.gigabytes, options.batch_size = [256, 512], [0.02, 0.04], 8
    return options


def measure_apart(kind: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own, whose memory nothing else has grown."""
    command = [sys.executable, "-m", "benchmarks.scale.run", "--point", f"{kind}:{rows}"]
    command += ["--seed", str(options.seed), "--batch_size", str(options.batch_size)]
    command += [] if options.threads is None else ["--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    point = json.loads(done.stdout.splitlines()[-1])
    print(f"{kind}: {point}", flush=True)
    return point


def main() -> None:
    options = parse_options()
    prepare(options)
    if options.point is not None:
        kind, _, rows = options.point.partition(":")
        print(json.dumps(measure(int(rows), TINY if kind == "tiny" else WIDE, options)))
        return
    tiny = [measure_apart("tiny", rows, options) for rows in options.rows]
    wide = [measure_apart("wide", int(size * 1e9) // (WIDE[0] * WIDE[1]), options) for size in options.gigabytes]
    results = {"rows": tiny, "bytes": wide, "sha256_bytes_per_second": bare_verify_rate()}
    text = "\n".join(["## Rows", "", *table(tiny), "", "## Bytes", "", *table(wide)])
    (result_folder("scale", options.smoke) / "table.md").write_text(text + "\n", encoding="utf-8")
    write_result("scale", options, pick(options, "rows gigabytes batch_size"), results, make_claims(tiny, wide))


if __name__ == "__main__":
    main()
