"""Recorded trainings that are made up: some blocks settle early, and their weights show it."""

from __future__ import annotations

import numpy as np

from hf_freezecache.smartfrz.history import SAMPLED, depth_of, describe_history
from hf_freezecache.smartfrz.recording import RecordedRun, RunFacts


def made_up_run(name: str, network: str, seed: int, settles_at: tuple[float, ...] = (0.2, 0.5, 0.9)) -> RecordedRun:
    """A run of 61 snapshots; the weights of each block go their way until it settles, and tremble afterwards."""
    generator, progress = np.random.default_rng(seed), np.linspace(0, 1, 61)
    fixed, fresh, cka = [], [], []
    for index, at in enumerate(settles_at):
        depth = depth_of(index, len(settles_at))
        start, way = generator.normal(size=(2, SAMPLED)).astype(np.float32)
        gone = np.minimum(progress / at, 1.0)
        weights = start + gone[:, None] * way * 0.3 + 1e-4 * generator.normal(size=(61, SAMPLED))
        weights = weights.astype(np.float32)
        fixed.append(describe_history(weights, progress, depth))
        fresh.append(describe_history(np.sort(weights, axis=1), progress, depth))
        cka.append(0.3 + 0.7 * gone)
    facts = RunFacts(name, network, "made up", seed, [f"block.{index}" for index in range(len(settles_at))], {})
    return RecordedRun(facts, np.stack(fixed, 1), np.stack(fresh, 1), progress, np.stack(cka, 1))


def made_up_runs(networks: int = 3, runs: int = 4) -> list[RecordedRun]:
    return [
        made_up_run(f"net{net}-{run}", f"net{net}", 10 * net + run, (0.15 + 0.1 * run, 0.5, 0.95 - 0.1 * net))
        for net in range(networks)
        for run in range(runs)
    ]
