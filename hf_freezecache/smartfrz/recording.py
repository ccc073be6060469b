"""Recording a training: weights of every block, and how alike its output is to that of the finished model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn
from transformers import TrainerCallback

from ..model.chain import BlockChain
from ..model.similarities import read_similarities
from ..policies.cka import cka, gram
from ..rng import hash_key, preserve_rng
from .history import NUM_FEATURES, WeightSampler, depth_of, describe_history, snapshot_every


@dataclass(frozen=True)
class RunFacts:
    """What a recorded training was.

    Args:
        run: its name, unique among the runs of a predictor.
        network: kind of model; a predictor is validated on networks that it was not trained on.
        data: name of the data set.
        seed: of the training.
        blocks: names, the stem first.
        settings: of the training, for people.
    """

    run: str
    network: str
    data: str
    seed: int
    blocks: list[str]
    settings: dict[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """A recorded training.

    Args:
        facts: what it was.
        fixed: what a predictor reads of the weights, `(S, L, NUM_FEATURES)`, of fixed positions.
        fresh: the same of positions that are drawn anew.
        progress: share of the training that is done, `(S,)`.
        cka: of the outputs of each block with those of the finished model, `(S, L)`.

    Shapes: S snapshots, L blocks.
    """

    facts: RunFacts
    fixed: np.ndarray
    fresh: np.ndarray
    progress: np.ndarray
    cka: np.ndarray

    def save(self, path: Path) -> None:
        """Writes the run aside and renames it: a killed training leaves no half file."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ("fixed", "fresh", "progress", "cka")}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".tmp")
        save_file(arrays, aside, metadata={"facts": json.dumps(asdict(self.facts))})
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> RecordedRun:
        """Reads a run.

        Raises:
            ValueError: if the file is no recorded run, or one of another version.
        """
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "facts" not in metadata:
                raise ValueError(f"{path} is no recorded training: `freezecache predictor record` writes them.")
            arrays = {name: file.get_tensor(name) for name in ("fixed", "fresh", "progress", "cka")}
        if (values := arrays["fixed"].shape[-1]) != NUM_FEATURES:
            raise ValueError(
                f"{path} was recorded by another version: {values} values a snapshot, and a predictor reads "
                f"{NUM_FEATURES}. Record the training again."
            )
        return cls(RunFacts(**json.loads(metadata["facts"])), **arrays)


class HistoryRecorder(TrainerCallback):
    """Records a training of any `Trainer`; changes nothing of it.

    Args:
        path: file of the recorded run.
        facts: what the training is; `blocks` is filled in.
        probe: model inputs of a few TRAINING samples, with which outputs are compared. On the CPU.
        blocks: names of the blocks; None: found.
    """

    def __init__(self, path: Path, facts: RunFacts, probe: Mapping[str, Any], blocks: Sequence[str] | None = None):
        self.path, self.facts, self.probe, self.block_names = path, facts, probe, blocks
        self._samplers: list[WeightSampler] = []
        self._weights: dict[str, list[np.ndarray]] = {"fixed": [], "fresh": []}
        self._grams: list[list[torch.Tensor]] = []
        self._progress: list[float] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        inputs = self._inputs(model)
        with preserve_rng():
            self._chain = BlockChain.from_model(model, self.block_names, probe=inputs)
        self._parameters = [_parameters_of(block.modules) for block in self._chain.blocks]
        self._samplers = [
            WeightSampler(parameters, hash_key(self.facts.seed, index) % 2**32)
            for index, parameters in enumerate(self._parameters)
        ]

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step % snapshot_every(state.max_steps) == 0:
            self._take(model, state.global_step / state.max_steps)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._take(model, 1.0)
        final = self._grams[-1]
        curves = [[cka(now, end) for now, end in zip(grams, final, strict=True)] for grams in self._grams]
        facts = RunFacts(**{**asdict(self.facts), "blocks": self._chain.names})
        arrays = {}
        for variant, snapshots in self._weights.items():
            by_block = np.stack(snapshots, axis=1)
            described = [
                describe_history(weights, self._progress, depth_of(index, len(by_block)))
                for index, weights in enumerate(by_block)
            ]
            arrays[variant] = np.stack(described, axis=1)
        RecordedRun(facts, **arrays, progress=np.array(self._progress), cka=np.array(curves)).save(self.path)

    def _take(self, model: nn.Module, progress: float) -> None:
        snapshot = len(self._progress)
        self._progress.append(progress)
        for variant, snapshots in self._weights.items():
            taken = [
                sampler.take(parameters, snapshot, variant)  # type: ignore[arg-type]  # its keys are the variants
                for sampler, parameters in zip(self._samplers, self._parameters, strict=True)
            ]
            snapshots.append(np.stack(taken))
        self._grams.append(read_similarities(model, self._chain.blocks, self._inputs(model), gram))

    def _inputs(self, model: nn.Module) -> dict[str, Any]:
        device = next(model.parameters()).device
        return {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.probe.items()
        }


def _parameters_of(modules: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    return {
        f"{position}.{name}": parameter
        for position, module in enumerate(modules)
        for name, parameter in module.named_parameters()
    }
