"""Real weights on real images; they lie beside the checkout and are not part of the project."""

from pathlib import Path

import datasets
import pytest
import torch
from support.helpers import assert_same_weights, losses, manual, run, weights
from support.sessions import chain_of
from torchvision.transforms import v2
from transformers import ViTForImageClassification

from hf_freezecache import BlockChain, FeatureStore, ReplayableTransform
from hf_freezecache.augment.geometry import PROJECTIVE, decode_geometry, warp
from hf_freezecache.augment.maps import to_maps
from hf_freezecache.cache.rows import RowSource

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS, IMAGES = SHARED / "weights" / "deit-tiny-patch16-224", SHARED / "data" / "caltech101" / "train.parquet"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (WEIGHTS.exists() and IMAGES.exists()), reason=f"no {WEIGHTS.name} or {IMAGES.name} there"),
]
CLASSES = 101
MEAN_AND_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def deit():
    torch.manual_seed(0)
    return ViTForImageClassification.from_pretrained(WEIGHTS, num_labels=CLASSES, ignore_mismatched_sizes=True)


def caltech(rows):
    to_pixels = v2.Compose(
        [v2.RGB(), v2.ToImage(), v2.Resize(128), v2.CenterCrop(112), v2.ToDtype(torch.float32, scale=True)]
    )

    def transform(batch):
        return {"pixel_values": [to_pixels(image) for image in batch["image"]], "label": batch["label"]}

    dataset = datasets.load_dataset("parquet", data_files=str(IMAGES), split="train")
    return dataset.select(range(rows)).with_transform(transform)


def collate(rows):
    pixels = torch.stack([row["pixel_values"] for row in rows])
    labels = torch.tensor([row["label"] for row in rows])
    return {"pixel_values": pixels, "labels": labels, "interpolate_pos_encoding": True}


def test_every_cut_reproduces_the_logits():
    chain = BlockChain.from_model(deit())
    assert len(chain) == 13 and chain.layout(4).shape == (197, 192) and chain.layout(4).special_tokens == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_with_fp32_codec_is_freeze_only(workers, tmp_path):
    settings = dict(
        num_train_epochs=3,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        data_collator=collate,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
    )
    dataset = caltech(64)
    frozen = run(deit(), dataset, tmp_path / "f", manual("1:4,2:10", cache="never"), **settings)
    cached = run(deit(), dataset, tmp_path / "c", manual("1:4,2:10", codec="fp32"), **settings)
    assert losses(cached) == losses(frozen)
    assert_same_weights(weights(cached), weights(frozen))


def test_warped_base_features_follow_the_view_better_than_unwarped():
    """Random resized crops of real photographs, DeiT-Tiny: the geometry holds for features, not only for pixels."""
    size = 224
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*MEAN_AND_STD)]
    train = v2.Compose([v2.RandomResizedCrop(size, (0.35, 1.0)), v2.RandomHorizontalFlip(), *finish])
    transform = ReplayableTransform(train=train, base=v2.Compose([v2.Resize((size, size)), *finish]))
    dataset = datasets.load_dataset("parquet", data_files=str(IMAGES), split="train").select(range(32))
    source = RowSource(dataset.with_transform(transform), lambda rows: {"pixel_values": stack(rows)}, 32, seed=0)
    chain = BlockChain.from_model(deit())
    for cut, margin in ((4, 0.2), (8, 0.25)):
        layout = chain.layout(cut)
        drawn = source.draw(range(32), 1, (PROJECTIVE, layout.grid))
        base, view = (to_maps(chain.prefix(batch, cut), layout) for batch in (source.collate(range(32)), drawn.batch))
        sources = decode_geometry(drawn.geometry, PROJECTIVE, layout.grid)
        unwarped, warped = (
            torch.cosine_similarity(maps.flatten(2), view.flatten(2), dim=-1).mean()
            for maps in (base, warp(base, sources))
        )
        assert warped > unwarped + margin


def stack(rows):
    return torch.stack([row["pixel_values"] for row in rows])


def test_int4_store_is_close_to_the_features(tmp_path):
    trainer = run(
        deit(),
        caltech(64),
        tmp_path,
        manual("0:7"),
        num_train_epochs=1,
        per_device_train_batch_size=16,
        data_collator=collate,
        remove_unused_columns=False,
    )
    store = FeatureStore.open(trainer.freeze_status().store_path)
    rows = caltech(64)
    batch = collate([rows[index] for index in (3, 60)])
    batch.pop("labels")
    exact = chain_of(trainer).prefix(batch, 7)
    cosine = torch.cosine_similarity(store.read([3, 60]).flatten(1), exact.flatten(1))
    assert (cosine > 0.98).all()
    assert store.codec.bits_per_value < 4.3
