"""The tensors of a model by name, those in front of a cut by block, and digests of them that any machine computes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..cache.value_digest import tensor_memory
from ..model.chain import BlockChain
from ..model.checkpoint import is_adapter
from .errors import HeadError


@dataclass(frozen=True)
class Part:
    """Tensors in front of the cut that belong together: those of a block, or one that belongs to no block.

    Args:
        name: of the block, or of the tensor.
        tensors: their names, sorted.
        sha256: digest of them, see `tensors_sha256`.
        included: whether the head has them, as they differ from the base's.
    """

    name: str
    tensors: tuple[str, ...]
    sha256: str
    included: bool = False


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a model by name, shared ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def saved_names(model: nn.Module) -> set[str]:
    """The names of a model's `state_dict`, for which other modules have another name of the same tensor included.

    Raises:
        HeadError: if something in it is no tensor.
    """
    state = model.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise HeadError(
            f"the state_dict of {type(model).__name__} holds more than tensors ({', '.join(others[:3])}): a head is "
            "made of tensors. Save the whole model as its library does."
        )
    return set(state)


def check_plain(model: nn.Module) -> None:
    """Checks that the tensors of a model are all there and are numbers as they are.

    Raises:
        HeadError: for adapters, quantized weights and tensors without data; the message says what to do.
    """
    name = type(model).__name__
    if is_adapter(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise HeadError(
            f"{name} has adapters of PEFT, which are smaller than a head already: save them with "
            "model.save_pretrained, or merge them first (model = model.merge_and_unload())."
        )
    tensors = named_tensors(model)
    odd = [
        key for key, value in tensors.items() if value.is_quantized or type(value) not in (torch.Tensor, nn.Parameter)
    ]
    odd += [key for key, value in tensors.items() if value.layout != torch.strided]
    if odd or getattr(model, "hf_quantizer", None) is not None:
        raise HeadError(
            f"{name} has weights that are quantized or in a layout of their own{f' ({odd[0]})' if odd else ''}: "
            "their library saves and loads them. Save the whole model with model.save_pretrained."
        )
    empty = [key for key, value in tensors.items() if value.is_meta]
    if empty:
        raise HeadError(
            f"'{empty[0]}' of {name} has no data on this device (meta, or offloaded): load the model without "
            "offloading first."
        )


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of the names, dtypes, shapes and bytes of tensors: 64 hexadecimal digits.

    It is the SHA-256 of, for each name in sorted order, the line `name|dtype|shape` and the bytes in the order of the
    values, little-endian.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}|{dtype_name(tensors[name].dtype)}|{list(tensors[name].shape)}\n".encode())
        total.update(tensor_memory(tensors[name]))
    return total.hexdigest()


def total_sha256(parts: Iterable[Part]) -> str:
    """Digest of the whole prefix: the SHA-256 of a line `name|sha256` for each part, in their order."""
    return hashlib.sha256("".join(f"{part.name}|{part.sha256}\n" for part in parts).encode()).hexdigest()


def prefix_parts(chain: BlockChain, cut: int) -> list[Part]:
    """The tensors in front of a cut by part, blocks first and in their order."""
    names = {module: name for name, module in chain.model.named_modules()}
    tensors = chain.prefix_state(cut)
    found: dict[str, list[str]] = {block.name: [] for block in chain.blocks[:cut]}
    for name in sorted(tensors):
        owner = next(
            (
                block.name
                for block in chain.blocks[:cut]
                if any(name.startswith(names[module] + ".") for module in block.modules)
            ),
            name,
        )
        found.setdefault(owner, []).append(name)
    return [
        Part(part, tuple(members), tensors_sha256({name: tensors[name] for name in members}))
        for part, members in found.items()
        if members
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`, e.g. `float32`."""
    return str(dtype).removeprefix("torch.")


def size_of(tensors: Mapping[str, torch.Tensor], names: Iterable[str] | None = None) -> int:
    """Bytes of tensors, of all or of those named."""
    chosen = tensors if names is None else names
    return sum(math.prod(tensors[name].shape) * tensors[name].element_size() for name in chosen)
