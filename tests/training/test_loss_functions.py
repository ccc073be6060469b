"""Labels that the model itself does not take: the user computes the loss."""

import pytest
import torch
from support import zoo
from support.builds import Rows, collate
from support.helpers import CLASSES, assert_same_weights, losses, make_args, manual, pixel_dataset, tiny_vit, weights
from torch import nn
from torch.nn.functional import cross_entropy

from hf_freezecache import FreezeCacheTrainer


class Named(Rows):
    """The main input is called as the plain module calls it."""

    def __getitem__(self, row):
        sample = super().__getitem__(row)
        return {"x": sample["pixel_values"], "labels": sample["labels"]}


def plain_module():
    torch.manual_seed(0)
    return zoo.ConvNet()


def loss_of_tensor(output, labels, num_items_in_batch=None):
    return cross_entropy(output, labels)


def loss_of_mask(output, labels, num_items_in_batch=None):
    return cross_entropy(output.logits, labels[:, 0, 0])


def loss_of_soft_labels(output, labels, num_items_in_batch=None):
    return cross_entropy(output.logits, labels)


CASES = {
    "plain module": (plain_module, Named(), loss_of_tensor, zoo.CONVNET_BLOCKS),
    "masks": (lambda: zoo.make("vit"), Rows(label=lambda row: torch.full((4, 4), row % 5)), loss_of_mask, None),
    "soft labels": (lambda: zoo.make("vit"), Rows(label=lambda row: torch.eye(5)[row % 5]), loss_of_soft_labels, None),
}


@pytest.mark.parametrize("name", list(CASES))
def test_labels_that_only_the_users_loss_takes_are_cached(name, tmp_path):
    build, dataset, loss, blocks = CASES[name]

    def trained(cache):
        args = make_args(
            tmp_path / cache, num_train_epochs=3, remove_unused_columns=False, label_names=["labels"], logging_steps=1
        )
        trainer = FreezeCacheTrainer(
            model=build(),
            args=args,
            train_dataset=dataset,
            data_collator=collate,
            compute_loss_func=loss,
            freeze_cache=manual("1:2", blocks=blocks, codec="fp32", cache=cache),
        )
        trainer.train()
        return trainer

    cached, frozen = trained("always"), trained("never")
    assert cached.freeze_status().replaying and not frozen.freeze_status().replaying
    assert losses(cached) == losses(frozen) and len(losses(cached)) == 9
    assert_same_weights(weights(cached), weights(frozen))


def test_label_columns_of_many_kinds_are_replayed(tmp_path):
    """Soft labels, masks and names: what the collator returns comes back as it was."""
    rows, seen = pixel_dataset(16), {"live": {}, "replay": {}}

    def collate(samples):
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        labels = torch.stack([sample["labels"] for sample in samples])
        return {
            "pixel_values": pixels,
            "labels": nn.functional.one_hot(labels, CLASSES).to(torch.bfloat16),
            "mask": pixels[:, 0] > 0,
            "name": [f"sample {pixel.sum():.4f}" for pixel in pixels],
        }

    class Own(FreezeCacheTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            phase = seen["replay" if self.freeze_status().replaying else "live"]
            for index, name in enumerate(inputs["name"]):
                phase[name] = (
                    inputs["labels"][index].tolist(),
                    inputs["mask"][index].tolist(),
                    inputs["labels"].dtype,
                )
            logits = model(pixel_values=inputs["pixel_values"]).logits
            return nn.functional.cross_entropy(logits, inputs["labels"].float())

    trainer = Own(
        model=tiny_vit(),
        args=make_args(tmp_path, num_train_epochs=2, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=collate,
        freeze_cache=manual("1:3"),
    )
    trainer.train()
    assert len(seen["live"]) == 16 and seen["replay"] == seen["live"]
