"""A model of images of any size, whose patches lie one after the other in a batch (Qwen2-VL)."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

_IMAGE, _START, _END, _WORDS = 60, 58, 59, 50
_PATCH = 4


def qwen2_vl() -> Qwen2VLForConditionalGeneration:
    """2 layers for images and 3 for texts, of 32 channels."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, max_position_embeddings=256, rope_parameters=rope, pad_token_id=0)
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, mlp_ratio=2, patch_size=_PATCH)
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=61,
        vision_start_token_id=_START,
        vision_end_token_id=_END,
    )
    return Qwen2VLForConditionalGeneration(config)


class Described(Dataset):
    """Images of grids of patches, each with a text."""

    def __init__(self, rows: int = 12, grids=((2, 2), (2, 4), (4, 4))):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for row in range(rows):
            height, width = grids[row % len(grids)]
            words = torch.randint(3, _WORDS, (5 + row % 3,), generator=generator).tolist()
            patches = torch.randn(height * width, 2 * 3 * _PATCH**2, generator=generator)
            tokens = [_START, *[_IMAGE] * (height * width // 4), _END, *words]
            self.rows.append({"input_ids": tokens, "pixel_values": patches, "grid": (1, height, width)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int):
        return dict(self.rows[row])


def pack(samples):
    """Pads the texts; all patches lie one after the other."""
    width = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.tensor([sample["input_ids"] + [0] * (width - len(sample["input_ids"])) for sample in samples])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": ids.masked_fill(ids == 0, -100),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
        "image_grid_thw": torch.tensor([sample["grid"] for sample in samples]),
        "mm_token_type_ids": (ids == _IMAGE).long(),
    }
