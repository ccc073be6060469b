"""The blocks of a model: those of its family's declaration, or those that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .errors import ChainError
from .families import FAMILIES, block_groups


@dataclass(frozen=True)
class Block:
    """One unit of the chain.

    Args:
        name: module name of the block, of its first module if there are several.
        modules: the modules that run one after the other as this block.
    """

    name: str
    modules: tuple[nn.Module, ...]


def named_blocks(model: nn.Module, names: Sequence[str]) -> list[Block]:
    """The blocks that a user names.

    Args:
        model: any module.
        names: module names, the stem first.

    Raises:
        ChainError: if there are no names, one appears twice, a module does not exist, or a block contains another.
    """
    modules = dict(model.named_modules())
    if isinstance(names, str) or not names:
        raise ChainError("`blocks` is a list of module names, the stem first; it must not be empty.")
    for name in names:
        if name not in modules:
            raise ChainError(
                f"{type(model).__name__} has no module '{name}'; see `model.named_modules()` for the names."
            )
    if len(set(names)) != len(names):
        raise ChainError("`blocks` names a module twice.")
    for name in names:
        inside = [other for other in names if other.startswith(name + ".")]
        if inside:
            raise ChainError(f"blocks must not contain each other: '{inside[0]}' is inside '{name}'.")
    return [Block(name, (modules[name],)) for name in names]


def declared_blocks(model: nn.Module) -> list[Block] | None:
    """The blocks of a model whose family is declared, stem first; None if it is not, or the model looks different."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = None if model_type is None else FAMILIES.get(model_type)
    if family is None:
        return None
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    base = model if base is None else base
    groups = block_groups(base, family)
    if groups is None:
        return None
    names = {module: name for name, module in model.named_modules()}
    return [
        Block(names[base.get_submodule(name)], tuple(base.get_submodule(path) for path in paths))
        for name, paths in groups
    ]
