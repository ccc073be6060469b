"""`head_config.json`: what a head is the head of. Anybody may have written it, so nothing in it is believed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from .errors import HeadError
from .tensors import Part, total_sha256

FORMAT_VERSION = 1
HEAD_CONFIG, HEAD_WEIGHTS, CARD = "head_config.json", "head.safetensors", "README.md"
#: Largest file that is read: the names of some ten thousand tensors and labels.
_MOST_BYTES = 16 * 2**20
#: Largest number of a configuration; angles, seeds and token ids may be larger.
_MOST = 2**24
_DTYPES = {"float64", "float32", "bfloat16", "float16"}
KINDS = ("transformers", "timm", "own")
ATTENTIONS = ("eager", "sdpa")

#: Settings of a model's configuration with which a library fetches something or runs other code than its own.
_ACTIVE = re.compile(
    r"^_|implementation|auto_map|kernel|quantization|trust_remote|custom_pipelines|fusion_config|extra_.*files|"
    r"name_or_path|^transformers_weights$|checkpoint_path|cache_dir|^pretrained$|pretrained_cfg_overlay|^per_layer_config$"
)
_ANY_SIZE = re.compile(r"theta|seed|_id$|_ids$")
_LABELS = ("id2label", "label2id")
#: Settings that name an architecture of timm.
_ARCHITECTURES = ("architecture", "backbone")


@dataclass(frozen=True)
class Recipe:
    """How the model of a head is made.

    Args:
        kind: `transformers` for a class of Transformers, `timm` for one of timm in `wrap_classifier`, `own` for any
            other, which has to be given.
        architecture: name of the class, or of timm's architecture.
        model_type: that of the configuration; None if it has none.
        config: settings of the model's configuration.
        attention: how attention was computed; None for the default.
        dtype: of the prefix, e.g. `float32`.
    """

    kind: str
    architecture: str
    model_type: str | None
    config: dict[str, Any]
    attention: str | None
    dtype: str


@dataclass(frozen=True)
class HeadConfig:
    """What a head is the head of.

    Args:
        recipe: how its model is made.
        base: id on the Hub of the weights in front of the cut; None if it has none there.
        base_revision: commit of the base.
        cut: number of blocks in front of the head.
        blocks: names of all blocks.
        parts: the tensors in front of the cut.
        computed: names of buffers that are not saved with a model and that the base has as well.
        computed_sha256: digest of them.
        tensors: name -> dtype and shape of what is in `head.safetensors`.
        weights_sha256: digest of that file.
        num_labels: outputs of a classifier; None if it is none.
        id2label: their names.
        libraries: versions with which it was made.
        processor_files: files of an image processor or tokenizer beside it.
    """

    recipe: Recipe
    base: str | None
    base_revision: str | None
    cut: int
    blocks: list[str]
    parts: list[Part]
    computed: list[str]
    computed_sha256: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    weights_sha256: str
    num_labels: int | None = None
    id2label: dict[str, str] | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    processor_files: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """All files of the head, in the order in which they are written."""
        return [*self.processor_files, CARD, HEAD_CONFIG, HEAD_WEIGHTS]

    @property
    def sha256(self) -> str:
        """Digest of the prefix as the head was trained on it."""
        return total_sha256(self.parts)

    @property
    def needs_base(self) -> bool:
        """Whether something in front of the cut is not in the head's file."""
        return not all(part.included for part in self.parts)

    @property
    def names(self) -> set[str]:
        """Names of all tensors of the model."""
        return {*self.tensors, *self.computed, *(name for part in self.parts for name in part.tensors)}

    def to_json(self) -> str:
        """The text of the file."""
        content = {"format_version": FORMAT_VERSION, **asdict(self), "prefix_sha256": self.sha256}
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> HeadConfig:
        """Reads a file.

        Raises:
            HeadError: if it is missing, of another version, or not what `save_head` writes.
        """
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise HeadError(f"{path} has {path.stat().st_size:,} bytes: no head has so much to tell.")
            content = json.loads(path.read_bytes().decode("utf-8"))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise HeadError(f"there is no head in {path.parent}: it has no file {path.name}.") from error
        except (ValueError, RecursionError) as error:
            raise HeadError(f"{path} is not JSON that `save_head` writes ({type(error).__name__}).") from error
        if not isinstance(content, dict):
            raise HeadError(f"{path} holds no JSON object.")
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise HeadError(
                f"{path} has format version {str(version)[:100]}; this release reads version {FORMAT_VERSION}: "
                "install the release that wrote it."
            )
        return cls._from_content(content, path)

    @classmethod
    def _from_content(cls, content: dict[str, Any], path: Path) -> HeadConfig:
        digest = content.pop("prefix_sha256", None)
        _check_fields(content, _FIELDS, {entry.name for entry in fields(cls)}, path)
        _check_fields(content["recipe"], _RECIPE, {entry.name for entry in fields(Recipe)}, path)
        content["recipe"] = Recipe(**content["recipe"])
        _check_settings(content["recipe"].config, path)
        content["parts"] = [Part(**{**part, "tensors": tuple(part["tensors"])}) for part in content["parts"]]
        content["tensors"] = {name: (kind, tuple(shape)) for name, (kind, shape) in content["tensors"].items()}
        config = cls(**content)
        if digest != config.sha256:
            raise HeadError(f"{path}: `prefix_sha256` is not that of its parts: it was edited or damaged.")
        if config.cut > len(config.blocks):
            raise HeadError(f"{path}: cut {config.cut} is not one of {len(config.blocks)} blocks.")
        outside = [name for part in config.parts for name in part.tensors if part.included != (name in config.tensors)]
        if outside or set(config.computed) & set(config.tensors):
            raise HeadError(f"{path} contradicts itself on what is in {HEAD_WEIGHTS}.")
        return config


def passive_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that `read` refuses: what to fetch or run is not a head's matter."""
    return {
        name: passive_settings(value) if isinstance(value, dict) and name not in _LABELS else value
        for name, value in settings.items()
        if not _ACTIVE.search(str(name))
    }


def _check_settings(settings: Any, path: Path, name: str = "config", depth: int = 0) -> None:
    if depth > 20:
        raise HeadError(f"{path}: the settings of the model are nested too deeply.")
    if isinstance(settings, dict):
        for key, value in settings.items():
            if _ACTIVE.search(key):
                raise HeadError(
                    f"{path}: the setting {key[:100]!r} could fetch something or run other code than that of the "
                    "installed libraries: a head must not have it."
                )
            if key in _ARCHITECTURES and not (value is None or _is_architecture(value)):
                raise HeadError(f"{path}: {key}={str(value)[:100]!r} is no name of an architecture.")
            if key in _LABELS:
                if not _is_labels(value) and not _is_numbers_of_labels(value):
                    raise HeadError(f"{path}: {key} holds no labels.")
                continue
            if key == "use_pretrained_backbone" and value:
                raise HeadError(f"{path}: use_pretrained_backbone would fetch weights: a head must not have it.")
            _check_settings(value, path, key, depth + 1)
    elif isinstance(settings, list):
        for value in settings:
            _check_settings(value, path, name, depth + 1)
    elif isinstance(settings, (int, float)) and not isinstance(settings, bool):
        if not math.isfinite(settings) or (abs(settings) > _MOST and not _ANY_SIZE.search(name)):
            raise HeadError(f"{path}: {name[:100]}={str(settings)[:40]} is no size of a model.")
    elif not (settings is None or isinstance(settings, (str, bool))):
        raise HeadError(f"{path}: the setting {name[:100]!r} is no JSON value.")


def _check_fields(content: Any, checks: dict[str, Callable[[Any], bool]], names: set[str], path: Path) -> None:
    if not isinstance(content, dict) or content.keys() != names:
        raise HeadError(f"{path} has other fields than `save_head` writes: it was edited or damaged.")
    for name, is_valid in checks.items():
        if not is_valid(content[name]):
            raise HeadError(f"{path}: {name!r} is not what a head holds there: it was edited or damaged.")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w[\w.\-]{0,499}", value, re.ASCII) is not None


def _is_architecture(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\w[\w.]{0,199}", value, re.ASCII) is not None


def _is_repo(value: Any) -> bool:
    """Whether a value is `name` or `owner/name` as the Hub has them: never a path that leads elsewhere."""
    part = r"[A-Za-z0-9](?:[\w\-]|\.(?!\.)){0,95}"
    return isinstance(value, str) and re.fullmatch(f"{part}(?:/{part})?", value, re.ASCII) is not None


def is_repo_id(value: str) -> bool:
    """Whether a text is an id on the Hub, `name` or `owner/name`."""
    return _is_repo(value)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_commit(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{40}", value) is not None


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= _MOST


def _is_names(value: Any, least: int = 0) -> bool:
    return (
        isinstance(value, list) and len(value) >= least and all(map(_is_name, value)) and len(set(value)) == len(value)
    )


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(size) is int and 0 <= size <= 2**40 for size in value)
        and math.prod(value) <= 2**44
    )


def _is_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_name(name)
        and isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(getattr(torch, entry[0], None), torch.dtype)
        and _is_shape(entry[1])
        for name, entry in value.items()
    )


def _is_parts(value: Any) -> bool:
    if not isinstance(value, list) or not all(
        isinstance(part, dict)
        and part.keys() == {"name", "tensors", "sha256", "included"}
        and _is_name(part["name"])
        and _is_names(part["tensors"], least=1)
        and _is_sha256(part["sha256"])
        and type(part["included"]) is bool
        for part in value
    ):
        return False
    names = [name for part in value for name in part["tensors"]]
    return len(set(names)) == len(names)


def _is_labels(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(
            re.fullmatch("[0-9]{1,8}", key) and isinstance(name, str) and len(name) <= 1000
            for key, name in value.items()
        )
    )


def _is_numbers_of_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(number) for number in value.values())


def _is_files(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(name, str)
        and all(map(_is_name, name.split("/")))
        and not {CARD, HEAD_CONFIG, HEAD_WEIGHTS} & {name}
        for name in value
    )


def _is_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_name(name) and isinstance(version, str) and len(version) <= 100 and version.isprintable()
        for name, version in value.items()
    )


#: Field of a head's configuration -> whether a JSON value may be its own.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "base": lambda value: value is None or _is_repo(value),
    "base_revision": lambda value: value is None or _is_commit(value),
    "cut": lambda value: _is_count(value, least=1),
    "blocks": lambda value: _is_names(value, least=1),
    "parts": _is_parts,
    "computed": _is_names,
    "computed_sha256": _is_sha256,
    "tensors": _is_tensors,
    "weights_sha256": _is_sha256,
    "num_labels": lambda value: value is None or _is_count(value),
    "id2label": _is_labels,
    "libraries": _is_versions,
    "processor_files": _is_files,
}
_RECIPE: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: isinstance(value, str) and value in KINDS,
    "architecture": _is_architecture,
    "model_type": lambda value: value is None or (isinstance(value, str) and _is_name(value)),
    "config": lambda value: isinstance(value, dict),
    "attention": lambda value: value is None or (isinstance(value, str) and value in ATTENTIONS),
    "dtype": lambda value: isinstance(value, str) and value in _DTYPES,
}
