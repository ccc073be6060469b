"""One zoo of tiny models over every classification family of Transformers, and families of timm and torchvision.

`ENTRIES` has them by name; `UNAVAILABLE` says which classes have no tiny model, and why.
"""

from __future__ import annotations

from . import timm_models, torchvision_models, transformers_models
from .entry import Entry, randomize
from .inputs import inputs

_LIBRARIES = (transformers_models, timm_models, torchvision_models)
#: Name -> entry.
ENTRIES: dict[str, Entry] = {entry.name: entry for library in _LIBRARIES for entry in library.entries()}
#: Class -> why the zoo has no tiny model of it.
UNAVAILABLE: dict[str, str] = dict(transformers_models.UNAVAILABLE)
#: Names of models of every kind that differ much from each other, for tests that must be quick.
QUICK: tuple[str, ...] = (
    "image/beit/BeitForImageClassification",
    "image/levit/LevitForImageClassification",
    "image/swin/SwinForImageClassification",
    "text/bert/BertForSequenceClassification",
    "text/gpt2/GPT2ForSequenceClassification",
    "text/layoutlmv3/LayoutLMv3ForSequenceClassification",
    "text/t5/T5ForSequenceClassification",
    "text/xlnet/XLNetForSequenceClassification",
    "audio/wav2vec2/Wav2Vec2ForSequenceClassification",
    "audio/whisper/WhisperForAudioClassification",
    "token/distilbert/DistilBertForTokenClassification",
    "question/deberta-v2/DebertaV2ForQuestionAnswering",
    "choice/albert/AlbertForMultipleChoice",
    "causal/llama/LlamaForCausalLM",
    "timm/crossvit",
    "timm/efficientnet",
    "torchvision/densenet",
)

__all__ = ["ENTRIES", "QUICK", "UNAVAILABLE", "Entry", "inputs", "randomize"]
