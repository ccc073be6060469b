"""Stores whose rows are packed, beside plain ones of the same samples."""

from dataclasses import replace

import numpy as np
import torch

from hf_freezecache import FeatureStore
from hf_freezecache.build.materialize import materialize
from hf_freezecache.cache.lossless import LOSSLESS
from hf_freezecache.distributed import Group
from support.builds import Rows, make_spec
from support.helpers import manual, pixel_dataset, run, tiny_vit
from support.images import OpaqueFlip, picture_dataset, replayable


class FlatRows(Rows):
    """Images of one colour, whose features repeat."""

    def __getitem__(self, row):
        return {"pixel_values": torch.full((3, self.size, self.size), row / 10), "labels": row % 5}


def flat_vit():
    """Without positions: of an image of one colour, every token is the same and packs well."""
    model = tiny_vit()
    torch.nn.init.zeros_(model.vit.embeddings.position_embeddings)
    return model


def flat_pixels():
    """Pixels of one value an image, whose features repeat."""
    return pixel_dataset().map(lambda row: {"pixel_values": torch.full((3, 16, 16), float(row["labels"]))})


def pack(spec):
    """The same spec with packed rows."""
    return replace(spec, lossless=True, made_from={**spec.made_from, **LOSSLESS})


def build_plain_and_packed(model, folder, dataset=None, **settings):
    """A store and a packed one of the same samples."""
    plain = make_spec(model, folder, dataset, **settings)
    return materialize(plain, Group()), materialize(pack(plain), Group())


def assert_same_rows(first, second, count):
    """All rows of all views are equal, read in any order."""
    generator = np.random.default_rng(0)
    for views in (None, *(np.full(count, view) for view in range(first.manifest.views + 1))):
        order = generator.permutation(count)
        one, other = first.read_rows(order, views), second.read_rows(order, views)
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]


def train_on_rows(path, lossless, dataset=None, points="1:2", resume=None, model=None, **settings):
    """A training on packed or plain rows; returns the trainer."""
    own = {
        name: settings.pop(name)
        for name in ("save_strategy", "eval_dataset", "eval_strategy", "dataloader_num_workers", "num_train_epochs")
        if name in settings
    }
    config = manual(points, lossless=lossless, **settings)
    dataset = pixel_dataset() if dataset is None else dataset
    return run(model or tiny_vit(), dataset, path, config, resume, remove_unused_columns=False, **own)


def stores_in(path):
    """The stores of a training's output folder, by cut."""
    found = [FeatureStore.open(folder) for folder in sorted((path / "_freeze_cache").iterdir())]
    return {store.manifest.cut: store for store in found}


def stores_of(trainer):
    """The store that a trainer replays at its end, by cut."""
    store = FeatureStore.open(trainer.freeze_status().store_path)
    return {store.manifest.cut: store}


#: Data whose stores keep base views alone, sensitive channels of views, and whole views.
DATA = {
    "plain": lambda: pixel_dataset(),
    "sensitive": lambda: picture_dataset().with_transform(replayable()),
    "whole": lambda: picture_dataset().with_transform(OpaqueFlip()),
}
