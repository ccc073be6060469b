"""Loading the weights of a checkpoint into a model: all of them, or none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    is_peft_available,
    logging,
)

from ..rng import preserve_rng

logger = logging.get_logger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint does not hold the weights of the model; the message names the keys."""


def has_weights(directory: str | Path) -> bool:
    """Whether a checkpoint holds the weights of a whole model, not those of an adapter or of a sharded wrapper."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    return any((Path(directory) / name).is_file() for name in names)


def is_adapter(model: nn.Module) -> bool:
    """Whether a model is wrapped by PEFT, whose checkpoints hold the adapters only."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def loads_in_its_own_way(model: nn.Module) -> bool:
    """Whether a model, or a module of it, changes how torch loads a `state_dict`: what fits it is its own matter."""
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        return True
    for module in model.modules():
        owner = next(cls for cls in type(module).__mro__ if "_load_from_state_dict" in vars(cls))
        if owner.__module__.partition(".")[0] not in ("torch", "transformers") or module._load_state_dict_pre_hooks:
            return True
    return False


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Loads the weights of a checkpoint into a model.

    `save_pretrained` writes the key names of a model's first release. `Trainer` loads them without converting them and
    not strictly: for several models it leaves most weights unchanged and only warns. Here Transformers' own conversion
    is applied to the names, and a missing or unexpected key is an error.

    Args:
        model: the model; changed in place.
        directory: the checkpoint.

    Raises:
        CheckpointError: if a weight is missing, unexpected or of another shape; the model is unchanged then.
    """
    expected = model.state_dict()
    state_dict = _read(Path(directory))
    if set(state_dict) - set(expected) and isinstance(model, PreTrainedModel):
        state_dict = _converted(model, directory, state_dict)
    present = {expected[key].data_ptr() for key in state_dict if key in expected}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    missing = [
        key
        for key, value in expected.items()
        if key not in state_dict and value.data_ptr() not in present and key not in ignored
    ]
    unexpected = [key for key in state_dict if key not in expected]
    misshapen = [key for key in state_dict if key in expected and state_dict[key].shape != expected[key].shape]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        summary = "; ".join(f"{len(keys)} {kind}, e.g. {keys[:3]}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"the checkpoint {directory} does not fit the model: {summary}.")
    model.load_state_dict(state_dict, strict=False)


def _read(directory: Path) -> dict[str, torch.Tensor]:
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (directory / single).is_file():
            return _read_file(directory / single)
        if (directory / index).is_file():
            shards = sorted(set(json.loads((directory / index).read_text())["weight_map"].values()))
            return {key: value for shard in shards for key, value in _read_file(directory / shard).items()}
    raise CheckpointError(f"no weights in {directory}.")


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path, device="cpu")
    return torch.load(path, map_location="cpu", weights_only=True)


def _converted(model: PreTrainedModel, directory: str | Path, raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the model's own key names."""
    # `save_pretrained` renames keys with this function. Its output for marked tensors shows which key became which.
    marks = {key: torch.empty(1) for key in model.state_dict()}
    own = {id(mark): key for key, mark in marks.items()}
    saved = revert_weight_conversion(model, dict(marks))
    if all(id(mark) in own for mark in saved.values()):
        names = {key: own[id(mark)] for key, mark in saved.items()}
        return {names.get(key, key): value for key, value in raw.items()}
    return _converted_by_twin(model, directory, raw)


def _converted_by_twin(
    model: PreTrainedModel, directory: str | Path, raw: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights under the model's own key names, from a second instance: for models saved with merged tensors."""
    with preserve_rng():
        loaded = type(model).from_pretrained(
            directory,
            config=copy.deepcopy(model.config),
            dtype=model.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    # Annotated as the model alone, whatever `output_loading_info` is.
    twin, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    missing = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    converted = {key: value for key, value in twin.state_dict().items() if key not in missing}
    # Modules that the user added to the architecture are not in the twin; they are saved under their own names.
    converted.update({key: raw.get(key, torch.empty(0)) for key in info["unexpected_keys"]})
    return converted
