"""What must hold before a training touches its data: the model's kind, its weights and the settings."""

from __future__ import annotations

from typing import Any

from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import BatchSampler

from ..config import FreezeCacheConfig
from ..model.blocks import Block, declared_blocks, named_blocks
from ..model.chain import BlockChain
from ..model.freshness import is_untrained
from ..policies import FreezePolicy
from .sharding import why_sharded

#: Packages whose modules keep their weights packed, where they are no parameters.
_PACKING = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


class UntrainedError(ValueError):
    """A model has the weights of its initialization."""


def check_model(trainer: Any, model: nn.Module, config: FreezeCacheConfig) -> list[Block] | None:
    """Checks that a model can be frozen and cached, as far as can be told before it runs. Nothing is drawn.

    Args:
        trainer: a `Trainer`, its accelerator set up.
        model: its model, not wrapped.
        config: the settings.

    Returns:
        Its blocks; None if they have to be found in a run of it.

    Raises:
        ValueError: if it cannot; the message says why and what to do.
    """
    reason = why_sharded(trainer)
    if reason is not None:
        raise ValueError(f"freezing and caching do not work with {reason}; use DDP (accelerate launch).")
    reason = why_elsewhere(model)
    if reason is not None:
        raise ValueError(f"freezing and caching do not work with {reason}.")
    reason = why_quantized(model)
    if reason is not None:
        raise ValueError(
            f"freezing and caching do not work with {reason}: a prefix has plain tensors. Dequantize the "
            "model (`model.dequantize()` in Transformers) or use policy='none'."
        )
    return named_blocks(model, config.blocks) if config.blocks is not None else declared_blocks(model)


def check_observable(trainer: Any, policy: FreezePolicy) -> None:
    """Checks that a policy would see what it asks for. Nothing is drawn.

    Args:
        trainer: a `Trainer`.
        policy: its rule.

    Raises:
        ValueError: if gradients would be those of a scaled loss.
    """
    scaler = getattr(trainer.accelerator, "scaler", None)
    if "gradients" in policy.observes and scaler is not None and not trainer.args.max_grad_norm:
        raise ValueError(
            f"policy {policy.name} observes gradients, and with fp16 they are only unscaled before the step where "
            "they are clipped: set max_grad_norm (a large one clips nothing), or train in bf16."
        )


def check_trained(model: nn.Module) -> None:
    """Checks that a model has been trained before: the default schedule freezes blocks that have settled.

    Raises:
        UntrainedError: if its weights are those of an initialization.
    """
    if is_untrained(model):
        raise UntrainedError(
            f"the weights of {type(model).__name__} are those of an initialization; the default schedule freezes "
            "blocks that have settled. To freeze all the same, say so: freeze_cache=FreezeCacheConfig()"
        )


def check_trainable(chain: BlockChain, cut: int) -> None:
    """Checks that a cut leaves something to train.

    Raises:
        ValueError: if it does not.
    """
    frozen = {id(parameter) for parameter in chain.prefix_parameters(cut).values()}
    if not any(parameter.requires_grad and id(parameter) not in frozen for parameter in chain.model.parameters()):
        raise ValueError(
            f"cut {cut} freezes {cut} of {len(chain)} blocks, and all other parameters have requires_grad=False: "
            "nothing is left to train. Choose a smaller cut, or unfreeze the head."
        )


def check_even(loader: Any) -> None:
    """Checks that all processes get as many batches: freezes, stores and losses are shared by all of them.

    Args:
        loader: of the training, prepared by accelerate.

    Raises:
        ValueError: if they do not.
    """
    shard = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or shard.even_batches or type(shard.batch_sampler) is not BatchSampler:
        return
    inner, size = shard.batch_sampler, shard.num_processes
    batches = BatchSampler(range(len(inner.sampler)), inner.batch_size, inner.drop_last)  # type: ignore[arg-type]
    # Its length tells nothing where batches are split: the last one may have samples for some processes only.
    shards = (BatchSamplerShard(batches, size, rank, shard.split_batches, even_batches=False) for rank in range(size))
    counts = [sum(1 for _ in each) for each in shards]
    if min(counts) < max(counts):
        raise ValueError(
            f"the processes get {counts} batches an epoch (even_batches=False), and one that has no more of them does "
            "not take part in the others' steps. Set even_batches=True in accelerator_config, where the last batches "
            "are filled up with the first samples, or dataloader_drop_last=True."
        )


def why_elsewhere(model: nn.Module) -> str | None:
    """Says that a model is not all there on one device, and what to do; None if it is."""
    kind = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return f"a model in {kind}: pass the module in it (model.module), `Trainer` wraps it itself"
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if "meta" in devices:
        return f"weights of {kind} on the meta device, as accelerate leaves offloaded ones: load them onto one device"
    if len(devices) > 1:
        return f"{kind} on several devices ({', '.join(devices)}; device_map): load it onto one, or use policy='none'"
    return None


def why_quantized(model: nn.Module) -> str | None:
    """Names what of a model is quantized; None if nothing is."""
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(model, "quantization_method", None)
        return f"quantized models ({getattr(method, 'value', method)})"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = type(tensor)
        packed = isinstance(tensor, nn.Parameter) and kind is not nn.Parameter and not tensor.is_floating_point()
        if tensor.is_quantized or packed or is_traceable_wrapper_subclass(tensor):
            return f"quantized or packed weights ({kind.__name__}, e.g. '{name}')"
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_PACKING):
            return f"quantized modules ({type(module).__name__}, e.g. '{name}')"
    return None
