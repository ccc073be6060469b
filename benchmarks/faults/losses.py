"""Stores that are taken away, cut short or overwritten while a training reads them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_freezecache.cache.names import is_shard
from hf_freezecache.cache.store import remove_store

from .moments import at_step
from .trainings import Job, Marks, digest, make_trainer

#: As fp32, so that an epoch that goes on with samples is the same to the last bit.
_SETTINGS = {"freeze_points": "1:2", "codec": "fp32"}
_ARGUMENTS = {"num_train_epochs": 5}


def remove(store: Path) -> None:
    """As `freezecache clean` does it."""
    remove_store(store)


def delete(store: Path) -> None:
    """As `rm -r` does it."""
    shutil.rmtree(store)


def shorten(store: Path) -> None:
    """Cuts the Arrow file short; what is mapped of it would end the process when it is read."""
    path = _shard_of(store)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def overwrite(store: Path) -> None:
    """Changes many bytes of the Arrow file, in place."""
    path = _shard_of(store)
    content = bytearray(path.read_bytes())
    for place in range(1000, len(content), 500):
        content[place] ^= 0xFF
    path.write_bytes(content)


def _shard_of(store: Path) -> Path:
    (path,) = (path for path in store.iterdir() if is_shard(path.name))
    return path


#: By what happens to the store.
WAYS: Mapping[str, Callable[[Path], None]] = {
    "removed": remove,
    "deleted": delete,
    "cut short": shorten,
    "overwritten": overwrite,
}


@dataclass(frozen=True)
class Loss:
    """A store that is lost.

    Args:
        way: what happens to it.
        step: optimizer step after which it does: 8 is the last one of an epoch, 10 in the middle of the next.
        workers: loader processes, which hold the store's files as well.
    """

    way: str
    step: int
    workers: int


LOSSES = tuple(itertools.starmap(Loss, itertools.product(WAYS, (8, 10), (0, 1))))


@dataclass(frozen=True)
class LossStory:
    """What came of a loss.

    Args:
        loss: of a store.
        equal: whether the final weights are those of a training without a cache.
        replayed: whether the last epoch read a store: from files that are held, or one that was built again.
        failed: the error of a training that did not end; None: it has ended.
    """

    loss: Loss
    equal: bool
    replayed: bool
    failed: str | None = None

    @property
    def survived(self) -> bool:
        """Whether no wrong batch was trained, and the training has ended."""
        return self.equal and self.failed is None


def train_frozen(folder: Path) -> str:
    """The weights of the training without a cache."""
    return _train(folder, {"cache": "never"}, None)[0]


def suffer_loss(loss: Loss, weights: str, folder: Path) -> LossStory:
    """Trains, and loses the store.

    Args:
        loss: what happens.
        weights: of the training without a cache.
        folder: an empty one.
    """
    try:
        found, replayed = _train(folder, {}, loss)
    except Exception as error:  # whatever a lost file makes a training raise: it is what is looked for
        return LossStory(loss, False, False, failed=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return LossStory(loss, found == weights, replayed)


def _train(folder: Path, settings: Mapping[str, str], loss: Loss | None) -> tuple[str, bool]:
    workers = {} if loss is None else {"dataloader_num_workers": loss.workers}
    trainer = make_trainer(Job(folder, {**_SETTINGS, **settings}, {**_ARGUMENTS, **workers}), Marks(None))

    def lose() -> None:
        (store,) = (path for path in (folder / "stores").iterdir() if path.is_dir() and ".tmp" not in path.name)
        WAYS[loss.way](store)

    if loss is not None:
        at_step(loss.step, trainer, lose)
    trainer.train()
    return digest(trainer.model), trainer.freeze_status().replaying
