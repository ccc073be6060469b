"""Training from a store larger than 2 GB: anonymous memory stays flat, rows are mapped and not loaded.

python -m benchmarks.memory.run
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer

from .._common import QUIET, Claim, make_parser, pick, prepare, result_folder, silence, write_result
from .._images import Pixels, as_batch

STATUS = Path("/proc/self/status")
TOKENS, CHANNELS, INPUTS, CLASSES = 197, 768, 16, 10
#: Share of the first replay epoch that counts as warm-up: loaders, allocator and first pages settle.
WARMUP = 0.1
#: Limits, as a share of the store: how far RssAnon may swing, and how far it may drift from epoch to epoch.
SWING, DRIFT = 0.05, 0.01


class WideModel(nn.Module):
    """A cheap stem with features of any size, so that minutes are enough for gigabytes.

    Args:
        tokens: of a feature; those of a ViT-Base are the default.
        channels: of each.
    """

    main_input_name = "pixel_values"

    def __init__(self, tokens: int = TOKENS, channels: int = CHANNELS):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(INPUTS, tokens * channels), nn.Unflatten(1, (tokens, channels)))
        self.block = nn.Sequential(nn.Linear(channels, 32), nn.GELU())
        self.head = nn.Linear(32, CLASSES)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.block(self.stem(pixel_values)).mean(dim=1))
        output = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**output, "logits": logits}


class MemorySampler(threading.Thread):
    """Reads RssAnon and RssFile of this process all the time; `samples` holds (seconds, phase, anon, file)."""

    def __init__(self, interval: float):
        super().__init__(daemon=True)
        self.interval, self.phase = interval, "start"
        self.samples: list[tuple[float, str, int, int]] = []
        self._stop_event = threading.Event()

    def run(self) -> None:
        start = time.perf_counter()
        while not self._stop_event.wait(self.interval):
            anon, file = resident_memory()
            self.samples.append((time.perf_counter() - start, self.phase, anon, file))

    def stop(self) -> None:
        self._stop_event.set()
        self.join()


def resident_memory() -> tuple[int, int]:
    """Bytes of anonymous and of file-backed memory."""
    sizes = {}
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            sizes[name] = int(value.split()[0]) * 1024
    return sizes["RssAnon"], sizes["RssFile"]


class PhaseMarker(TrainerCallback):
    """Tells the sampler which epoch runs; what happens before an epoch's first step is the build."""

    def __init__(self, sampler: MemorySampler):
        self.sampler, self.epoch = sampler, -1

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch += 1
        self.sampler.phase = "build" if self.epoch == 0 else f"epoch {self.epoch}"

    def on_step_begin(self, args, state, control, **kwargs):
        self.sampler.phase = f"epoch {self.epoch}"

    def on_train_end(self, args, state, control, **kwargs):
        self.sampler.phase = "end"


def train(folder: str, sampler: MemorySampler, options: argparse.Namespace) -> FreezeCacheTrainer:
    """Builds the store at the first epoch's beginning and trains every epoch from it."""
    generator = torch.Generator().manual_seed(options.seed)
    labels = torch.randint(CLASSES, (options.rows,), generator=generator)
    rows = Pixels(torch.randn(options.rows, INPUTS, generator=generator), labels)
    trainer = FreezeCacheTrainer(
        model=WideModel(),
        args=TrainingArguments(
            output_dir=folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            **QUIET,
            seed=options.seed,
        ),
        train_dataset=rows,
        data_collator=as_batch,
        callbacks=[PhaseMarker(sampler)],
        freeze_cache=FreezeCacheConfig(
            policy="manual", freeze_points="0:1", blocks=["stem", "block"], cache="always", codec=options.codec
        ),
    )
    silence(trainer).train()
    return trainer


def summarize(samples: list[tuple[float, str, int, int]], store_bytes: int) -> dict[str, Any]:
    """RssAnon after the warm-up: swing over everything, drift from the second epoch's median to the last one's."""
    epochs = sorted(
        {phase for _, phase, _, _ in samples if phase.startswith("epoch")}, key=lambda p: int(p.split()[1])
    )
    by_epoch = {name: [sample for sample in samples if sample[1] == name] for name in epochs}
    first = by_epoch[epochs[0]]
    settled = first[int(len(first) * WARMUP) :]
    replayed = settled + [sample for name in epochs[1:] for sample in by_epoch[name]]
    anon = [sample[2] for sample in replayed]
    medians = {name: statistics.median(sample[2] for sample in by_epoch[name]) for name in epochs}
    return {
        "store_bytes": store_bytes,
        "samples": len(samples),
        "anon_before_build": samples[0][2],
        "anon_largest_in_build": max((s[2] for s in samples if s[1] == "build"), default=None),
        "anon_median_by_epoch": medians,
        "anon_smallest": min(anon),
        "anon_largest": max(anon),
        "anon_swing": max(anon) - min(anon),
        "anon_swing_of_store": (max(anon) - min(anon)) / store_bytes,
        "anon_drift": medians[epochs[-1]] - medians[epochs[0]],
        "anon_drift_of_store": abs(medians[epochs[-1]] - medians[epochs[0]]) / store_bytes,
        "file_largest": max(sample[3] for sample in samples),
    }


def plot(samples: list[tuple[float, str, int, int]], store_bytes: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seconds = [sample[0] for sample in samples]
    figure, axes = plt.subplots(figsize=(7, 3.8))
    axes.plot(seconds, [sample[3] / 1e9 for sample in samples], label="RssFile: mapped rows, the kernel's to drop")
    axes.plot(seconds, [sample[2] / 1e9 for sample in samples], label="RssAnon: the process's own memory")
    axes.axhline(store_bytes / 1e9, color="gray", linestyle="--", linewidth=1, label="size of the store")
    top, previous = axes.get_ylim()[1], None
    for second, phase, _, _ in samples:
        if phase != previous and phase != "start":
            axes.axvline(second, color="gray", linewidth=0.6)
            if phase != "end":
                axes.text(second, top, f" {phase}", fontsize=8, va="bottom")
        previous = phase
    axes.set(xlabel="seconds", ylabel="GB", ylim=(0, top))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=16_000, help="samples; each takes 151 kB with int8")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--interval", type=float, default=0.05, help="seconds between samples")
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.interval = 1024, 0.01
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    if not STATUS.exists():
        raise SystemExit(f"this benchmark reads {STATUS}, which only Linux has.")
    sampler = MemorySampler(options.interval)
    with tempfile.TemporaryDirectory() as folder:
        sampler.start()
        trainer = train(folder, sampler, options)
        sampler.stop()
    report = trainer.freeze_cache_report()
    store_bytes = max(phase.store_bytes for phase in report.phases)
    result = summarize(sampler.samples, store_bytes)
    result["phases"] = report.to_dict()["phases"]
    every = max(1, len(sampler.samples) // 400)
    result["series"] = {
        "columns": ["seconds", "phase", "anon_bytes", "file_bytes"],
        "rows": [list(sample) for sample in sampler.samples[::every]],
    }
    plot(sampler.samples, store_bytes, result_folder("memory", options.smoke) / "memory.png")
    claims = [
        Claim("store, GB", store_bytes / 1e9, at_least=2.0),
        Claim(
            "RssAnon, largest - smallest after warm-up, share of the store",
            result["anon_swing_of_store"],
            at_most=SWING,
        ),
        Claim("RssAnon, drift between epochs, share of the store", result["anon_drift_of_store"], at_most=DRIFT),
    ]
    print(
        f"RssAnon {result['anon_smallest'] / 1e6:.0f} to {result['anon_largest'] / 1e6:.0f} MB after warm-up, ", end=""
    )
    print(f"drift {result['anon_drift'] / 1e6:+.1f} MB; RssFile up to {result['file_largest'] / 1e6:.0f} MB")
    write_result("memory", options, pick(options, "rows epochs batch_size codec interval"), result, claims)


if __name__ == "__main__":
    main()
