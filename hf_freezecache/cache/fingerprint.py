"""Everything that a store depends on, as one digest: a store is reused if and only if the digest is the same."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .installed import describe_origin
from .model_digest import class_of, prefix_digest
from .row_files import known_files
from .rows import RowSource
from .value_digest import Undigestible, ValueDigest

logger = logging.get_logger(__name__)


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
    modules: Iterable[nn.Module] = (),
    draws: Collection[str] = ("seed", "batch_size"),
    unknown: str | None = None,
    neutral: bool = False,
) -> dict[str, Any]:
    """Everything a store depends on, as JSON values.

    Files from which rows are read do not count: they are compared row by row, see `build.reuse`.

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
        modules: modules outside the blocks that run before the cut.
        draws: what of `seed` and `batch_size` the random numbers in the rows depend on; empty where nothing is drawn.
        unknown: stands for what cannot be digested, the same for all stores of a training; None: what is never equal.
        neutral: see `config_digest`.

    Returns:
        Name -> JSON value; the same in every process and every run with the same settings.
    """
    values = _value_digest(unknown or uuid.uuid4().hex, known_files(source.dataset))
    kind = class_of(model)
    inputs = {
        "format_version": format_version,
        "dataset": values.hex(source.dataset),
        "collator": values.hex(source.collator),
        "rows": len(source),
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "config": config_digest(model, blocks, modules, values, neutral),
        "prefix": tensors_digest(tensors),
        "libraries": describe_origin("torch"),
        "cut": cut,
        "blocks": blocks,
        "codec": codec,
        "augmentation": dict(augmentation),
        "precision": precision,
    }
    return {**inputs, **{name: getattr(source, name) for name in draws}}


def dataset_inputs(source: RowSource, unknown: str | None = None) -> dict[str, Any]:
    """What of `fingerprint_inputs` depends on which rows there are, as JSON values.

    Args:
        source, unknown: see `fingerprint_inputs`.
    """
    values = _value_digest(unknown or uuid.uuid4().hex, known_files(source.dataset))
    return {"dataset": values.hex(source.dataset), "rows": len(source)}


def digest(inputs: Mapping[str, Any]) -> str:
    """The fingerprint: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of the names, shapes, dtypes and bytes of tensors: 64 hexadecimal digits; quantized ones included."""
    values = _value_digest(uuid.uuid4().hex)
    return values.hex([(name, tensors[name]) for name in sorted(tensors)])


def config_digest(
    model: nn.Module,
    blocks: Collection[str],
    modules: Iterable[nn.Module] = (),
    digest: ValueDigest | None = None,
    neutral: bool = False,
) -> str:
    """Digest of what the features depend on besides the tensors: configuration, modules, their code and attributes.

    Args:
        model: the model.
        blocks: module names of the prefix.
        modules: others that run before the cut.
        digest: of values.
        neutral: whether probabilities of dropout and the classes of the head do not count: `proving.is_neutral` has
            found that they change no feature.
    """
    names = {name for name, _ in model.named_modules() if _within(name, blocks)}
    inside = [module for name, module in model.named_modules() if name in names]
    return prefix_digest(model, [*inside, *modules], digest or _value_digest(uuid.uuid4().hex), neutral)


def _within(name: str, blocks: Collection[str]) -> bool:
    return any(name == block or name.startswith(block + ".") for block in blocks)


def _value_digest(unknown: str, known_files: Collection[str] = ()) -> ValueDigest:
    return ValueDigest(known_files, unknown, _say_unknown)


def _say_unknown(error: Undigestible) -> None:
    logger.warning_once(
        f"Something that the samples or the frozen blocks depend on cannot be compared between runs: {error}. Feature "
        "stores are reused by this training when it is resumed, and by no other one."
    )
