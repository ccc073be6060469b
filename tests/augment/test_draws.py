"""One draw of an augmentation: what it depends on, and what it leaves alone."""

from support.helpers import run, tiny_vit
from support.images import picture_dataset, replayable
from transformers import Trainer


def test_plain_trainer_takes_a_replayable_transform(tmp_path):
    dataset = picture_dataset().with_transform(replayable())
    run(tiny_vit(), dataset, tmp_path, trainer_class=Trainer, num_train_epochs=1, remove_unused_columns=False)
