"""Making the model of a head: of its recipe, and the weights of a base. No code and no pickle is ever fetched."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, find_adapter_config_file, logging

from ..model.classifiers import ImageClassifier, wrap_classifier
from ..rng import preserve_rng
from ..units import show_bytes
from .errors import HeadError, cause_to_show, shortened
from .head_config import ATTENTIONS, Recipe, is_repo_id, passive_settings
from .tensors import dtype_name, named_tensors

#: Values of buffers that a library computes, for which a base need not have a byte each.
_MOST_COMPUTED = 2**26


@dataclass(frozen=True)
class Source:
    """Where the weights of a base are.

    Args:
        name: a folder, or an id on the Hub.
        revision: commit, branch or tag on the Hub; None for the newest.
        token: for the Hub.
        cache_dir: of downloads.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return Path(self.name).is_dir()

    def download(self, file: str) -> Path:
        """The path of one of its files.

        Raises:
            OSError: if it has no such file, or cannot be reached.
        """
        if self.is_folder:
            path = Path(self.name) / file
            if not path.is_file():
                raise FileNotFoundError(f"{self.name} has no file {file}")
            return path
        return Path(
            hf_hub_download(self.name, file, revision=self.revision, token=self.token, cache_dir=self.cache_dir)
        )

    def pinned(self) -> Source:
        """The same source at the commit that it has now.

        Raises:
            OSError: if it cannot be reached.
        """
        if self.is_folder:
            return self
        path = self.download("config.json")  # .../snapshots/<commit>/config.json
        return Source(self.name, path.parent.name, self.token, self.cache_dir)


def recipe_of(model: nn.Module, dtype: torch.dtype) -> Recipe:
    """How a model can be made again, as far as that is known.

    Args:
        model: not wrapped by a trainer.
        dtype: of its prefix.
    """
    kind, architecture, model_type, settings, attention = "own", type(model).__name__, None, {}, None
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        model_type = config.model_type or None
        if isinstance(model, PreTrainedModel) and getattr(transformers, architecture, None) is type(model):
            kind, settings = "transformers", passive_settings(_json_of(config))
            attention = getattr(config, "_attn_implementation", None)
    elif isinstance(model, ImageClassifier):
        name = getattr(model.model, "pretrained_cfg", {}).get("architecture")
        if name is not None and not (model.loss is not None and named_tensors(model.loss)):
            kind, architecture, settings = "timm", name, {"num_classes": model.num_classes}
    return Recipe(
        kind,
        architecture,
        model_type,
        settings,
        attention if attention in ATTENTIONS else None,
        dtype_name(dtype),
    )


def base_of(model: nn.Module) -> str | None:
    """The name of the weights with which a model was loaded, a folder or an id on the Hub; None if it tells none."""
    if isinstance(model, ImageClassifier):
        name = getattr(model.model, "pretrained_cfg", {}).get("hf_hub_id")
    else:
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    return name if Path(name).is_dir() or is_repo_id(name) else None


def check_size(recipe: Recipe, names: set[str], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Checks, before anything takes memory, that a recipe makes a model with the tensors that a head speaks of.

    Args:
        recipe: of the kind `transformers` or `timm`.
        names: of all its tensors.
        shapes: of those that are known.

    Returns:
        Number of values in all others, which the base has, or the library computes.

    Raises:
        HeadError: if it cannot be made, has other tensors, or would not fit this machine.
    """
    with _limited(4 * len(names) + 100, psutil.virtual_memory().total):
        twin = build(recipe, device="meta")
    tensors = named_tensors(twin)
    check_tensors(tensors, names, shapes, f"a {recipe.architecture} of this release of its library")
    return sum(value.numel() for name, value in tensors.items() if name not in shapes)


def check_base_size(source: Source, values: int) -> None:
    """Checks that a base has as many values as are wanted of it: what it has not would be made up, of any size.

    Args:
        source: the base.
        values: that it must have; a few more are computed.

    Raises:
        HeadError: if it has less, or no safetensors.
    """
    try:
        bytes_of_base = _bytes_of_weights(source)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_loaded(source, error) from cause_to_show(error, source.token)
    if values > bytes_of_base + _MOST_COMPUTED:
        raise HeadError(
            f"the base {source.name} is too small for the head: {values:,} values are wanted of it, and its weights "
            f"have {show_bytes(bytes_of_base)}. Pass the base that the head was trained on: load_head(…, base=…)."
        )


def _bytes_of_weights(source: Source) -> int:
    try:
        return source.download(SAFE_WEIGHTS_NAME).stat().st_size
    except (FileNotFoundError, EntryNotFoundError):
        index = json.loads(source.download(SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        return sum(source.download(name).stat().st_size for name in sorted(set(index["weight_map"].values())))


def check_tensors(
    tensors: Mapping[str, torch.Tensor], names: set[str], shapes: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Checks names and shapes.

    Raises:
        HeadError: if a name is missing or unexpected, or a shape another one; the message names some.
    """
    missing, unexpected = sorted(set(tensors) - names), sorted(names - set(tensors))
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    problems = {
        "has tensors that the head does not know": missing,
        "lacks tensors of the head": unexpected,
        "has other shapes": misshapen,
    }
    if any(problems.values()):
        told = "; ".join(f"{problem} ({len(of)}: {', '.join(of[:3])})" for problem, of in problems.items() if of)
        raise HeadError(
            f"the head does not fit: {what} {told}. Use the releases of the libraries in head_config.json, and a base "
            "of the same architecture with as many labels."
        )


def build(recipe: Recipe, device: str = "cpu") -> nn.Module:
    """A model of a recipe with the weights of an initialization, or without any (device `meta`), in eval mode.

    Raises:
        HeadError: if the recipe is not one of an installed library.
    """
    with _translated(recipe), preserve_rng(), quiet():
        if recipe.kind == "timm":
            import timm

            name, classes = recipe.architecture, recipe.config.get("num_classes")
            _check_timm(name)
            with torch.device(device), _default_dtype(recipe.dtype):
                model: nn.Module = wrap_classifier(timm.create_model(name, pretrained=False, num_classes=classes))
        else:
            cls, config = class_of(recipe), config_of(recipe)
            with torch.device(device), _default_dtype(recipe.dtype):
                model = cls(config)
        return model.eval()


def build_on(recipe: Recipe, source: Source, **loading: Any) -> nn.Module:
    """A model of a recipe with the weights of a base, in eval mode.

    What the base has not is that of an initialization.

    Args:
        recipe: of the kind `transformers` or `timm`.
        source: the base; its weights are safetensors.
        loading: `device_map` and `dtype` for `from_pretrained`.

    Raises:
        HeadError: if the base cannot be reached, or has no safetensors.
    """
    dtype = loading.pop("dtype", None) or getattr(torch, recipe.dtype)
    if source.revision is not None:
        loading["revision"] = source.revision
    if recipe.attention is not None:
        loading["attn_implementation"] = recipe.attention
    try:
        with preserve_rng(), quiet():
            if recipe.kind == "timm":
                return _build_timm(recipe, source, dtype, loading.get("device_map"))
            _refuse_adapters(source)
            return class_of(recipe).from_pretrained(
                source.name,
                config=config_of(recipe),
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                token=source.token,
                cache_dir=source.cache_dir,
                **loading,
            )
    except HeadError:
        raise
    except Exception as error:  # whatever a library makes of files that anybody may have written
        raise _not_loaded(source, error) from cause_to_show(error, source.token)


def _not_loaded(source: Source, error: Exception) -> HeadError:
    return HeadError(
        f"the base {source.name}{'' if source.revision is None else f' at {source.revision}'} cannot be loaded "
        f"({type(error).__name__}: {shortened(error, source.token)}). Only safetensors are read. If it is elsewhere, "
        "or has another name: load_head(…, base=folder or id)."
    )


def class_of(recipe: Recipe) -> type[PreTrainedModel]:
    """The class of Transformers that a recipe names.

    Raises:
        HeadError: if it names something else.
    """
    cls = getattr(transformers, recipe.architecture, None) if "." not in recipe.architecture else None
    kind = None if cls is None else getattr(cls, "config_class", None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel) or kind is None:
        raise HeadError(
            f"{recipe.architecture} is not a model of the installed Transformers {transformers.__version__}: install "
            "the release in head_config.json. Code from elsewhere is never run."
        )
    if kind.model_type != recipe.model_type:
        raise HeadError(f"{recipe.architecture} is a model of type {kind.model_type!r}, not {recipe.model_type!r}.")
    return cls


def config_of(recipe: Recipe) -> PretrainedConfig:
    """The configuration of a recipe.

    Raises:
        HeadError: if its settings are not possible.
    """
    with _translated(recipe):
        if "architecture" in recipe.config:
            _check_timm(recipe.config["architecture"])
        config = class_of(recipe).config_class.from_dict(recipe.config)  # type: ignore[union-attr]
        if recipe.attention is not None:
            config._attn_implementation = recipe.attention
        return config


def assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Gives tensors of a model other values, shapes being equal; shared and tied ones stay so.

    Args:
        model: changed in place.
        tensors: values by name, in the dtype that the model's will have.
        dtype: another one for numbers with a point.
    """
    own = named_tensors(model)
    with torch.no_grad():
        for name, value in tensors.items():
            kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
            own[name].data = value.to(own[name].device, kind, copy=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, Transformers does not report which weights a base has not: here that is compared."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_adapters(source: Source) -> None:
    """`from_pretrained` would load adapters beside a base, and take another base that they name."""
    found = find_adapter_config_file(
        source.name, revision=source.revision, token=source.token, cache_dir=source.cache_dir
    )
    if found is not None:
        raise HeadError(
            f"the base {source.name} has adapters of PEFT beside it: pass a base without, or load a model yourself: "
            "load_head(…, base=model)."
        )


def _build_timm(recipe: Recipe, source: Source, dtype: torch.dtype, device_map: Any) -> nn.Module:
    import timm

    _check_timm(recipe.architecture)
    weights = source.download(SAFE_WEIGHTS_NAME)
    model = timm.create_model(
        recipe.architecture,
        pretrained=True,
        num_classes=recipe.config.get("num_classes"),
        pretrained_cfg_overlay={"file": str(weights)},
    )
    if isinstance(device_map, Mapping):
        raise HeadError("a model of timm is on one device: pass device_map='cuda:0' or another device.")
    return wrap_classifier(model).to(dtype).to(device_map if device_map not in (None, "auto") else "cpu").eval()


def _check_timm(name: Any) -> None:
    import timm

    if not isinstance(name, str) or ":" in name or "/" in name or not timm.is_model(name.partition(".")[0]):
        raise HeadError(f"{str(name)[:100]!r} is not an architecture of the installed timm {timm.__version__}.")


@contextlib.contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    """Inside, new parameters have this dtype; buffers of which a model's code says another one keep that."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _translated(recipe: Recipe) -> Iterator[None]:
    """Whatever settings that anybody may have written make a library raise is a `HeadError`."""
    try:
        yield
    except (HeadError, MemoryError):
        raise
    except Exception as error:
        raise HeadError(
            f"no {recipe.architecture} can be made of the settings in head_config.json "
            f"({type(error).__name__}: {str(error)[:500]})."
        ) from error


@contextlib.contextmanager
def _limited(parameters: int, most_bytes: int) -> Iterator[None]:
    """Inside, no model gets more parameters than that, nor more bytes."""
    count, total = 0, 0

    def note(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, total
        if parameter is None:
            return
        count, total = count + 1, total + math.prod(parameter.shape) * parameter.element_size()
        if count > parameters or total > most_bytes:
            raise HeadError(
                "the settings in head_config.json describe a model with more parameters than the head speaks of, or "
                f"than this machine has memory for ({show_bytes(most_bytes)})."
            )

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _json_of(config: PretrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))
