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


def declared_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model whose family is declared, stem first.

    Raises:
        ChainError: if the family is not declared, or the model does not have the modules of its declaration.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = None if model_type is None else FAMILIES.get(model_type)
    if family is None:
        raise ChainError(
            f"the blocks of {type(model).__name__} (model type {model_type!r}) are not declared; declared are "
            f"{', '.join(sorted(FAMILIES))}. Name the blocks yourself, stem first: blocks=['stem', 'layer1.0', ...]."
        )
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    base = model if base is None else base
    groups = block_groups(base, family)
    if groups is None:
        raise ChainError(
            f"{type(model).__name__} does not look like a '{model_type}': no module '{family.stem}' or no blocks "
            f"'{family.blocks[0]}' in its {type(base).__name__}. Name the blocks yourself with blocks=[...]."
        )
    names = {module: name for name, module in model.named_modules()}
    return [
        Block(names[base.get_submodule(name)], tuple(base.get_submodule(path) for path in paths))
        for name, paths in groups
    ]
