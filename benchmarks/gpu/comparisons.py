"""Sides of a comparison in turn, and what their blocks of steps took."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_freezecache.cache.store import FeatureStore
from hf_freezecache.replay.decode import replay_features

from .._common import in_turn, summary
from .workload import Bench, Setting, device, synchronize, use_gpu

#: Ratios of median step seconds: name -> (side, side).
RATIOS = {
    "replay / memory_gpu": ("replay", "memory_gpu"),
    "replay_workers / memory_gpu": ("replay_workers", "memory_gpu"),
    "replay / memory_host": ("replay", "memory_host"),
    "plain / replay": ("plain", "replay"),
    "plain_gpu / replay": ("plain_gpu", "replay"),
    "freeze_only / replay": ("freeze_only", "replay"),
    "plain / freeze_only": ("plain", "freeze_only"),
    "plain_jpeg / replay": ("plain_jpeg", "replay"),
    "freeze_only_jpeg / replay": ("freeze_only_jpeg", "replay"),
}


def compare(
    setting: Setting,
    sides: tuple[str, ...],
    options: argparse.Namespace,
    seconds_left: Callable[[], float],
    publish: Callable[[dict[str, Any]], None],
) -> None:
    """Blocks of steps of the sides in turn, A B, B A, ...; what is known is published after every block.

    Args:
        setting: model, batch, cut and codec.
        sides: names of sides, see `Bench.sides`.
        options: rounds, steps, rows, workers and seed.
        seconds_left: of this comparison; no block starts after it, but every side runs once.
        publish: takes the result so far.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(setting, options, Path(folder))
        blocks: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        result = {**asdict(setting), "cut": bench.cut, "blocks": bench.blocks, "rows": bench.rows}
        if any(side.startswith(("replay", "memory")) for side in sides):
            result["build"] = describe_build(bench.run_block("replay"), bench)
            publish(result)
        for number in range(options.rounds):
            for side in in_turn(sides, number):
                if number and seconds_left() < 0:
                    result["cut_off"] = f"in round {number + 1} of {options.rounds}: no time left"
                    return publish(result)
                blocks[side].append(bench.run_block(side))
                result["sides"] = describe_sides(blocks, setting.batch_size)
                result["ratios"] = ratios(result["sides"])
                result["single_step_ratios"] = ratios(result["sides"], "single_step_seconds")
                publish(result)
        if bench.store is not None:
            result["replay_parts"] = time_parts(bench.store, setting.batch_size, options)
        publish(result)


def describe_build(block: Mapping[str, Any], bench: Bench) -> dict[str, Any]:
    """The store of a comparison and what its build took."""
    assert bench.store is not None  # a replay block has opened it
    seconds = block["build_seconds"]
    return {
        "seconds": seconds,
        "rows_per_second": bench.rows / seconds if seconds else None,
        "store_bytes": bench.store.bytes,
        "feature": bench.store.manifest.layout,
        "first_block_seconds": block["block_seconds"],
    }


def describe_sides(blocks: Mapping[str, list[dict[str, Any]]], batch_size: int) -> dict[str, Any]:
    described = {}
    for side, measured in blocks.items():
        if not measured:
            continue
        seconds = [block["step_seconds"] for block in measured]
        described[side] = {
            "step_seconds": summary(seconds),
            "each_block": seconds,
            "single_step_seconds": summary([step for block in measured for step in block["single_steps"]]),
            "samples_per_second": batch_size / statistics.median(seconds),
            "data_wait_share": statistics.median(block["data_wait_share"] for block in measured),
            "peak_gpu_bytes": max(block["peak_bytes"] for block in measured),
            "block_seconds": statistics.median(block["block_seconds"] for block in measured),
        }
    return described


def ratios(sides: Mapping[str, Any], clock: str = "step_seconds") -> dict[str, float]:
    """The ratios of which both sides were measured.

    Args:
        sides: what `describe_sides` returned.
        clock: `step_seconds`, medians of blocks, or `single_step_seconds`.
    """
    medians = {side: value[clock]["median"] for side, value in sides.items()}
    return {
        name: medians[above] / medians[below]
        for name, (above, below) in RATIOS.items()
        if above in medians and below in medians
    }


def time_parts(store: FeatureStore, batch_size: int, options: argparse.Namespace, repeats: int = 12) -> dict[str, Any]:
    """Median seconds of the parts of a replayed batch that a perfect cache would not have, each measured alone.

    Returns:
        `read`: rows from the store; `pin`: into pinned memory; `copy`: to the GPU; `decode`: to features.
    """
    generator = torch.Generator().manual_seed(options.seed)
    parts: dict[str, list[float]] = {name: [] for name in ("read", "pin", "copy", "decode")}
    for _ in range(repeats):
        rows = torch.randperm(len(store), generator=generator)[:batch_size].tolist()
        read = _timed(parts["read"], lambda rows=rows: store.read_rows(rows))
        codes = {name: read[name] for name in store.code_names(read)}
        pinned = _timed(
            parts["pin"],
            lambda codes=codes: {name: c.pin_memory() if use_gpu() else c for name, c in codes.items()},
        )
        on_gpu = _timed(parts["copy"], lambda pinned=pinned: {name: c.to(device()) for name, c in pinned.items()})
        _timed(parts["decode"], lambda on_gpu=on_gpu: replay_features(store, on_gpu))
    code_bytes = sum(value.nbytes for value in codes.values())
    # The first calls map files and load kernels.
    medians = {f"{name}_seconds": statistics.median(seconds[2:]) for name, seconds in parts.items()}
    return {**medians, "code_bytes_per_batch": code_bytes}


def _timed(seconds: list[float], call: Callable[[], Any]) -> Any:
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    seconds.append(time.perf_counter() - start)
    return result
