"""`save_head`: the part of a model behind the cut, in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers.utils import logging

from ..model.modes import eval_mode, override_forward
from ..model.proving import are_close
from ..model.record import answers_of
from ..rng import preserve_rng
from ..units import show_bytes
from .card import CardFacts, Shown, library_versions, render_card
from .errors import HeadError
from .head_config import CARD, HEAD_CONFIG, HEAD_WEIGHTS, HeadConfig, Recipe
from .rebuild import Source, assign, base_of, build, build_on, recipe_of
from .subject import Subject, subject_of
from .tensors import (
    Part,
    dtype_name,
    named_tensors,
    prefix_parts,
    saved_names,
    size_of,
    tensors_sha256,
)

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Comparison:
    """What a base has in common with a model.

    Args:
        twin: the model made anew; None if it cannot be.
        base: id on the Hub; None if the base is not there, or there is none.
        revision: commit of the base on the Hub.
        unread: why there is no base to compare with; None if there is one.
    """

    twin: nn.Module | None
    base: str | None = None
    revision: str | None = None
    unread: str | None = None


def save_head(
    trainer_or_model: Any,
    directory: str | os.PathLike,
    cut: int | None = None,
    *,
    include_prefix: bool = True,
    base: str | None = None,
    processor: Any = None,
    blocks: Sequence[str] | None = None,
    probe: Mapping[str, Any] | None = None,
    token: str | bool | None = None,
    card: CardFacts | None = None,
) -> Path:
    """Saves what comes behind the cut of a model: `load_head` puts it on the base again, bit for bit.

    Blocks in front of the cut that differ from the base's, because they were trained before they were frozen, are
    saved with it; a line of the log says so, and what that costs. Of several processes the main one saves.

    Args:
        trainer_or_model: a trainer, or a model.
        directory: gets `head.safetensors`, `head_config.json`, `README.md` and the files of the processor.
        cut: number of blocks in front of the head, stem included; by default that of the training.
        include_prefix: whether changed blocks in front of the cut are saved; False: it is an error if there are any.
        base: where the weights come from that the training began with: an id on the Hub, or a folder. By default what
            the model was loaded from. A folder is compared with, but its path is not written down.
        processor: image processor or tokenizer; by default the trainer's `processing_class`.
        blocks: names of the blocks, for a model whose blocks are not to be found, see `BlockChain.from_model`.
        probe: a small batch of inputs by name, for a model that has to be run to find its blocks.
        token: for the Hub, from which the base may have to be read.
        card: what the README says besides.

    Returns:
        The directory.

    Raises:
        HeadError: if the head could not be loaded again; the message says why. Nothing was written then.
        ChainError: if the model cannot be cut there.
        TypeError: if it is neither a trainer nor a model.
    """
    subject = subject_of(trainer_or_model, cut, blocks, probe, processor)
    if subject.trainer is not None and not subject.trainer.is_world_process_zero():
        return Path(directory)
    model = subject.model
    saved = saved_names(model)
    tensors = {name: value.detach() for name, value in named_tensors(model).items()}
    parts = prefix_parts(subject.chain, subject.cut)
    recipe = recipe_of(model, _dtype_of(tensors, parts))
    name = base if base is not None else base_of(model)
    with preserve_rng():
        comparison = _compare(recipe, None if name is None else Source(name, token=token))
        parts, differing = _mark(parts, tensors, saved, comparison, subject)
        _tell(parts, tensors, comparison, subject, include_prefix)
        recipe = _proved(recipe, comparison.twin, subject, tensors)
    before = {name for part in parts if not part.included for name in part.tensors}
    kept = [name for name in tensors if name not in before and (name in saved or name in differing)]
    computed = sorted(set(tensors) - before - set(kept))
    content = {name: tensors[name].contiguous().cpu() for name in kept}
    config = HeadConfig(
        recipe=recipe,
        base=comparison.base,
        base_revision=comparison.revision,
        cut=subject.cut,
        blocks=subject.chain.names,
        parts=parts,
        computed=computed,
        computed_sha256=tensors_sha256({name: tensors[name] for name in computed}),
        tensors={name: (dtype_name(value.dtype), tuple(value.shape)) for name, value in content.items()},
        weights_sha256="0" * 64,
        num_labels=getattr(getattr(model, "config", None), "num_labels", None),
        id2label=_labels_of(model),
        libraries=_versions(recipe),
    )
    _write(Path(directory), config, content, subject, card or CardFacts())
    return Path(directory)


def _compare(recipe: Recipe, source: Source | None) -> Comparison:
    """Loads the base, if there is one."""
    if recipe.kind == "own":
        return Comparison(None, unread=f"{recipe.architecture} is no class of Transformers or timm")
    if source is None:
        return Comparison(build(recipe), unread="the model does not tell what it was loaded from")
    base = None if source.is_folder else source.name
    try:
        source = source.pinned()
        twin = build_on(recipe, source)
    except (HeadError, OSError) as error:
        logger.warning(f"The base of the head could not be read, so it was not compared with the model: {error}")
        return Comparison(build(recipe), base, None, f"{source.name} could not be read")
    if base is None:
        logger.warning(
            f"The base of the head is the folder {source.name}. It is compared with, but its path means nothing "
            "elsewhere and is not written down: load the head with load_head(…, base=folder), or save it with "
            "base='owner/name' of the Hub."
        )
    return Comparison(twin, base, source.revision)


def _mark(
    parts: list[Part],
    tensors: Mapping[str, torch.Tensor],
    saved: set[str],
    comparison: Comparison,
    subject: Subject,
) -> tuple[list[Part], set[str]]:
    """The parts with a mark on those that the base does not have so.

    Also the names of what differs in them, and of computed buffers that differ anywhere.
    """
    if comparison.unread is None and comparison.twin is not None:
        others = named_tensors(comparison.twin)
        compared = {name for part in parts for name in part.tensors} | (tensors.keys() - saved)
        differing = {name for name in compared if not _is_same(tensors[name], others.get(name))}
        return [replace(part, included=bool(differing & {*part.tensors})) for part in parts], differing
    if subject.trained_from is None:
        return [replace(part, included=True) for part in parts], set()
    untouched = {name for part in prefix_parts(subject.chain, subject.trained_from) for name in part.tensors}
    return [replace(part, included=not untouched >= {*part.tensors}) for part in parts], set()


def _tell(
    parts: list[Part],
    tensors: Mapping[str, torch.Tensor],
    comparison: Comparison,
    subject: Subject,
    include_prefix: bool,
) -> None:
    """Says what the head has and what that costs, or why there is none."""
    everything = size_of(tensors)
    behind = everything - size_of(tensors, [name for part in parts for name in part.tensors])
    changed = [part for part in parts if part.included]
    with_changed = behind + size_of(tensors, [name for part in changed for name in part.tensors])
    sizes = f"{show_bytes(behind)} without them, {show_bytes(with_changed)} with them, {show_bytes(everything)} whole"
    names = ", ".join(part.name for part in changed)
    if changed and comparison.unread is None:
        why = f"In front of the cut, {names} differ from the base: they were trained before they were frozen"
    elif changed and subject.trained_from is None:
        why = f"It is not known which blocks in front of the cut were trained, because {comparison.unread}: {names}"
    else:
        why = f"In front of the cut, {names} were trained before they were frozen, and {comparison.unread}"
    if changed and not include_prefix:
        raise HeadError(
            f"{why}. A head without them could not be loaded on any base ({sizes}): save it with include_prefix=True, "
            "or the whole model."
        )
    if changed:
        logger.warning(f"{why}. They are saved with the head: {sizes}.")
    else:
        logger.info(
            f"Head of {type(subject.model).__name__} at cut {subject.cut}: {show_bytes(behind)} of {everything:,} B."
        )


def _proved(recipe: Recipe, twin: nn.Module | None, subject: Subject, tensors: Mapping[str, torch.Tensor]) -> Recipe:
    """The recipe, if a model that is made of it answers as the trained one does; else that of a model to be given."""
    why = _difference(twin, subject, tensors)
    if why is None:
        return recipe
    logger.warning(
        f"A {type(subject.model).__name__} cannot be made anew: {why}. The head is saved, but it is loaded on a model "
        "of yours only: load_head(…, base=model)."
    )
    return replace(recipe, kind="own", architecture=type(subject.model).__name__, config={}, attention=None)


def _difference(twin: nn.Module | None, subject: Subject, tensors: Mapping[str, torch.Tensor]) -> str | None:
    if twin is None:
        return "it is no class of Transformers or timm"
    own = named_tensors(twin)
    shapes = [{name: tuple(value.shape) for name, value in of.items()} for of in (own, tensors)]
    if shapes[0] != shapes[1]:
        return "its configuration makes a model with other tensors"
    assign(twin, tensors)
    device = next(iter(tensors.values())).device
    probe = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in subject.chain.own_trace().probe.items()
    }
    precision = contextlib.nullcontext() if subject.trainer is None else subject.trainer.accelerator.autocast()
    with torch.no_grad(), eval_mode(subject.model), _own_forward(subject.model), precision:
        expected = answers_of(subject.model(**probe))
        found = answers_of(twin.to(device).eval()(**probe))
    same = expected.keys() == found.keys() and all(torch.equal(expected[path], found[path]) for path in expected)
    if same or (device.type != "cpu" and are_close(expected, found)):  # kernels of accelerators vary from run to run
        return None
    return "a model of the same settings and weights answers otherwise"


def _own_forward(model: nn.Module) -> contextlib.AbstractContextManager:
    """Inside, a model that accelerate has prepared for mixed precision answers as it does itself."""
    original = vars(model).get("_original_forward")
    if original is None:
        return contextlib.nullcontext()
    return override_forward(model, lambda _: lambda *args, **kwargs: original(*args, **kwargs))


def _write(
    directory: Path, config: HeadConfig, content: dict[str, torch.Tensor], subject: Subject, card: CardFacts
) -> None:
    """Writes aside first: a folder has the old head or the new one."""
    directory.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".head-", dir=directory))
    try:
        weights = aside / HEAD_WEIGHTS
        safetensors.torch.save_file(content, weights, metadata={"format": "pt"})
        config = replace(config, weights_sha256=file_sha256(weights))
        if subject.processor is not None:
            subject.processor.save_pretrained(aside)
            found = sorted(path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
            config = replace(config, processor_files=[name for name in found if name != HEAD_WEIGHTS])
        shown = Shown(
            type(subject.model).__name__,
            config.base,
            config.base_revision,
            config,
            weights.stat().st_size,
            size_of(named_tensors(subject.model)),
            subject.processor is not None,
        )
        (aside / CARD).write_text(render_card(shown, subject.trainer, card), encoding="utf-8")
        (aside / HEAD_CONFIG).write_text(config.to_json(), encoding="utf-8")
        HeadConfig.read(aside / HEAD_CONFIG)  # what would be refused when it is loaded is not written
        # The weights last: until they are there, the digest says that they do not belong together.
        for name in config.files:
            (directory / name).parent.mkdir(exist_ok=True, parents=True)
            os.replace(aside / name, directory / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Digest of a file: 64 hexadecimal digits."""
    with path.open("rb") as file:
        total = hashlib.sha256()
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


def _is_same(value: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or value.shape != other.shape or value.dtype != other.dtype:
        return False
    # As bytes: -0.0 is not 0.0, and NaN is NaN.
    return tensors_sha256({"": value}) == tensors_sha256({"": other})


def _dtype_of(tensors: Mapping[str, torch.Tensor], parts: list[Part]) -> torch.dtype:
    kinds = [tensors[name].dtype for part in parts for name in part.tensors if tensors[name].is_floating_point()]
    kinds += [value.dtype for value in tensors.values() if value.is_floating_point()]
    return kinds[0] if kinds else torch.float32


def _labels_of(model: nn.Module) -> dict[str, str] | None:
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return None if not isinstance(labels, Mapping) else {str(key): str(name) for key, name in labels.items()}


def _versions(recipe: Recipe) -> dict[str, str]:
    versions = library_versions()
    if recipe.kind == "timm" or recipe.model_type == "timm_wrapper":
        import timm

        versions["timm"] = timm.__version__
    return versions
