"""Batches for the models of the zoo: images, texts and sounds, with labels that fit the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .transformers_configs import CLASSES, END, PADDING, VOCABULARY

Batch = dict[str, torch.Tensor]

#: Rows of text and sound are this much shorter than the longest, in turn; the first row is full.
_SHORTER = (0, 5, 2, 9, 1, 3, 4, 6)
_TEXT_LENGTH = 16
#: These models cut texts into pieces of a fixed length.
_LONG_TEXTS = {"big_bird", "bigbird_pegasus", "canine", "longformer", "reformer"}
_CHOICES = 3
_FIRST_TOKEN = 5
#: Classes that can be trained with a loss from outside only, because their `forward` takes no labels.
UNLABELLED = {
    "DeiTForImageClassificationWithTeacher",
    "LevitForImageClassificationWithTeacher",
    "PPLCNetForImageClassification",
}
_WITHOUT_MASK = {"fnet"}
#: Sizes of images that their configurations do not say.
_IMAGE_SIZES = {
    "PerceiverForImageClassificationFourier": 224,
    "PerceiverForImageClassificationConvProcessing": 224,
    "TimmWrapperForImageClassification": 32,
}


def inputs(model: PreTrainedModel, rows: int = 4, seed: int = 1, padded: bool = True) -> Batch:
    """Makes a batch for a model of Transformers.

    Args:
        model: made by the zoo.
        rows: number of rows.
        seed: of the random values.
        padded: whether rows of text and sound have differing lengths and padding at their ends.

    Returns:
        Model inputs by name; `labels` (or start and end positions) included where the model takes them.
    """
    return batch(type(model), model.config, rows, seed, padded)


def batch(model_class: type, config: PretrainedConfig, rows: int, seed: int, padded: bool) -> Batch:
    """As `inputs`, for a class and its configuration."""
    generator = torch.Generator().manual_seed(seed)
    name = model_class.__name__
    if "ImageClassification" in name:
        made = _images(name, config, rows, generator)
    elif model_class.main_input_name in ("input_values", "input_features"):
        made = _sounds(config, rows, generator, padded)
    else:
        return _labelled_texts(name, config, rows, generator, padded)
    return made if name in UNLABELLED else {**made, "labels": _classes(rows, generator)}


def pixels(rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random images `(rows, 3, size, size)`."""
    return torch.randn(rows, 3, size, size, generator=generator)


def labelled_pixels(size: int, rows: int, seed: int) -> Batch:
    """A batch for an image classifier: `pixel_values` `(rows, 3, size, size)` and `labels` `(rows,)`."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": pixels(rows, size, generator), "labels": _classes(rows, generator)}


def _classes(rows: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, CLASSES, (rows,), generator=generator)


def _lengths(rows: int, longest: int, unit: int, padded: bool) -> torch.Tensor:
    shorter = torch.tensor([_SHORTER[row % len(_SHORTER)] for row in range(rows)])
    return longest - shorter * unit * padded


def _mask(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    return (torch.arange(longest)[None] < lengths[:, None]).long()


def _images(name: str, config: PretrainedConfig, rows: int, generator: torch.Generator) -> Batch:
    if config.model_type == "imagegpt":
        return {"input_ids": torch.randint(0, config.vocab_size - 1, (rows, config.n_positions), generator=generator)}
    if config.model_type == "siglip2":
        vision = config.vision_config
        patches, pixels_of_patch = vision.num_patches, 3 * vision.patch_size**2
        side = int(patches**0.5)
        return {
            "pixel_values": torch.randn(rows, patches, pixels_of_patch, generator=generator),
            "pixel_attention_mask": torch.ones(rows, patches, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * rows),
        }
    size = _IMAGE_SIZES.get(name) or getattr(getattr(config, "vision_config", config), "image_size", None) or 64
    images = pixels(rows, size[0] if isinstance(size, (list, tuple)) else size, generator)
    return {"inputs" if config.model_type == "perceiver" else "pixel_values": images}


def _sounds(config: PretrainedConfig, rows: int, generator: torch.Generator, padded: bool) -> Batch:
    model_type = config.model_type
    if model_type == "whisper":
        frames = 2 * config.max_source_positions
        return {"input_features": torch.randn(rows, config.num_mel_bins, frames, generator=generator)}
    if model_type == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(rows, config.max_length, config.num_mel_bins, generator=generator)}
    if model_type == "wav2vec2-bert":
        mask = _mask(_lengths(rows, 24, 1, padded), 24)
        frames = torch.randn(rows, 24, config.feature_projection_input_dim, generator=generator)
        return {"input_features": frames * mask[:, :, None], "attention_mask": mask}
    mask = _mask(_lengths(rows, 1000, 80, padded), 1000)
    return {"input_values": torch.randn(rows, 1000, generator=generator) * mask, "attention_mask": mask}


def _texts(config: PretrainedConfig, rows: int, generator: torch.Generator, padded: bool) -> Batch:
    """Tokens `(rows, length)` with their mask, and what else the model type reads beside them."""
    model_type = config.model_type
    vocabulary = getattr(config.get_text_config(), "vocab_size", VOCABULARY)
    length = 2 * _TEXT_LENGTH if model_type in _LONG_TEXTS else _TEXT_LENGTH
    mask = _mask(_lengths(rows, length, 1, padded), length)
    tokens = torch.randint(_FIRST_TOKEN, vocabulary - 1, (rows, length), generator=generator)
    tokens = torch.where(mask.bool(), tokens, PADDING)
    if config.is_encoder_decoder:
        # The heads of encoder-decoders look for the last end of a text.
        tokens[torch.arange(rows), mask.sum(1) - 1] = END
    if model_type == "longformer":
        # Its heads for questions count the separators: two after the question, one at the end.
        tokens[:, 3:5] = END
        tokens[torch.arange(rows), mask.sum(1) - 1] = END
    made = {"inputs" if model_type == "perceiver" else "input_ids": tokens}
    if model_type not in _WITHOUT_MASK:
        made["attention_mask"] = mask
    if model_type in _BESIDE_TEXTS:
        made.update(_BESIDE_TEXTS[model_type](config, rows, length, generator))
    elif (getattr(config, "type_vocab_size", None) or 0) > 1:
        made["token_type_ids"] = (torch.arange(length)[None] >= length // 3).long() * mask
    return made


def _labelled_texts(name: str, config: PretrainedConfig, rows: int, generator: torch.Generator, padded: bool) -> Batch:
    if name.endswith("ForMultipleChoice"):
        choices = _texts(config, rows * _CHOICES, generator, padded)
        made = {column: value.unflatten(0, (rows, _CHOICES)) for column, value in choices.items()}
        return {**made, "labels": torch.randint(0, _CHOICES, (rows,), generator=generator)}
    made = _texts(config, rows, generator, padded)
    tokens = made.get("input_ids", made.get("inputs"))
    assert tokens is not None
    real = tokens != PADDING
    if name.endswith("ForTokenClassification"):
        labels = torch.randint(0, CLASSES, tuple(tokens.shape), generator=generator)
        return {**made, "labels": torch.where(real, labels, -100)}
    if name.endswith("ForQuestionAnswering"):
        shortest = int(real.sum(1).min())
        start = torch.randint(0, shortest // 2, (rows,), generator=generator)
        end = start + torch.randint(1, shortest // 2, (rows,), generator=generator)
        return {**made, "start_positions": start, "end_positions": end}
    if not name.endswith("ForSequenceClassification"):
        # A language model: the labels are the tokens.
        return {**made, "labels": torch.where(real, tokens, -100)}
    return {**made, "labels": _classes(rows, generator)}


def _boxes(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Places of words on a page `(rows, length, 4)`: left, top, right, bottom."""
    corner = torch.randint(0, 30, (rows, length, 2), generator=generator)
    return torch.cat([corner, corner + torch.randint(0, 20, (rows, length, 2), generator=generator)], -1)


def _layout(config: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    return {"bbox": _boxes(rows, length, generator)}


def _layout_and_page(config: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    return {
        "bbox": _boxes(rows, length, generator),
        "pixel_values": pixels(rows, config.input_size, generator),
    }


def _entities(config: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    return {
        "entity_ids": torch.randint(1, config.entity_vocab_size, (rows, 2), generator=generator),
        "entity_attention_mask": torch.ones(rows, 2, dtype=torch.long),
        "entity_position_ids": torch.randint(0, 7, (rows, 2, 5), generator=generator),
    }


def _tables(config: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    columns = [torch.randint(0, size, (rows, length), generator=generator) for size in config.type_vocab_sizes]
    return {"token_type_ids": torch.stack(columns, -1)}


def _shapes_and_sounds(config: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    shapes, sounds = config.shape_vocab_size, config.pronunciation_vocab_size
    return {
        "input_shape_ids": torch.randint(1, shapes, (rows, length), generator=generator),
        "input_pronunciation_ids": torch.randint(1, sounds, (rows, length), generator=generator),
    }


def _markup(config: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    size = (rows, length, config.max_depth)
    return {
        "xpath_tags_seq": torch.randint(0, config.max_xpath_tag_unit_embeddings, size, generator=generator),
        "xpath_subs_seq": torch.randint(0, config.max_xpath_subs_unit_embeddings, size, generator=generator),
    }


#: Model type -> the columns that it reads beside tokens and mask.
_BESIDE_TEXTS: dict[str, Callable[[Any, int, int, torch.Generator], Batch]] = {
    "layoutlm": _layout,
    "layoutlmv3": _layout_and_page,
    "lilt": _layout,
    "luke": _entities,
    "markuplm": _markup,
    "roc_bert": _shapes_and_sounds,
    "tapas": _tables,
}
