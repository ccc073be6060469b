"""A store is reused when everything it was made from is the same, never otherwise."""

import copy
import json
import random

import datasets
import numpy as np
import pytest
import torch
from support import zoo
from support.builds import Rows, collate, make_spec
from support.helpers import pixel_dataset
from support.processes import run_together
from transformers import DefaultDataCollator, default_data_collator

from hf_freezecache.build import materialize as materialize_module
from hf_freezecache.cache.fingerprint import digest, fingerprint_inputs, tensors_digest
from hf_freezecache.cache.rows import RowSource

TENSORS = {"stem.weight": torch.arange(6.0).reshape(2, 3), "stem.running_mean": torch.zeros(3)}


def inputs_of(**settings):
    source = {"dataset": pixel_dataset(6), "collator": default_data_collator, "batch_size": 4, "seed": 3}
    source.update({name: settings.pop(name) for name in list(settings) if name in source})
    made_from = dict(
        model=zoo.make("vit"),
        tensors=TENSORS,
        cut=2,
        blocks=["vit.embeddings", "vit.layers.0"],
        codec="int4",
        augmentation={"views": 0},
        precision="no",
        format_version=1,
    )
    return fingerprint_inputs(source=RowSource(**source), **{**made_from, **settings})


def fingerprint(**settings):
    return digest(inputs_of(**settings))


def changed(name, change):
    tensors = {key: value.clone() for key, value in TENSORS.items()}
    tensors[name] = change(tensors[name])
    return tensors


def scaling(factor):
    """A transform whose only difference is in its closure."""

    def transform(batch):
        return {**batch, "pixel_values": [torch.as_tensor(image) * factor for image in batch["pixel_values"]]}

    return transform


def last_row_changed():
    rows = pixel_dataset(6)
    content = rows.with_format("numpy")[:]
    content["pixel_values"][5, 0, 0, 0] += 1
    return datasets.Dataset.from_dict(dict(content), features=rows.features).with_format("torch")


def test_same_inputs_give_the_same_fingerprint():
    assert fingerprint() == fingerprint()
    assert fingerprint(dataset=Rows(5), collator=collate) == fingerprint(dataset=Rows(5), collator=collate)
    assert fingerprint(dataset=pixel_dataset(6).with_transform(scaling(2.0))) == fingerprint(
        dataset=pixel_dataset(6).with_transform(scaling(2.0))
    )
    assert len(fingerprint()) == 32 and int(fingerprint(), 16) >= 0


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": pixel_dataset(6, seed=1)},
        {"dataset": pixel_dataset(7)},
        {"dataset": last_row_changed()},
        {"dataset": pixel_dataset(6).select([1, 0, 2, 3, 4, 5])},
        {"dataset": pixel_dataset(6).with_transform(scaling(1.0))},
        {"collator": DefaultDataCollator()},
        {"collator": lambda samples: default_data_collator(samples)},
        {"batch_size": 3},
        {"seed": 4},
        {"cut": 3},
        {"blocks": ["vit.embeddings", "vit.layers.1"]},
        {"codec": "int8"},
        {"precision": "bf16"},
        {"format_version": 2},
        {"model": zoo.make("deit")},
        {"model": zoo.vit(hidden_act="relu")},
        {"model": zoo.vit(layer_norm_eps=1e-3)},
        {"model": zoo.vit(num_attention_heads=4)},
        {"tensors": changed("stem.weight", lambda value: value + torch.eye(2, 3) * 1e-7)},
        {"tensors": changed("stem.running_mean", lambda value: value - 1e-9)},
        {"tensors": changed("stem.running_mean", lambda value: -value)},
        {"tensors": changed("stem.weight", lambda value: value.double())},
        {"tensors": changed("stem.weight", lambda value: value.reshape(3, 2))},
        {"tensors": {"stem.weights": TENSORS["stem.weight"], "stem.running_mean": TENSORS["stem.running_mean"]}},
        {"tensors": {"stem.weight": TENSORS["stem.weight"]}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_fingerprint_changes_with(settings):
    assert fingerprint(**settings) != fingerprint()


def test_fingerprint_changes_with_closure_values_of_a_transform():
    dataset = pixel_dataset(6)
    assert fingerprint(dataset=dataset.with_transform(scaling(2.0))) != fingerprint(
        dataset=dataset.with_transform(scaling(2.5))
    )


def test_fingerprint_changes_with_closure_values_that_the_sampled_rows_do_not_show():
    """Only row 1 of 64 is treated otherwise: neither length nor the rows that are looked at tell."""

    def special(row):
        def transform(batch):
            images = [torch.as_tensor(image) for image in batch["pixel_values"]]
            labels = batch["labels"]
            return {
                "labels": labels,
                "pixel_values": [i * (2 if label == row else 1) for i, label in zip(images, labels, strict=True)],
            }

        return transform

    dataset = pixel_dataset(64).remove_columns("labels").add_column("labels", list(range(64))).with_format("torch")
    assert fingerprint(dataset=dataset.with_transform(special(1))) != fingerprint(
        dataset=dataset.with_transform(special(2))
    )


def test_fingerprint_changes_with_the_state_of_a_collator():
    class Scaled:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, samples):
            return default_data_collator(samples)

    assert fingerprint(collator=Scaled(1)) == fingerprint(collator=Scaled(1))
    assert fingerprint(collator=Scaled(1)) != fingerprint(collator=Scaled(2))


def test_labels_count(tmp_path):
    relabelled = pixel_dataset(6).remove_columns("labels").add_column("labels", [0] * 6).with_format("torch")
    assert fingerprint(dataset=relabelled) != fingerprint()


def test_names_of_classes_and_paths_do_not_count_where_they_change_no_feature():
    model = zoo.make("vit")
    model.config.id2label = {number: f"class {number}" for number in range(zoo.CLASSES)}
    model.config._name_or_path = "somewhere/else"
    assert fingerprint(model=model, neutral=True) == fingerprint(neutral=True)
    assert fingerprint(model=model) != fingerprint()


def test_training_state_of_the_model_does_not_count():
    """Freezing and training mode do not change what the prefix computes."""
    model = zoo.make("vit").train()
    model.requires_grad_(False)
    assert fingerprint(model=model) == fingerprint()


def test_data_set_that_cannot_be_hashed_never_matches():
    class Unhashable(Rows):
        def __reduce__(self):
            raise TypeError("holds an open connection")

    dataset = Unhashable(5)
    assert fingerprint(dataset=dataset, collator=collate) != fingerprint(dataset=dataset, collator=collate)
    reused = fingerprint(dataset=Rows(5), collator=collate)
    assert fingerprint(dataset=dataset, collator=collate) != reused


def test_fingerprint_leaves_generators_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    fingerprint(dataset=pixel_dataset(6).with_transform(scaling(2.0)))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.float32])
def test_tensors_of_any_type_are_digested_by_their_bytes(dtype):
    value = torch.tensor([0, 1, 1], dtype=dtype)
    assert tensors_digest({"a": value}) == tensors_digest({"a": value.clone()})
    assert tensors_digest({"a": value}) != tensors_digest({"a": torch.tensor([0, 1, 0], dtype=dtype)})
    assert tensors_digest({"a": torch.zeros((), dtype=dtype)}) != tensors_digest({"a": torch.ones((), dtype=dtype)})
    assert tensors_digest({"a": torch.zeros(0, dtype=dtype)}) == tensors_digest({"a": torch.zeros(0, dtype=dtype)})


def test_layout_in_memory_does_not_count_but_values_do():
    value = torch.arange(6.0).reshape(2, 3)
    assert tensors_digest({"a": value.t().contiguous().t()}) == tensors_digest({"a": value})
    assert tensors_digest({"a": value, "b": value}) == tensors_digest({"b": value, "a": value})


def test_bn_statistics_of_the_prefix_change_the_store_and_those_of_the_suffix_do_not(tmp_path):
    def path(model):
        return make_spec(model, tmp_path, Rows(6, 32), cut=2).path

    model = zoo.make("resnet")
    names = [name for name, _ in model.named_buffers() if name.endswith("running_mean")]
    before = path(model)
    suffix = copy.deepcopy(model)
    dict(suffix.named_buffers())[names[-1]].add_(1)
    assert path(suffix) == before
    dict(model.named_buffers())[names[0]].add_(1e-3)
    assert path(model) != before


def test_suffix_weights_do_not_change_the_store_and_the_cuts_blocks_do(tmp_path):
    model = zoo.make("vit")
    before = make_spec(model, tmp_path).path
    with torch.no_grad():
        next(model.vit.layers[2].parameters()).add_(1)
        model.classifier.weight.add_(1)
    assert make_spec(model, tmp_path).path == before
    with torch.no_grad():
        next(model.vit.layers[0].parameters()).add_(1e-6)
    assert make_spec(model, tmp_path).path != before
    assert materialize_module.digest(make_spec(model, tmp_path).made_from) == make_spec(model, tmp_path).path.name


def describe():
    """What is compared between processes: data sets of several kinds, transforms and collators."""
    kinds = {
        "pixels": dict(dataset=pixel_dataset(6)),
        "transform": dict(dataset=pixel_dataset(6).with_transform(scaling(2.0))),
        "rows": dict(dataset=Rows(5), collator=collate),
        "collator": dict(collator=DefaultDataCollator()),
        "lambda": dict(collator=lambda samples: default_data_collator(samples)),
        "resnet": dict(model=zoo.make("resnet")),
    }
    return {name: inputs_of(**settings) for name, settings in kinds.items()}


def write_description(file):
    file.write_text(json.dumps([describe(), hash("a string")]))


def test_fingerprint_is_the_same_in_another_process(tmp_path):
    [done] = run_together(write_description, [(tmp_path / "other.json",)], tmp_path)
    assert done.returncode == 0, done.stderr
    other, hashed = json.loads((tmp_path / "other.json").read_text())
    mine = json.loads(json.dumps(describe()))
    assert hashed != hash("a string"), "sets have the same order in both processes"
    for name in mine:
        different = [key for key in mine[name] if mine[name][key] != other[name][key]]
        assert different == [], f"{name}: {different}"


def test_saving_the_model_changes_nothing(tmp_path):
    """A training that has written a checkpoint and the one that is resumed from it share their stores."""
    model = zoo.make("vit")
    before = fingerprint(model=model)
    model.save_pretrained(tmp_path)
    assert fingerprint(model=model) == before
