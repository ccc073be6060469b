"""The zoo of tiny models holds what it says: models that answer, learn and tell rows apart."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch
from transformers.models.auto import modeling_auto

from tests.support.model_zoo import ENTRIES, QUICK, UNAVAILABLE, Entry
from tests.support.model_zoo.inputs import UNLABELLED

quick = pytest.mark.parametrize("entry", [ENTRIES[name] for name in QUICK], ids=str)
#: The least numbers of models, with room for releases of Transformers that have fewer.
AT_LEAST = {
    "image": 40,
    "text": 100,
    "audio": 12,
    "token": 12,
    "question": 12,
    "choice": 12,
    "causal": 12,
    "timm": 80,
    "torchvision": 12,
}


def answers(outputs) -> torch.Tensor:
    """What a model answers to each row: logits `(rows, values)`, of the first token where every token has some."""
    logits = next(value for name, value in outputs.items() if name != "loss")
    return logits[:, 0] if logits.ndim == 3 else logits


def check(entry: Entry) -> None:
    """Builds the model and looks at what the proofs of discovery rest on."""
    model, batch = entry.make(), entry.inputs(rows=4)
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    constant = [
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all()
    ]
    assert not constant, f"constant parameters hide mistakes: {constant[:3]}"
    assert batch.keys() <= inspect.signature(model.forward).parameters.keys() | {"labels"}
    with torch.no_grad():
        outputs = model(**batch)
    rows = answers(outputs)
    assert len(rows) == 4 and rows.isfinite().all()
    # 1e-3 of the answers' size is far above float noise.
    assert torch.pdist(rows).min() > 1e-3 * rows.abs().max(), "two rows get the same answer"
    if type(model).__name__ not in UNLABELLED:
        assert outputs.loss.ndim == 0 and outputs.loss.isfinite()


@quick
def test_quick_models_answer_with_a_loss_and_tell_rows_apart(entry):
    check(entry)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=str)
def test_every_model_answers_with_a_loss_and_tells_rows_apart(entry):
    check(entry)


@quick
def test_a_model_is_the_same_at_each_call_and_leaves_the_generators_alone(entry):
    before = torch.get_rng_state()
    first, second = entry.make().state_dict(), entry.make().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_zoo_has_every_classification_class_of_transformers(record_property):
    counts = Counter(entry.kind for entry in ENTRIES.values())
    record_property("models", dict(counts))
    assert not {kind: counts[kind] for kind, least in AT_LEAST.items() if counts[kind] < least}
    classes = {
        "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    }
    for kind, mapping in classes.items():
        names = [name for value in mapping.values() for name in ((value,) if isinstance(value, str) else value)]
        there = {entry.name.rsplit("/")[-1] for entry in ENTRIES.values() if entry.kind == kind}
        assert set(names) - there <= UNAVAILABLE.keys()


def test_padded_rows_have_differing_lengths_and_full_rows_have_none():
    entry = ENTRIES["text/bert/BertForSequenceClassification"]
    padded, full = entry.inputs(rows=6), entry.inputs(rows=6, padded=False)
    assert padded["attention_mask"].sum(1).tolist() == [16, 11, 14, 7, 15, 13]
    assert (padded["input_ids"][padded["attention_mask"] == 0] == entry.make().config.pad_token_id).all()
    assert full["attention_mask"].all()


def test_batches_follow_their_seed():
    entry = ENTRIES["audio/wav2vec2/Wav2Vec2ForSequenceClassification"]
    first, same, other = entry.inputs(seed=1), entry.inputs(seed=1), entry.inputs(seed=2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["input_values"], other["input_values"])


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("token/distilbert/DistilBertForTokenClassification", {"labels": (4, 16)}),
        ("choice/albert/AlbertForMultipleChoice", {"input_ids": (4, 3, 16), "labels": (4,)}),
        ("question/deberta-v2/DebertaV2ForQuestionAnswering", {"start_positions": (4,), "end_positions": (4,)}),
        ("causal/llama/LlamaForCausalLM", {"labels": (4, 16)}),
        ("text/layoutlmv3/LayoutLMv3ForSequenceClassification", {"bbox": (4, 16, 4), "pixel_values": (4, 3, 32, 32)}),
    ],
)
def test_batches_have_the_columns_of_their_head(name, columns):
    batch = ENTRIES[name].inputs(rows=4)
    assert {column: tuple(batch[column].shape) for column in columns} == columns
