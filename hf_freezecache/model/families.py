"""Where the blocks of each model family are, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """The blocks of one model family, as module paths below the base model; `*` matches an index.

    Args:
        stem: path of the embedding or stem module, block 0.
        blocks: alternative patterns of the other blocks, because module paths differ between releases of
            Transformers; the first pattern that matches is used.
        stage_entry: pattern of the modules that run at the beginning of a stage; they belong to its first block.
        stage_exit: pattern of the module that runs at the end of a stage; it belongs to its last block.
    """

    stem: str
    blocks: tuple[str, ...]
    stage_entry: str | None = None
    stage_exit: str | None = None


_VIT = Family(stem="embeddings", blocks=("layers.*", "encoder.layer.*"))

#: `config.model_type` -> declaration.
FAMILIES: dict[str, Family] = {
    "vit": _VIT,
    "deit": _VIT,
    "beit": _VIT,
    "dinov2": _VIT,
    "dinov2_with_registers": _VIT,
    "convnext": Family(
        stem="embeddings",
        blocks=("encoder.stages.*.layers.*",),
        stage_entry="encoder.stages.*.downsampling_layer.*",
    ),
    "swin": Family(
        stem="embeddings",
        blocks=("encoder.layers.*.blocks.*",),
        stage_exit="encoder.layers.*.downsample",
    ),
    "resnet": Family(stem="embedder", blocks=("encoder.stages.*.layers.*",)),
    "mobilenet_v2": Family(stem="conv_stem", blocks=("layer.*",)),
}


def _matches(base: nn.Module, pattern: str) -> list[tuple[tuple[int, ...], str]]:
    """Lists `(indices, path)` of the modules whose path matches, in the order of their indices."""
    regex = re.compile("^" + re.escape(pattern).replace(r"\*", r"(\d+)") + "$")
    matches = [(match, path) for path, _ in base.named_modules() if (match := regex.match(path))]
    return sorted((tuple(int(index) for index in match.groups()), path) for match, path in matches)


def block_groups(base: nn.Module, family: Family) -> list[tuple[str, tuple[str, ...]]] | None:
    """Finds the blocks of a model by its family's declaration.

    Args:
        base: the base model, e.g. `model.vit`.
        family: the declaration.

    Returns:
        `(name, module paths)` for each block, stem first. The paths are relative to `base` and in the order in which
        the modules run. None if the model has no such stem or no such blocks.
    """
    blocks = next((modules for pattern in family.blocks if (modules := _matches(base, pattern))), None)
    if blocks is None or family.stem not in dict(base.named_modules()):
        return None
    entries: dict[tuple[int, ...], list[str]] = {}
    exits: dict[tuple[int, ...], list[str]] = {}
    if family.stage_entry:
        for indices, path in _matches(base, family.stage_entry):
            entries.setdefault(indices[:-1], []).append(path)
    if family.stage_exit:
        exits = {indices: [path] for indices, path in _matches(base, family.stage_exit)}
    groups: list[tuple[str, tuple[str, ...]]] = [(family.stem, (family.stem,))]
    for number, (indices, path) in enumerate(blocks):
        stage = indices[:-1]
        first = number == 0 or blocks[number - 1][0][:-1] != stage
        last = number == len(blocks) - 1 or blocks[number + 1][0][:-1] != stage
        before = entries.get(stage, []) if first else []
        after = exits.get(stage, []) if last else []
        groups.append((path, (*before, path, *after)))
    return groups
