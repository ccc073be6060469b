"""Why a training cannot be frozen, or not cached: one process does not hold the whole model or the whole sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..build.context import BuildContext
from ..config import FreezeCacheConfig
from ..policies import FreezePolicy
from ..units import show_bytes

#: Sizes of accelerate's `ParallelismConfig` above 1 that split a model or a sample over processes.
_SPLITS = {
    "dp_shard_size": "sharded data parallelism",
    "tp_size": "tensor parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}


def why_sharded(trainer: Any) -> str | None:
    """Names what splits the trainer's model or samples over processes.

    Every process checks the model by running all of it: each must hold the whole model when the training begins, as
    under DistributedDataParallel, and under FSDP2, which shards it afterwards.

    Args:
        trainer: a `Trainer`, its accelerator set up.

    Returns:
        What splits them, in words that complete "this training uses ..."; None if nothing does.
    """
    if trainer.is_fsdp_xla_enabled:
        return "FSDP of XLA"
    if trainer.is_fsdp_enabled:
        plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if getattr(plugin, "fsdp_version", 1) != 2:
            return "FSDP1, which has no tensor for each parameter (FSDP2 has: fsdp_config={'version': 2})"
        if plugin.cpu_ram_efficient_loading:
            return (
                "a model that FSDP loads in the main process alone (set cpu_ram_efficient_loading=False: blocks are "
                "found in every process)"
            )
        if plugin.activation_checkpointing:
            return (
                "FSDP2 with activation checkpointing of its own, which gives weights other names (set "
                "gradient_checkpointing=True in TrainingArguments in place of it)"
            )
        if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy" or plugin.cpu_offload is True:
            return "FSDP2 with cpu_offload, under which weights and features are on other devices"
        if trainer.args.torch_compile:
            return "FSDP2 with torch_compile, which splits what it has compiled"
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    if trainer.accelerator.distributed_type == "MEGATRON_LM":
        return "Megatron-LM"
    return _why_parallel(trainer.accelerator) or why_model_sharded(trainer.model)


def check_settings(trainer: Any, config: FreezeCacheConfig, policy: FreezePolicy) -> None:
    """Checks that a training of which one process holds a part can do what it is to do.

    Args:
        trainer: a `Trainer`, its accelerator set up.
        config: the settings.
        policy: the rule.

    Raises:
        ValueError: if it cannot; the message names all that it cannot.
    """
    if not trainer.is_fsdp_enabled:
        return
    asked = {
        "cache_eval=True": config.cache_eval,
        "share_store=True": config.share_store,
        "materialize='write_through'": config.materialize == "write_through",
        f"anneal='{config.anneal}'": config.anneal != "none",
        f"layer_decay={config.layer_decay}": config.layer_decay != 1.0,
        "push_head_only=True": config.push_head_only,
        f"policy '{policy.name}', which looks at the training": bool(policy.observes),
        f"policy '{policy.name}', which tries freezing": policy.trial_cut(2) > 0,
    }
    named = [name for name, is_asked in asked.items() if is_asked]
    if named:
        raise ValueError(
            f"under FSDP2 blocks are frozen on a schedule: no process holds the whole model in a step, which "
            f"{', '.join(named)} would need. Leave that out, or use DDP."
        )


def place_whole(trainer: Any) -> None:
    """Moves a model that FSDP2 will split to the device of the training: blocks are found and costs measured there.

    `Trainer` leaves it where it is until it is split.

    Args:
        trainer: a `Trainer`, its accelerator set up.

    Raises:
        ValueError: if the whole model has no room there.
    """
    if not trainer.is_fsdp_enabled:
        return
    model, device = trainer.model, trainer.args.device
    needed = sum(each.numel() * each.element_size() for each in model.parameters() if each.device != device)
    free = free_memory(device)
    if free is not None and free < needed:
        raise ValueError(
            f"the whole model has no room on {device}: its blocks are found by running it before FSDP2 splits it. It "
            f"takes {show_bytes(needed)}, and {show_bytes(free)} are free."
        )
    if needed:
        model.to(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that an accelerator has left; None: nobody can tell."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def without_whole_model(trainer: Any, context: BuildContext) -> BuildContext:
    """The context of a training of which one process holds a part.

    What is in shards waits nowhere else.

    Args:
        trainer: a `Trainer`, its accelerator set up.
        context: as of one that has the whole model.
    """
    if not trainer.is_fsdp_enabled:
        return context
    return replace(context, config=replace(context.config, offload_frozen=False), is_split=True)


def describe_precision(trainer: Any) -> str:
    """Mixed precision and parameter type of a training, and the types that FSDP2 casts to.

    Args:
        trainer: a `Trainer`, its accelerator set up.
    """
    words = f"{trainer.accelerator.mixed_precision}/{next(trainer.model.parameters()).dtype}"
    policy = getattr(getattr(trainer.accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    return words if policy is None or not trainer.is_fsdp_enabled else f"{words}/{policy}"


def reshard(model: nn.Module) -> None:
    """Puts the shards of a model of FSDP2 back in the place of whole parameters, which a forward pass may leave.

    What is set on a parameter, such as `requires_grad`, is set on the one that is in the module.

    Args:
        model: any; one that is not sharded stays as it is.
    """
    for module in sharded_modules(model):
        module.reshard()


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 wraps, in the order of the model."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def why_model_sharded(model: nn.Module) -> str | None:
    """Names what splits a model's own tensors over processes; None if nothing does."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return f"tensor parallelism (tp_size={model._tp_size})"
    if getattr(model, "is_distributed_loading_by_transformers", False):  # Transformers 5.23 and later
        return "a model that `from_pretrained(distributed_config=...)` sharded"
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    if sharded_modules(model):
        return "a model that FSDP2 has split before this training: give each training a new model and a new trainer"
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
