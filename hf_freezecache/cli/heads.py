"""The commands for heads: `freezecache head save`, `load` and `push`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from ..hub.errors import HeadError
from ..hub.head_config import HEAD_CONFIG, HEAD_WEIGHTS, HeadConfig
from ..hub.loading import fetch_head, load_head
from ..hub.pushing import push_head_to_hub
from ..hub.rebuild import quiet
from ..hub.saving import save_head
from ..model.inputs import main_input_name
from ..training.callback import FreezeCallback
from ..training.checkpoint_state import read_state
from ..units import show_bytes

#: Files by which a processor or a tokenizer is known.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def save(options: argparse.Namespace) -> None:
    """Saves the head of a trained model.

    Raises:
        HeadError: if the head could not be loaded again, or the cut is not known.
        OSError: if there is no such model.
    """
    source = Path(options.model)
    cut = options.cut if options.cut is not None else _cut_of(source)
    model = _load_model(source)
    folder = save_head(
        model,
        options.output,
        cut=cut,
        include_prefix=not options.no_prefix,
        base=options.base,
        processor=_processor_of(source),
        probe=_probe_of(model),
    )
    config, size = HeadConfig.read(folder / HEAD_CONFIG), (folder / HEAD_WEIGHTS).stat().st_size
    included = [part.name for part in config.parts if part.included]
    done = {
        "directory": str(folder),
        "cut": config.cut,
        "blocks": len(config.blocks),
        "bytes": size,
        "included": included,
        "base": config.base,
        "prefix_sha256": config.sha256,
    }
    text = f"{folder}: head behind {config.cut} of {len(config.blocks)} blocks, {show_bytes(size)}"
    _print(options, done, text + (f"; with {', '.join(included)}, which were trained" if included else ""))


def load(options: argparse.Namespace) -> None:
    """Puts a head on its base and saves the whole model.

    Raises:
        HeadError: if head and base do not fit.
        OSError: if the model cannot be written.
    """
    model, output = load_head(options.head, options.base, options.revision), Path(options.output)
    folder = fetch_head(options.head, options.revision, with_processor=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(model.model.state_dict(), output / "model.safetensors")
    for name in HeadConfig.read(folder / HEAD_CONFIG).processor_files:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, output / name)
    done = {"directory": str(output), "architecture": type(model).__name__}
    _print(options, done, f"{output}: {type(model).__name__}, head and base")


def push(options: argparse.Namespace) -> None:
    """Pushes a saved head to the Hub.

    Raises:
        HeadError: if there is no head, or the Hub refuses it.
    """
    commit = push_head_to_hub(
        options.head,
        options.repo,
        private=options.private,
        commit_message=options.message,
        create_pr=options.create_pr,
        revision=options.revision,
    )
    assert commit is not None  # only trainers of several processes push nothing
    done = {"url": commit.commit_url, "commit": commit.oid, "pull_request": commit.pr_url}
    _print(options, done, f"pushed: {commit.pr_url or commit.commit_url}")


def _processor_of(folder: Path) -> Any:
    """The image processor or tokenizer beside a model; None if there is none."""
    if not any((folder / name).is_file() for name in _PROCESSORS):
        return None
    return AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def _cut_of(folder: Path) -> int | None:
    """The cut in a checkpoint of a training; None if it is none."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        return None
    state = json.loads(path.read_text(encoding="utf-8"))
    ours = state.get("stateful_callbacks", {}).get(FreezeCallback.__name__)
    found = None if ours is None else read_state(ours)
    return None if found is None else found["cut"]


def _load_model(folder: Path) -> nn.Module:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} with a trained model.")
    names = AutoConfig.from_pretrained(folder).architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None or not issubclass(cls, PreTrainedModel):
        raise HeadError(f"{folder} holds no model of a class of Transformers ({', '.join(names) or 'none is named'}).")
    with quiet():
        return cls.from_pretrained(folder, use_safetensors=True).eval()


def _probe_of(model: nn.Module) -> dict[str, Any] | None:
    """A small text, where the model reads texts; images are made where they are needed."""
    words = getattr(getattr(model, "config", None), "vocab_size", None)
    if words is None or main_input_name(model) != "input_ids":
        return None
    tokens = torch.arange(2 * 6).reshape(2, 6) % words
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _print(options: argparse.Namespace, done: dict[str, Any], text: str) -> None:
    print(json.dumps(done) if options.json else text)
