"""One draw of an augmentation: what it depends on, and what it leaves alone."""

import pytest
import torch
from support.helpers import losses, run, tiny_vit
from support.images import picture_dataset, replayable
from transformers import Trainer

from hf_freezecache.augment.draws import Draw, use_draw
from hf_freezecache.augment.geometry import PROJECTIVE


def test_plain_trainer_takes_a_replayable_transform(tmp_path):
    """Where nobody asks for a draw, it trains as its `train` pipeline alone does: losses agree bit for bit."""

    def trained(transform, name):
        settings = dict(trainer_class=Trainer, num_train_epochs=1, remove_unused_columns=False)
        return losses(run(tiny_vit(), picture_dataset().with_transform(transform), tmp_path / name, **settings))

    def alone(pipeline):
        return lambda rows: {
            "pixel_values": [pipeline(image) for image in rows["image"]],
            "labels": rows["labels"],
        }

    wrapped = trained(replayable(), "wrapped")
    assert len(wrapped) == 4
    assert wrapped == trained(alone(replayable().train), "train")
    assert wrapped != trained(alone(replayable().base), "base")


def test_views_drawn_side_by_side_are_the_views_drawn_alone():
    dataset = picture_dataset(6).with_transform(replayable())
    samples, views = [4, 1, 3, 0], [1, 0, 2, 1]
    with use_draw(Draw(7, samples, view=views, geometry=(PROJECTIVE, (4, 4)))) as together:
        rows = dataset.__getitems__(samples)
    geometries = iter(together.geometries)
    for sample, view, row in zip(samples, views, rows, strict=True):
        with use_draw(Draw(7, [sample], view=view, geometry=(PROJECTIVE, (4, 4)))) as alone:
            [expected] = dataset.__getitems__([sample])
        assert torch.equal(row["pixel_values"], expected["pixel_values"])
        assert all(torch.equal(next(geometries), geometry) for geometry in alone.geometries)
    assert len(together.geometries) == 3


def test_drawing_refuses_another_number_of_views_than_samples():
    with pytest.raises(ValueError, match="got 1 views for 2 samples"):
        Draw(0, [1, 2], view=[1])
