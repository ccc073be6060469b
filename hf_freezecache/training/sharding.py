"""Why a training cannot be frozen and cached: one process does not hold the whole model or the whole sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Sizes of accelerate's `ParallelismConfig` above 1 that split a model or a sample over processes.
_SPLITS = {
    "dp_shard_size": "sharded data parallelism",
    "tp_size": "tensor parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}


def why_sharded(trainer: Any) -> str | None:
    """Names what splits the trainer's model or samples over processes.

    Freezing broadcasts whole buffers, a store holds whole features of whole samples, and every process checks the
    model by running all of it: each process must hold the whole model, as under DistributedDataParallel.

    Args:
        trainer: a `Trainer`, its accelerator set up.

    Returns:
        What splits them, in words that complete "this training uses ..."; None if nothing does.
    """
    if trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled:
        return "FSDP"
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    if trainer.accelerator.distributed_type == "MEGATRON_LM":
        return "Megatron-LM"
    return _why_parallel(trainer.accelerator) or why_model_sharded(trainer.model)


def why_model_sharded(model: nn.Module) -> str | None:
    """Names what splits a model's own tensors over processes; None if nothing does."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return f"tensor parallelism (tp_size={model._tp_size})"
    if getattr(model, "is_distributed_loading_by_transformers", False):  # Transformers 5.23 and later
        return "a model that `from_pretrained(distributed_config=...)` sharded"
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, DTensor):
            return f"a model with sharded tensors (DTensor), e.g. '{name}'"
    return None


def _why_parallel(accelerator: Any) -> str | None:
    config = accelerator.parallelism_config
    for name, words in _SPLITS.items():
        size = getattr(
            config, name, 1
        )  # accelerate before 1.12 has no `sp_size`; without parallelism there is no config
        if size > 1:
            return f"{words} ({name}={size} in `parallelism_config`)"
    return None
