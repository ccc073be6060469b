"""A training that replays a store with augmented views."""

from hf_freezecache.cache.store import FeatureStore
from support.helpers import manual, run, tiny_vit


def train(dataset, folder, **settings):
    """One replay epoch at cut 2; returns the trainer and its store."""
    own = {name: settings.pop(name) for name in ("data_collator",) if name in settings}
    config = manual("0:2", cache="always", **settings)
    trainer = run(tiny_vit(), dataset, folder, config, num_train_epochs=1, remove_unused_columns=False, **own)
    return trainer, FeatureStore.open(trainer.freeze_status().store_path)
