"""`load_head`: a base with a head of somebody's on it, or an error that says why not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from torch import nn
from transformers.utils import logging

from .errors import HeadError, shortened
from .head_config import HEAD_CONFIG, HEAD_WEIGHTS, HeadConfig, is_repo_id
from .rebuild import Source, assign, build, build_on, check_base_size, check_size, check_tensors
from .saving import file_sha256
from .tensors import Part, check_plain, dtype_name, named_tensors, tensors_sha256, total_sha256

logger = logging.get_logger(__name__)


def load_head(
    directory_or_id: str | os.PathLike,
    base: str | os.PathLike | nn.Module | None = None,
    revision: str | None = None,
    *,
    device_map: Any = None,
    dtype: torch.dtype | str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Any:
    """Puts a head on its base: the model that was trained, bit for bit, as an ordinary model in eval mode.

    Only safetensors and JSON are read, and no code but that of installed libraries is run, whoever wrote the head.

    Args:
        directory_or_id: a folder that `save_head` wrote, or an id on the Hub.
        base: the weights in front of the cut: a folder, an id on the Hub, or a model, which is changed in place and
            returned. By default the base that the head names, at the commit that it names.
        revision: commit, branch or tag of the head on the Hub.
        device_map: where the model goes, as for `from_pretrained`.
        dtype: of the weights; by default that in which the head was trained. Another one rounds.
        token: for the Hub.
        cache_dir: of downloads.

    Returns:
        The model: of Transformers, or what `wrap_classifier` returns.

    Raises:
        HeadError: if head and base do not fit; the message says what differs and what to do. A model that was given is
            unchanged then.
    """
    folder = fetch_head(directory_or_id, revision, token, cache_dir)
    config = HeadConfig.read(folder / HEAD_CONFIG)
    given = base if isinstance(base, nn.Module) else None
    if given is None and config.recipe.kind == "own":
        raise HeadError(
            f"{config.recipe.architecture} is no model that can be made of settings: pass one, with the weights that "
            "it had when the training began: load_head(…, base=model)."
        )
    check_weights(folder / HEAD_WEIGHTS, config)
    if given is not None:
        weights = safetensors.torch.load_file(folder / HEAD_WEIGHTS)
        return _put_on_model(given, config, weights, dtype, device_map)
    source = _source(config, base, token, cache_dir)
    values = check_size(config.recipe, config.names, {name: shape for name, (_, shape) in config.tensors.items()})
    if source is not None:
        check_base_size(source, values)
    weights = safetensors.torch.load_file(folder / HEAD_WEIGHTS)
    kind = _dtype(dtype)
    trained_kind = getattr(torch, config.recipe.dtype)
    other = kind is not None and kind != trained_kind
    model = _make(config, source, None if other else device_map)
    _check_base(model, config, weights, str(getattr(source, "name", None)))
    if other:
        model = _make(config, source, device_map, kind)
    assign(model, weights, kind if other else None)
    return model


def fetch_head(
    directory_or_id: str | os.PathLike,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    with_processor: bool = False,
) -> Path:
    """The folder with the files of a head, those on the Hub downloaded.

    Args:
        directory_or_id: this and those that follow as for `load_head`.
        revision: on the Hub.
        token: for the Hub.
        cache_dir: of downloads.
        with_processor: whether the files of the image processor or tokenizer are wanted as well.

    Raises:
        HeadError: if there is none.
    """
    name = os.fspath(directory_or_id)
    if os.path.isdir(name):
        return Path(name)
    if not is_repo_id(name):
        raise HeadError(f"there is no head in {name}: it is no folder, and no id on the Hub (owner/name).")
    cache = None if cache_dir is None else os.fspath(cache_dir)
    try:

        def download(file: str) -> Path:
            return Path(hf_hub_download(name, file, revision=revision, token=token, cache_dir=cache))

        config = download(HEAD_CONFIG)
        for file in (HEAD_WEIGHTS, *(HeadConfig.read(config).processor_files if with_processor else ())):
            download(file)
    except EntryNotFoundError as error:
        raise HeadError(
            f"{name} on the Hub holds no head ({HEAD_CONFIG}, {HEAD_WEIGHTS}). A whole model is loaded with the "
            "from_pretrained of its class."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise HeadError(f"the head {name} cannot be read from the Hub: {shortened(error, token)}") from error
    return config.parent


def check_weights(path: Path, config: HeadConfig) -> None:
    """Checks that the file is the one that the configuration describes, before its content is read.

    Raises:
        HeadError: if it is missing, damaged, or another one.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}
            described = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in found.items()}
    except FileNotFoundError as error:
        raise HeadError(f"there is no head in {path.parent}: it has no file {path.name}.") from error
    except Exception as error:  # of a parser of files that anybody may have written
        raise HeadError(f"{path} is no file of safetensors ({type(error).__name__}: {str(error)[:200]}).") from error
    missing, unexpected = sorted(config.tensors.keys() - found.keys()), sorted(found.keys() - config.tensors.keys())
    for problem, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise HeadError(
                f"{path} {problem} {len(names)} tensors, e.g. {', '.join(names[:3])}: it does not belong to "
                f"{HEAD_CONFIG}. Save or download the head again."
            )
    shapes = {name: shape for name, (_, shape) in described.items()}
    if shapes != {name: shape for name, (_, shape) in config.tensors.items()} or (
        file_sha256(path) != config.weights_sha256
    ):
        raise HeadError(
            f"{path} is not the file that {HEAD_CONFIG} describes: it was damaged, or a copy was broken off. Save or "
            "download the head again."
        )


def _source(config: HeadConfig, base: Any, token: Any, cache_dir: Any) -> Source | None:
    """Where the base is; None if the head has everything."""
    cache = None if cache_dir is None else os.fspath(cache_dir)
    if base is not None:
        name = os.fspath(base)
        pinned = config.base_revision if name == config.base and not os.path.isdir(name) else None
        return Source(name, pinned, token, cache)
    if not config.needs_base:
        return None
    if config.base is None:
        raise HeadError(
            "the head does not name the base that it was trained on, as that has no name on the Hub: pass the folder, "
            f"id or model with the weights in front of its cut: load_head(…, base=…). Their digest is {config.sha256}."
        )
    return Source(config.base, config.base_revision, token, cache)


def _make(config: HeadConfig, source: Source | None, device_map: Any, dtype: torch.dtype | None = None) -> nn.Module:
    if source is not None:
        return build_on(config.recipe, source, device_map=device_map, dtype=dtype)
    if isinstance(device_map, Mapping) or device_map == "auto":
        raise HeadError("this head holds the whole model, which is on one device: pass a device as device_map.")
    model = build(config.recipe)
    return model if device_map is None else model.to(device_map)


def _check_base(model: nn.Module, config: HeadConfig, weights: Mapping[str, torch.Tensor], base: str) -> None:
    """Checks that with the head on it a model has the tensors that were trained on."""
    check_plain(model)
    own = named_tensors(model)
    what = f"the base {base}" if base != "None" else "the model"
    check_tensors(own, config.names, {name: tuple(value.shape) for name, value in weights.items()}, what)
    merged = {**own, **weights}
    found = [
        Part(part.name, part.tensors, tensors_sha256({name: merged[name] for name in part.tensors}))
        for part in config.parts
    ]
    other = [part.name for part, now in zip(config.parts, found, strict=True) if part.sha256 != now.sha256]
    if other:
        raise HeadError(
            f"{what} is not the one that the head was trained on: its weights in front of the cut have the digest "
            f"{total_sha256(found)}, those that the head was trained on {config.sha256}. {len(other)} of "
            f"{len(found)} parts differ: {', '.join(other[:5])}{', …' if len(other) > 5 else ''}. Pass the base "
            f"{_named(config)}, with the same dtype ({config.recipe.dtype}): load_head(…, base=…)."
        )
    if tensors_sha256({name: merged[name] for name in config.computed}) != config.computed_sha256:
        raise HeadError(
            f"{what} has other buffers that its library computes ({', '.join(config.computed[:3])}) than the trained "
            f"model: install the releases with which the head was made ({_versions(config)})."
        )


def _put_on_model(
    model: nn.Module, config: HeadConfig, weights: Mapping[str, torch.Tensor], dtype: Any, device_map: Any
) -> nn.Module:
    if dtype is not None or device_map is not None:
        raise HeadError("a model that is given keeps its dtype and device: pass base= alone, and change it then.")
    name = type(model).__name__
    if config.recipe.kind != "timm" and name != config.recipe.architecture:
        raise HeadError(f"the head is one of a {config.recipe.architecture}, not of a {name}.")
    _check_base(model, config, weights, f"{name} that was given")
    kinds = {key: dtype_name(named_tensors(model)[key].dtype) for key in weights}
    other = [key for key, value in weights.items() if kinds[key] != dtype_name(value.dtype)]
    if other:
        raise HeadError(
            f"{name} has {other[0]} in {kinds[other[0]]}, the head has it in {dtype_name(weights[other[0]].dtype)}: "
            "convert the model first."
        )
    assign(model, weights)
    own = getattr(model, "config", None)
    if own is not None and config.id2label is not None:
        own.id2label = {int(key): label for key, label in config.id2label.items()}
        own.label2id = {label: key for key, label in own.id2label.items()}
    return model


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is no dtype of weights, such as torch.bfloat16.")
    return kind


def _named(config: HeadConfig) -> str:
    if config.base is None:
        return "whose weights the training began with"
    return f"{config.base}{'' if config.base_revision is None else f' at commit {config.base_revision}'}"


def _versions(config: HeadConfig) -> str:
    return ", ".join(f"{name} {version}" for name, version in config.libraries.items())
