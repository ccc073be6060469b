"""What all stores of one training have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cache.remote import RemoteStores
from ..cache.rows import RowSource
from ..config import FreezeCacheConfig
from ..distributed import Group
from ..model.chain import BlockChain
from ..model.inputs import ModelInputs


def _count_nothing(from_cut: int, to_cut: int, samples: int, width: int | None = None) -> None:
    pass


@dataclass(frozen=True)
class BuildContext:
    """The model, the samples and the settings of one training.

    Args:
        chain: the model's blocks.
        source: the train samples as collated batches.
        config: the user's settings.
        cache_dir: the directory of the stores.
        group: the processes.
        model_inputs: selects the prefix's inputs from a batch.
        precision: mixed precision and parameter type under which the prefix runs.
        disable_tqdm: no progress bars.
        count_run: is told `(from_cut, to_cut, samples)` whenever a build has run the blocks between two cuts; of texts
            the positions, too.
        eval_dataset: the trainer's, whose transform may be the base of the training's.
        forward_passes: of a training step that has no backward pass; None: it is one of each.
        disk_group: the processes that see this process's directory of the stores; None: all of them.
        remote: where stores are looked for that are not on the disk, and uploaded to; None: nowhere.
        is_split: whether FSDP2 splits the model, so that no process runs it alone in a step.
    """

    chain: BlockChain
    source: RowSource
    config: FreezeCacheConfig
    cache_dir: Path
    group: Group
    model_inputs: ModelInputs
    precision: str
    disable_tqdm: bool = False
    count_run: Callable[..., None] = _count_nothing
    eval_dataset: Any = None
    forward_passes: int | None = None
    disk_group: Group | None = None
    remote: RemoteStores | None = None
    is_split: bool = False

    @property
    def disk(self) -> Group:
        """The processes that see this process's directory of the stores; its main process writes what is common."""
        return self.group if self.disk_group is None else self.disk_group

    @property
    def model(self) -> nn.Module:
        """The model itself, not wrapped."""
        return self.chain.model

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.chain.model.parameters()).device
