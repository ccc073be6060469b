"""Everything that a store depends on, as one digest: a store is reused if and only if the digest is the same."""

from __future__ import annotations

import hashlib
import inspect
import json
import uuid
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch import nn
from transformers.utils import logging

from .rows import RowSource

logger = logging.get_logger(__name__)

#: Entries of a model's configuration that do not change the features.
_IRRELEVANT_CONFIG = {"transformers_version", "_name_or_path", "id2label", "label2id", "architectures", "problem_type"}
# `save_pretrained` adds these to a configuration; the dtypes of the tensors themselves are in the digest.
_IRRELEVANT_CONFIG |= {"dtype", "torch_dtype"}


def fingerprint_inputs(
    *,
    source: RowSource,
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    cut: int,
    blocks: list[str],
    codec: str,
    augmentation: Mapping[str, Any],
    precision: str,
    format_version: int,
) -> dict[str, Any]:
    """Everything a store depends on, as JSON values.

    Args:
        source: data set, transform, collator and seed.
        model: the model; its class and configuration count.
        tensors: parameters and buffers of the prefix by name; names, shapes, dtypes and bytes count.
        cut: number of frozen blocks.
        blocks: module names of the prefix.
        codec: name of the codec.
        augmentation: settings on which the stored views depend, as JSON values.
        precision: mixed precision under which the prefix runs.
        format_version: version of the store's format.

    Returns:
        Name -> JSON value; the same in every process and every run with the same settings.
    """
    return {
        "format_version": format_version,
        "dataset": dataset_digest(source.dataset),
        "collator": object_digest(source.collator),
        "rows": len(source),
        "sample_rows": sample_digest(source),
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": config_digest(model, blocks),
        "prefix": tensors_digest(tensors),
        "cut": cut,
        "blocks": blocks,
        "codec": codec,
        "augmentation": dict(augmentation),
        "precision": precision,
        "seed": source.seed,
        "batch_size": source.batch_size,
    }


def digest(inputs: Mapping[str, Any]) -> str:
    """The fingerprint: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of the names, shapes, dtypes and bytes of tensors: 64 hexadecimal digits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        total.update(_memory_of(value))
    return total.hexdigest()


def dataset_digest(dataset: Any) -> str:
    """Digest of a data set and its transform.

    A `datasets.Dataset` has a digest that changes with every operation, transforms included. Any other data set is
    pickled and hashed.
    """
    if isinstance(dataset, datasets.Dataset):
        return dataset._fingerprint
    return object_digest(dataset)


def object_digest(value: Any) -> str:
    """Digest of an object's code and state; a random one, which never matches again, if it cannot be pickled."""
    try:
        return Hasher.hash(value)
    except Exception as error:  # pickling runs the object's own code, which may raise anything
        logger.warning_once(
            f"{type(value).__name__} cannot be hashed ({type(error).__name__}: {error}): its feature stores are not "
            "reused by another run."
        )
        logger.debug("%s cannot be hashed", type(value).__name__, exc_info=error)
        return f"unhashable-{uuid.uuid4().hex}"


def sample_digest(source: RowSource, rows: int = 16) -> str:
    """Digest of a few collated rows, spread over the data set: it changes with the files from which rows are read.

    Args:
        source: the samples.
        rows: number of rows.
    """
    total = hashlib.sha256()
    indices = sorted({round(row) for row in np.linspace(0, len(source) - 1, min(rows, len(source)))})
    for index, view in [(index, view) for index in indices for view in (0, 1)]:
        batch = source.collate([index], view)
        for name in sorted(batch):
            value = batch[name]
            total.update(name.encode())
            if isinstance(value, torch.Tensor):
                total.update(f"{tuple(value.shape)}|{value.dtype}|".encode())
                total.update(_memory_of(value.detach().cpu().contiguous()))
            else:
                total.update(repr(value).encode())
    return total.hexdigest()


def config_digest(model: nn.Module, blocks: list[str]) -> str:
    """Digest of what the features depend on besides the tensors: configuration, modules, their code and attributes.

    Args:
        model: the model.
        blocks: module names of the prefix.
    """
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    settings = {name: value for name, value in settings.items() if name not in _IRRELEVANT_CONFIG}
    settings["attention"] = getattr(config, "_attn_implementation", None)
    modules = {name: repr(module) for name, module in model.named_modules() if name in blocks}
    inside = [module for name, module in model.named_modules() if _within(name, blocks)]
    code = {cls.__qualname__: _own_code(cls) for cls in {type(model), *map(type, inside)}}
    values = [
        {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        for module in inside
    ]
    values = [{name: value for name, value in own.items() if name != "training"} for own in values]
    text = json.dumps([settings, modules, code, values], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _within(name: str, blocks: list[str]) -> bool:
    return any(name == block or name.startswith(block + ".") for block in blocks)


def _own_code(cls: type) -> str:
    """Source of a module class of the user; the name of a class that comes from a released package."""
    if cls.__module__.split(".")[0] in {"torch", "torchvision", "transformers", "timm"}:
        return cls.__qualname__
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return cls.__qualname__


def _memory_of(value: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else memoryview(b"")
