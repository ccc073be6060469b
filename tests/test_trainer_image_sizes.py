"""Images of several sizes as patches: of one number, with a mask (NaFlex), or one after the other (Qwen2-VL)."""

import pytest
import torch
from support.helpers import CLASSES, assert_same_weights, losses, manual, messages, run, weights
from support.packed_patches import Described, pack, qwen2_vl
from support.pretrained import settle
from torch.utils.data import Dataset
from transformers import (
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2ImageProcessor,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    default_data_collator,
)

from hf_freezecache import FreezeCacheConfig
from hf_freezecache.model.errors import ChainError

PATCHES, PATCH = 20, 4
#: Heights and widths; the processor resizes them to grids of up to 20 patches, each of its own shape.
SIZES = [(16, 16), (8, 32), (40, 12), (24, 20), (9, 7)]


def siglip():
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    vision = Siglip2VisionConfig(**tower, patch_size=PATCH, num_patches=16)
    text = Siglip2TextConfig(**tower, vocab_size=64, bos_token_id=1, eos_token_id=2, max_position_embeddings=16)
    config = Siglip2Config(vision_config=vision.to_dict(), text_config=text.to_dict(), num_labels=CLASSES)
    return Siglip2ForImageClassification(config)


class Images(Dataset):
    """Images of several sizes as the processor gives them: patches, which are real, and the shape of their grid."""

    def __init__(self, rows: int = 20):
        generator = torch.Generator().manual_seed(0)
        processor = Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=PATCHES)
        self.rows = []
        for row in range(rows):
            image = torch.randint(0, 256, (3, *SIZES[row % len(SIZES)]), generator=generator, dtype=torch.uint8)
            inputs = processor(image.permute(1, 2, 0).numpy(), return_tensors="pt")
            self.rows.append({name: value[0] for name, value in inputs.items()} | {"labels": row % CLASSES})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return dict(self.rows[row])


def test_images_as_padded_patches_of_several_grids_are_cached(tmp_path):
    images = Images()
    shapes = {tuple(row["spatial_shapes"].tolist()) for row in images.rows}
    assert len(shapes) == 4 and any(not row["pixel_attention_mask"].all() for row in images.rows)
    settings = dict(data_collator=default_data_collator, remove_unused_columns=False, num_train_epochs=3)
    frozen = run(siglip(), images, tmp_path / "frozen", manual("1:3", cache="never"), **settings)
    config = manual("1:3", codec="fp32", on_mismatch="error")
    trained = run(siglip(), images, tmp_path / "cached", config, **settings)
    assert trained.freeze_status().replaying and losses(trained) == losses(frozen)
    assert_same_weights(weights(trained), weights(frozen))


@pytest.mark.parametrize("cache", ["always", "auto", "never"])
def test_patches_of_all_images_one_after_the_other_are_refused_in_words(cache, tmp_path):
    """Qwen2-VL: an image has no row of its own in a batch."""
    settings = dict(data_collator=pack, remove_unused_columns=False, num_train_epochs=2)
    with pytest.raises(ChainError, match="'pixel_values' has .* rows, and 'input_ids' .* cannot be taken apart"):
        run(qwen2_vl(), Described(), tmp_path, manual("1:3", cache=cache), **settings)


def test_defaults_train_on_patches_one_after_the_other_as_a_trainer_does(tmp_path, caplog):
    caplog.set_level("WARNING")
    settings = dict(data_collator=pack, remove_unused_columns=False, num_train_epochs=2)
    plain = run(settle(qwen2_vl()), Described(), tmp_path / "plain", FreezeCacheConfig(policy="none"), **settings)
    found = run(settle(qwen2_vl()), Described(), tmp_path / "default", None, **settings)
    assert losses(found) == losses(plain) and "cannot be taken apart" in messages(caplog)
