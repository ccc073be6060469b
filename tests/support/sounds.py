"""Sounds of several lengths, tiny models of them, and a collator that pads to the longest of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils.data import Dataset
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2ForSequenceClassification

LABELS = 3
_WAV2VEC2 = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    conv_dim=(16, 16),
    conv_kernel=(5, 3),
    conv_stride=(3, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    classifier_proj_size=16,
    vocab_size=8,
    num_labels=LABELS,
    mask_time_prob=0.0,
    layerdrop=0.0,
)


#: A test that cuts Wav2Vec2 behind its first layer, or looks why it is refused there.
CUT_IN_LAYERS = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="before Transformers 5.23, Wav2Vec2 draws a number for each layer in eval mode, too: refused in words",
)


def wav2vec2(kind=Wav2Vec2ForSequenceClassification, **settings):
    """As the large ones: a position of the convolutions is normalized by itself, and padding is masked."""
    torch.manual_seed(0)
    normalized = dict(feat_extract_norm="layer", do_stable_layer_norm=True)
    return kind(Wav2Vec2Config(**{**_WAV2VEC2, **normalized, **settings}))


def wav2vec2_of_letters():
    return wav2vec2(Wav2Vec2ForCTC, ctc_zero_infinity=True)


def wav2vec2_of_groups():
    """As the base ones: the convolutions are normalized over the length of a batch."""
    return wav2vec2(feat_extract_norm="group", do_stable_layer_norm=False)


class Sounds(Dataset):
    """Sounds, each a sum of noise and a tone.

    Args:
        rows: number of sounds.
        shortest, longest: numbers of values.
        letters: whether a sound has a row of labels, not one.
    """

    def __init__(self, rows: int = 24, shortest: int = 60, longest: int = 200, letters: bool = False):
        generator = torch.Generator().manual_seed(7)
        self.rows: list[dict[str, Any]] = []
        for row in range(rows):
            length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
            sound = torch.randn(length, generator=generator) + torch.sin(torch.arange(length) / (2 + row % LABELS))
            labels = [1 + (row + place) % 7 for place in range(1 + row % 4)] if letters else row % LABELS
            self.rows.append({"input_values": sound, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self.rows[row])


class PadSounds:
    """Pads to the longest of a batch, or to a width.

    Args:
        width: None: the longest of the batch.
        side: on which padding is.
        masks: whether it tells which values are of a sound.
    """

    def __init__(self, width: int | None = None, side: str = "right", masks: bool = True):
        self.width, self.side, self.masks = width, side, masks

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sounds = [sample["input_values"] for sample in samples]
        width = self.width or max(map(len, sounds))
        batch = {"input_values": torch.stack([self._pad(sound, width) for sound in sounds])}
        if self.masks:
            ones = [torch.ones(len(sound), dtype=torch.int64) for sound in sounds]
            batch["attention_mask"] = torch.stack([self._pad(mask, width) for mask in ones])
        labels = [sample["labels"] for sample in samples]
        if isinstance(labels[0], list):
            most = max(map(len, labels))
            labels = [[*row, *[-100] * (most - len(row))] for row in labels]
        return {**batch, "labels": torch.tensor(labels)}

    def _pad(self, sound: torch.Tensor, width: int) -> torch.Tensor:
        padding = sound.new_zeros(width - len(sound))
        return torch.cat([sound, padding] if self.side == "right" else [padding, sound])
