"""Loading a checkpoint's weights into a model, completely or not at all."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

from .rng import preserve_rng

logger = logging.get_logger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint does not hold the weights of the model; the message names them."""


def has_weights(directory: str | Path) -> bool:
    """Whether a checkpoint holds the weights of a whole model (not of an adapter or of a sharded wrapper)."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    return any((Path(directory) / name).is_file() for name in names)


def load_weights(model: nn.Module, directory: str | Path) -> None:
    """Loads a checkpoint's weights into the model.

    `save_pretrained` writes the key names of the first release of a model, and `Trainer` loads them unconverted and
    not strictly: for several models most weights stay what they were, with a warning. Here the names go through
    Transformers' own conversion, and a missing or unexpected key is an error.

    Raises:
        CheckpointError: if a weight is missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    state_dict = _read(Path(directory))
    if set(state_dict) - set(expected) and isinstance(model, PreTrainedModel):
        state_dict = _converted(model, directory, state_dict)
    try:
        result = model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint {directory} does not fit the model: {error}") from error
    present = {expected[key].data_ptr() for key in state_dict if key in expected}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    missing = [key for key in result.missing_keys if expected[key].data_ptr() not in present and key not in ignored]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"the checkpoint {directory} does not fit the model: missing {missing[:5]} ({len(missing)} in all), "
            f"unexpected {result.unexpected_keys[:5]} ({len(result.unexpected_keys)} in all)."
        )


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
    """The weights under the model's own key names, renamed by Transformers on a second instance."""
    with preserve_rng():
        twin, info = type(model).from_pretrained(
            directory,
            config=copy.deepcopy(model.config),
            dtype=model.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    lost = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    converted = {key: value for key, value in twin.state_dict().items() if key not in lost}
    # What the user added to the architecture is not in the twin, but is saved under its own name.
    converted.update({key: raw[key] for key in info["unexpected_keys"] if key in raw})
    return converted
