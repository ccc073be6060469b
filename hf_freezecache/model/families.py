"""Where the blocks of the known model families are: declarations as data, no code runs from here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """The blocks of one model family, as module paths below the base model; `*` stands for an index.

    Args:
        stem: path of the embedding or stem module, block 0.
        blocks: alternative patterns of the blocks; the first one that matches is used (module paths differ between
            releases of Transformers).
        stage_entry: pattern of the modules that run at a stage's beginning, counted to the stage's first block.
        stage_exit: pattern of the module that runs at a stage's end, counted to the stage's last block.
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
    """Lists `(indices, path)` of the modules that match, in the order of their indices."""
    regex = re.compile("^" + re.escape(pattern).replace(r"\*", r"(\d+)") + "$")
    found = []
    for path, _ in base.named_modules():
        match = regex.match(path)
        if match:
            found.append((tuple(int(index) for index in match.groups()), path))
    return sorted(found)


def block_groups(base: nn.Module, family: Family) -> list[tuple[str, tuple[str, ...]]] | None:
    """Expands a declaration on a model.

    Returns:
        `(name, module paths)` per block, stem first; the paths are below `base` and in the order in which they run.
        None if the declaration does not fit this model.
    """
    blocks = next((found for pattern in family.blocks if (found := _matches(base, pattern))), None)
    if blocks is None or family.stem not in dict(base.named_modules()):
        return None
    entries, exits = {}, {}
    if family.stage_entry:
        for indices, path in _matches(base, family.stage_entry):
            entries.setdefault(indices[:-1], []).append(path)
    if family.stage_exit:
        exits = {indices: [path] for indices, path in _matches(base, family.stage_exit)}
    groups = [(family.stem, (family.stem,))]
    for number, (indices, path) in enumerate(blocks):
        stage = indices[:-1]
        first = number == 0 or blocks[number - 1][0][:-1] != stage
        last = number == len(blocks) - 1 or blocks[number + 1][0][:-1] != stage
        before = entries.get(stage, []) if first else []
        after = exits.get(stage, []) if last else []
        groups.append((path, (*before, path, *after)))
    return groups
