"""Every classification class of the installed Transformers, and families of its other text heads, as tiny models."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from .entry import Entry, build
from .inputs import Batch, batch
from .transformers_configs import tiny_config

#: Class -> why the zoo has no tiny model of it.
UNAVAILABLE = {
    "DinatForImageClassification": "needs the package natten",
    "LayoutLMv2ForSequenceClassification": "needs the package detectron2",
    "ShieldGemma2ForImageClassification": "answers with two tokens of a language model; computes no loss",
}

#: Kind -> Transformers' mapping of model types to classes; every class of it is in the zoo.
_WHOLE = {
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}
_ENCODERS = (
    "albert",
    "bert",
    "canine",
    "convbert",
    "deberta-v2",
    "distilbert",
    "electra",
    "funnel",
    "longformer",
    "mobilebert",
    "modernbert",
    "mpnet",
    "nystromformer",
    "roberta",
    "roformer",
    "squeezebert",
    "xlm-roberta",
    "xlnet",
)
_DECODERS = (
    "bloom",
    "falcon",
    "gemma2",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
)
_ONLY_LANGUAGE_MODELS = (
    "bart",
    "bert",
    "cohere",
    "electra",
    "gemma",
    "gemma3_text",
    "gptj",
    "granite",
    "mamba",
    "mamba2",
    "olmo2",
    "openai-gpt",
    "roberta",
)
#: Kind -> Transformers' mapping and the model types that the zoo takes of it, where the mapping has them.
_CHOSEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "token": (
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        (*_ENCODERS, *_DECODERS, "layoutlmv3", "lilt", "t5"),
    ),
    "question": (
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        (*(name for name in _ENCODERS if name != "xlnet"), *_DECODERS, "bart", "t5"),
    ),
    "choice": (modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, _ENCODERS),
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, (*_DECODERS, *_ONLY_LANGUAGE_MODELS)),
}
#: Encoders that are language models only when they are told to look backwards.
_TURNED_DECODERS = {"bert", "electra", "roberta"}


def _settings(kind: str, model_type: str) -> dict[str, Any]:
    if kind == "question":
        return {"num_labels": 2}
    return {"is_decoder": True} if kind == "causal" and model_type in _TURNED_DECODERS else {}


def _make(model_type: str, class_name: str, kind: str) -> nn.Module:
    config = tiny_config(model_type, **_settings(kind, model_type))
    model_class = getattr(transformers, class_name)
    return build(lambda: model_class(config), batch(model_class, config, rows=8, seed=0, padded=True))


def _inputs(model_type: str, class_name: str, kind: str, rows: int = 4, seed: int = 1, padded: bool = True) -> Batch:
    config = tiny_config(model_type, **_settings(kind, model_type))
    return batch(getattr(transformers, class_name), config, rows, seed, padded)


def _targets() -> Iterator[tuple[str, str, str]]:
    """Kind, model type and class of everything that the zoo wants of Transformers."""
    wanted = {kind: (mapping, tuple(mapping)) for kind, mapping in _WHOLE.items()} | _CHOSEN
    for kind, (mapping, model_types) in wanted.items():
        for model_type in model_types:
            classes = mapping.get(model_type, ())
            for class_name in (classes,) if isinstance(classes, str) else classes:
                yield kind, model_type, class_name


def entries() -> list[Entry]:
    """The entries, by kind and then in the order of Transformers' mappings."""
    return [
        Entry(
            name=f"{kind}/{model_type}/{class_name}",
            kind=kind,
            family=model_type,
            make=functools.partial(_make, model_type, class_name, kind),
            inputs=functools.partial(_inputs, model_type, class_name, kind),
        )
        for kind, model_type, class_name in _targets()
        if class_name not in UNAVAILABLE
    ]
