"""Single bytes of a store that change: between two trainings, and while a training reads it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_freezecache.cache.names import OWNER, is_shard

from .moments import at_step
from .trainings import Job, Marks, Messages, digest, make_trainer

#: As fp32, so that an epoch that goes on with samples is the same to the last bit.
_SETTINGS = {"freeze_points": "0:2", "codec": "fp32"}
_ARGUMENTS = {"num_train_epochs": 2}
#: What a training says of a store that it does not believe.
_FOUND = ("could not be reused", "is damaged")


@dataclass(frozen=True)
class Damage:
    """A byte of a store that changes.

    Args:
        file: its name.
        place: the byte.
        change: what it is changed by (exclusive or).
        step: optimizer step after which it changes; None: before the training.
        hides: whether the time of the file's last change is put back.
    """

    file: str
    place: int
    change: int
    step: int | None = None
    hides: bool = False

    @property
    def counts(self) -> bool:
        """Whether the training reads the byte after it has changed: what it has read before, it keeps in memory."""
        return self.file != OWNER if self.step is None else is_shard(self.file)

    def apply(self, store: Path) -> None:
        """Changes the byte where it is."""
        path = store / self.file
        before = path.stat()
        with open(path, "r+b") as file:
            file.seek(self.place)
            byte = file.read(1)[0]
            file.seek(self.place)
            file.write(bytes([byte ^ self.change]))
        if self.hides:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@dataclass(frozen=True)
class DamageStory:
    """What came of a damage.

    Args:
        damage: the byte.
        equal: whether the final weights are those of a training on the undamaged store.
        found: whether the training says so.
        failed: the error of a training that did not end; None: it has ended.
    """

    damage: Damage
    equal: bool
    found: bool
    failed: str | None = None

    @property
    def survived(self) -> bool:
        """Whether no wrong batch was trained, the training has ended, and a damage that it reads was found."""
        return self.equal and self.failed is None and (self.found or not self.damage.counts)


def build_store(folder: Path) -> tuple[Path, str]:
    """Builds the store that is damaged; returns its directory and the weights of a training on it."""
    weights = _train(folder, folder / "stores")[0]
    (store,) = (folder / "stores").iterdir()
    return store, weights


def draw_damages(store: Path, count: int, seed: int) -> list[Damage]:
    """Damages, half of them of the shard, the others of all other files in turn.

    Every second one is done while a training reads the store, every fourth one puts the time of the change back.

    Args:
        store: an undamaged one.
        count: how many.
        seed: of places and changes.
    """
    generator, files = random.Random(seed), sorted(store.iterdir())
    (shard,) = (path for path in files if is_shard(path.name))
    others = [path for path in files if path != shard]
    damages = []
    for number in range(count):
        path = shard if number // 4 % 2 == 0 else others[number // 8 % len(others)]
        place, change = generator.randrange(path.stat().st_size), generator.randrange(1, 256)
        step = generator.randrange(1, 6) if number % 2 else None
        damages.append(Damage(path.name, place, change, step, hides=number % 4 == 3))
    return damages


def suffer(damage: Damage, store: Path, weights: str, folder: Path) -> DamageStory:
    """Trains with a copy of a store that is damaged.

    Args:
        damage: what happens.
        store: the undamaged one.
        weights: of a training on it.
        folder: an empty one.
    """
    copy = folder / "stores" / store.name
    shutil.copytree(store, copy)
    if damage.step is None:
        damage.apply(copy)
    try:
        found_weights, messages = _train(folder, folder / "stores", damage)
    except Exception as error:  # whatever a damaged file makes a training raise: it is what is looked for
        return DamageStory(damage, False, False, failed=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder)
    told = any(word in message for message in messages for word in _FOUND)
    return DamageStory(damage, found_weights == weights, told)


def _train(folder: Path, stores: Path, damage: Damage | None = None) -> tuple[str, Sequence[str]]:
    """Trains in this process; the final weights, and what was logged."""
    trainer = make_trainer(Job(folder, _SETTINGS, _ARGUMENTS, stores=stores), Marks(None))
    if damage is not None and damage.step is not None:
        (store,) = stores.iterdir()
        at_step(damage.step, trainer, lambda: damage.apply(store))
    with Messages.collected() as messages:
        trainer.train()
    return digest(trainer.model), messages
