"""A small training in a process of its own, which tells what it is doing, so that faults can be timed by it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.build.feature_sources import ImageFeatures
from hf_freezecache.build.partial import PartialStore
from hf_freezecache.cache.names import MANIFEST, OWNER
from hf_freezecache.cache.store import FeatureStore, StoreError
from hf_freezecache.training import evaluation, store_provider
from hf_freezecache.training.epoch_source import Writing

from .._common import QUIET, REPOSITORY, quiet, silence

CLASSES, SIZE = 5, 16
#: Rows of the training set, rows of a batch, epochs.
ROWS, BATCH, EPOCHS = 32, 8, 6
#: What a training does, in the words of its marks. `starting` and `resuming` last until the first step.
PHASES = ("starting", "resuming", "live", "building", "deepening", "write-through", "replaying", "checkpointing")
_CONTEXT = multiprocessing.get_context("forkserver")

#: Settings of trainings that meet every phase together.
UPFRONT = {"freeze_points": "1:2,3:3", "deepen": "cache", "cache_eval": True}
WRITTEN = {"freeze_points": "1:2", "materialize": "write_through"}


@dataclass(frozen=True)
class Job:
    """A training.

    Args:
        folder: for checkpoints and the log.
        settings: of `FreezeCacheConfig`.
        arguments: of `TrainingArguments`.
        stores: the feature cache directory; None: in `folder`.
        resume: go on from the newest checkpoint, if there is one.
        prepare: called before anything is made, with the job; returns the job that runs, e.g. on another disk.
        disturb: called with trainer and job before the training: arranges what goes wrong in it.
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=lambda: UPFRONT)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    stores: Path | None = None
    resume: bool = False
    prepare: Callable[[Job], Job] | None = None
    disturb: Callable[[FreezeCacheTrainer, Job], None] | None = None

    @property
    def cache_dir(self) -> Path:
        """Where its stores are."""
        return self.folder / "stores" if self.stores is None else self.stores


@dataclass(frozen=True)
class Outcome:
    """What a training that has ended tells.

    Args:
        weights: sha256 of the final weights.
        losses: of every step that this process has trained.
        messages: of the package's log, from warnings on.
        stores: names of the complete stores in the feature cache directory.
        remains: what else is there, in words.
        replayed: whether the last epoch read a store.
        built: stores that it has built or written.
    """

    weights: str
    losses: tuple[float, ...]
    messages: tuple[str, ...]
    stores: tuple[str, ...]
    remains: tuple[str, ...]
    replayed: bool
    built: int


class Marks:
    """Tells another process what this one is doing, over a pipe that outlives it.

    Args:
        pipe: to the other process; None: nobody listens.
    """

    def __init__(self, pipe: Connection | None):
        self._pipe, self.phase = pipe, ""

    def tell(self, phase: str) -> None:
        """Something else begins."""
        if phase != self.phase:
            self.phase = phase
            if self._pipe is not None:
                self._pipe.send(phase)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Something begins, and what was before goes on behind it."""
        before = self.phase
        self.tell(phase)
        try:
            yield
        finally:
            self.tell(before)


class _Steps(TrainerCallback):
    """Marks the steps by where their batches come from."""

    def __init__(self, marks: Marks):
        self.marks, self.trainer = marks, None

    def on_step_begin(self, args, state, control, **kwargs):
        source = self.trainer._session.source
        names = {"replay": "replaying"}
        self.marks.tell("write-through" if isinstance(source, Writing) else names.get(source.mode, source.mode))


def make_trainer(job: Job, marks: Marks) -> FreezeCacheTrainer:
    """A ViT of four blocks, with dropout, on random pixels whose class shows in their mean."""
    steps = _Steps(marks)

    class Marked(FreezeCacheTrainer):
        def _save_checkpoint(self, *args, **kwargs):
            with marks.during("checkpointing"):
                return super()._save_checkpoint(*args, **kwargs)

    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, patch_size=4)
    model = ViTForImageClassification(ViTConfig(image_size=SIZE, num_labels=CLASSES, hidden_dropout_prob=0.1, **shape))
    arguments = {
        **QUIET,
        "output_dir": str(job.folder),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "seed": 3,
        **job.arguments,
    }
    trainer = Marked(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=make_rows(ROWS, 0),
        eval_dataset=make_rows(ROWS // 2, 1),
        freeze_cache=FreezeCacheConfig(
            **{"policy": "manual", "cache": "always", "feature_cache_dir": str(job.cache_dir), **job.settings}
        ),
        callbacks=[steps],
    )
    steps.trainer = trainer
    return silence(trainer)


def make_rows(rows: int, seed: int) -> datasets.Dataset:
    """Random pixels and their classes."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, rows)
    pixels = generator.normal(size=(rows, 3, SIZE, SIZE)).astype(np.float32) + labels[:, None, None, None] / 2
    features = datasets.Features(
        pixel_values=datasets.Array3D((3, SIZE, SIZE), "float32"), labels=datasets.Value("int64")
    )
    return datasets.Dataset.from_dict({"pixel_values": pixels, "labels": labels}, features=features).with_format(
        "torch"
    )


def mark_stores(marks: Marks) -> None:
    """Marks what is done to stores, from now on in this process."""

    def materialize(make: Callable) -> Callable:
        def marked(spec, *args, **kwargs):
            with marks.during("building" if isinstance(spec.feature_source, ImageFeatures) else "deepening"):
                return make(spec, *args, **kwargs)

        return marked

    def writing(make: Callable) -> Callable:
        def marked(*args, **kwargs):
            with marks.during("write-through"):
                return make(*args, **kwargs)

        return marked

    for module in (store_provider, evaluation):
        module.materialize = materialize(module.materialize)
    for name in ("begin", "reopen"):
        setattr(PartialStore, name, classmethod(writing(getattr(PartialStore, name).__func__)))
    PartialStore.finish = writing(PartialStore.finish)


class Messages(logging.Handler):
    """Collects what the package logs, from warnings on."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record):
        self.found.append(record.getMessage())

    @classmethod
    @contextlib.contextmanager
    def collected(cls) -> Iterator[list[str]]:
        """Inside, messages come to the list that it yields."""
        handler, logger = cls(), logging.getLogger("hf_freezecache")
        logger.addHandler(handler)
        try:
            yield handler.found
        finally:
            logger.removeHandler(handler)


def train(job: Job, marks: Marks) -> Outcome:
    """Trains to the end; what is arranged for a job stays in this process."""
    mark_stores(marks)
    with Messages.collected() as messages:
        if job.prepare is not None:
            job = job.prepare(job)
        marks.tell("resuming" if job.resume else "starting")
        trainer = make_trainer(job, marks)
        if job.disturb is not None:
            job.disturb(trainer, job)
        is_begun = job.resume and any(job.folder.glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=is_begun or None)
    stores, remains = find_remains(job.cache_dir)
    return Outcome(
        weights=digest(trainer.model),
        losses=tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        messages=tuple(messages),
        stores=stores,
        remains=remains,
        replayed=trainer.freeze_status().replaying,
        built=sum(message.startswith("Built the") for message in messages),
    )


def digest(model: torch.nn.Module) -> str:
    """sha256 of all weights and buffers of a model, by name."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def find_remains(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The complete stores in a feature cache directory, checked to the last byte, and what else is there, in words."""
    stores, remains = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            manifest = FeatureStore.open(path).manifest
            FeatureStore.open(path).verify()
        except StoreError as error:
            remains.append(f"{path.name}: {error}")
            continue
        stores.append(path.name)
        own = {MANIFEST, OWNER, *manifest.files, *(shard.name for shard in manifest.shards)}
        remains += [f"{path.name}/{file}" for file in sorted({file.name for file in path.iterdir()} - own)]
        if path.name != manifest.fingerprint:
            remains.append(f"{path.name} is named otherwise")
    return tuple(stores), tuple(remains)


# Processes


class Running:
    """A training in a process of its own.

    Args:
        job: what it trains.
        name: of its log, in the job's folder.
    """

    def __init__(self, job: Job, name: str = "log.txt"):
        job.folder.mkdir(parents=True, exist_ok=True)
        self.log = job.folder / name
        self.pipe, theirs = _CONTEXT.Pipe(duplex=False)
        self.process = start(_run, job, theirs, self.log)
        theirs.close()
        self.phase, self.outcome = "", None

    def listen(self, timeout: float | None) -> str | None:
        """The next mark; None if none comes in time, or the process has ended.

        Args:
            timeout: seconds; None: waits until there is one.
        """
        try:
            if not self.pipe.poll(timeout):
                return None
            found = self.pipe.recv()
        except EOFError:
            return None
        if isinstance(found, Outcome):
            self.outcome = found
            return None
        self.phase = found
        return found

    def kill(self) -> None:
        """SIGKILL, which nothing survives; `phase` is then what it was doing."""
        self.process.kill()
        self.process.join()
        while self.listen(0) is not None:
            pass

    def finish(self) -> Outcome:
        """Waits for the end.

        Raises:
            RuntimeError: if the training has failed; the message ends with its log.
        """
        while self.listen(None) is not None:
            pass
        self.process.join()
        if self.outcome is None:
            raise RuntimeError(f"a training ended with {self.process.exitcode}: {self.log.read_text()[-3000:]}")
        return self.outcome


def start(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Starts a process that is forked from an interpreter which has imported the large packages."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *([before] if before else [])])
    _CONTEXT.set_forkserver_preload([__name__])
    process = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return process


def _run(job: Job, pipe: Connection, log: Path) -> None:
    with open(log, "wb") as opened:
        for number in (1, 2):
            os.dup2(opened.fileno(), number)
    torch.set_num_threads(1)
    quiet()
    logging.getLogger("hf_freezecache").setLevel(logging.WARNING)
    try:
        pipe.send(train(job, Marks(pipe)))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
