"""Loading of images, labels and classifiers; `freezecache plan` and the recipe plan for the same training."""

from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from support import helpers, images
from transformers import DeiTImageProcessor, ViTForImageClassification

from hf_freezecache.cli import main as command
from hf_freezecache.cli import plan as plan_command
from hf_freezecache.cli.images import ImageCollator, encode_labels, find_columns, load_classifier, load_images

RECIPES = Path(__file__).parents[2] / "recipes"


def labelled(labels, kind) -> Dataset:
    return Dataset.from_dict(
        {"label": labels, "text": ["a"] * len(labels)}, Features(label=kind, text=Value("string"))
    )


def decoded(splits: DatasetDict) -> dict[str, list[str]]:
    return {name: split.features["label"].int2str(list(split["label"])) for name, split in splits.items()}


# Files


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "images-0.parquet"
    images.picture_dataset(6).to_parquet(path)
    return path


def test_images_come_from_parquet_files_and_absolute_patterns(parquet):
    assert len(load_images([str(parquet)])) == 6
    images.picture_dataset(3).to_parquet(parquet.with_name("images-1.parquet"))
    assert len(load_images([str(parquet.parent / "images-*.parquet")])) == 9


def test_images_come_from_a_folder_with_a_folder_a_class(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        images.picture_dataset(1)[0]["image"].save(tmp_path / name / "0.png")
    dataset = load_images([str(tmp_path)])
    assert find_columns(dataset, None, None) == ("image", "label")
    assert dataset.features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["missing.parquet"], FileNotFoundError, "missing.parquet does not exist"),
        (["missing-*.parquet"], FileNotFoundError, "does not exist"),
        (["images-0.parquet", "images-*.tar"], FileNotFoundError, "does not exist"),
        (["images-0.parquet", "."], ValueError, "one folder, or from files"),
        ([".", "images-0.parquet"], ValueError, "one folder, or from files"),
    ],
)
def test_paths_that_hold_no_images_are_refused_by_name(parquet, names, error, message):
    with pytest.raises(error, match=message):
        load_images([str(parquet.parent / name) for name in names])


# Columns


@pytest.mark.parametrize(
    ("kinds", "given", "expected"),
    [
        (
            {"photo": Image(), "kind": ClassLabel(names=["a"]), "label": Value("int64")},
            (None, None),
            ("photo", "kind"),
        ),
        ({"labels": Value("string"), "image": Image()}, (None, None), ("image", "labels")),
        ({"jpg": Image(), "cls": Value("int64"), "__key__": Value("string")}, (None, None), ("jpg", "cls")),
        ({"first": Image(), "second": Image(), "kind": Value("int64")}, ("second", "kind"), ("second", "kind")),
    ],
)
def test_columns_are_found_by_type_and_name(kinds, given, expected):
    dataset = Dataset.from_dict({name: [] for name in kinds}, Features(kinds))
    assert find_columns(dataset, *given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, "label"), "no column of the images among label, text: name it with --image-column"),
        (("text", "kind"), "--label-column: no column 'kind' among label, text"),
    ],
)
def test_missing_columns_are_named_with_their_option(given, message):
    with pytest.raises(ValueError, match=message):
        find_columns(labelled([0], Value("int64")), *given)


def test_archives_and_parquet_files_are_not_mixed(parquet):
    archive = parquet.with_name("images.tar")
    archive.touch()
    with pytest.raises(ValueError, match="parquet files or from tar archives, not from both"):
        load_images([str(parquet), str(archive)])


# Labels


def test_whole_numbers_keep_their_order_and_other_labels_are_sorted_as_text():
    numbers = encode_labels(DatasetDict(train=labelled([10, 2, 0], Value("int64"))), "label")["train"]
    assert numbers.features["label"].names == ["0", "2", "10"] and list(numbers["label"]) == [2, 1, 0]
    words = encode_labels(DatasetDict(train=labelled(["10", "b", "2"], Value("string"))), "label")["train"]
    assert words.features["label"].names == ["10", "2", "b"]


def test_labels_that_are_class_numbers_stay_as_they_are():
    kind = ClassLabel(names=["dog", "cat"])
    splits = DatasetDict(train=labelled([0, 1], kind), validation=labelled([1], kind))
    assert encode_labels(splits, "label") is splits


@pytest.mark.parametrize(("kind", "labels"), [(Value("string"), ["dog", "cat", "dog"]), (Value("int64"), [7, -2, 7])])
def test_labels_become_numbers_of_the_classes_of_all_splits(kind, labels):
    splits = DatasetDict(train=labelled(labels, kind), validation=labelled(labels[:1], kind))
    encoded = encode_labels(splits, "label")
    names = sorted({str(label) for label in labels})
    assert encoded["train"].features["label"] == encoded["validation"].features["label"] == ClassLabel(names=names)
    assert decoded(encoded) == {"train": [str(label) for label in labels], "validation": [str(labels[0])]}
    assert encoded["train"].column_names == ["label", "text"]


def test_splits_with_other_class_numbers_get_the_same_ones():
    train = labelled([0, 1, 2], ClassLabel(names=["cat", "dog", "owl"]))
    # A folder of validation images without a single cat.
    validation = labelled([0, 1], ClassLabel(names=["dog", "owl"]))
    encoded = encode_labels(DatasetDict(train=train, validation=validation), "label")
    assert list(encoded["train"]["label"]) == [0, 1, 2]
    assert list(encoded["validation"]["label"]) == [1, 2]


# Classifiers


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a ViT of two layers for 16x16 images, and a processor that resizes to 20x20 and crops."""
    folder = tmp_path_factory.mktemp("model")
    helpers.tiny_vit(num_hidden_layers=2).save_pretrained(folder)
    sides = {"size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}}
    DeiTImageProcessor(**sides).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("size", "constants"), [(None, {}), (16, {}), (32, {"interpolate_pos_encoding": True})])
def test_classifier_gets_a_head_for_the_classes_and_takes_images_of_another_size(classifier, size, constants):
    model, processor, found = load_classifier(str(classifier), ["cat", "dog"], size)
    assert isinstance(model, ViTForImageClassification) and isinstance(processor, DeiTImageProcessor)
    assert model.config.id2label == {0: "cat", 1: "dog"} and model.config.label2id == {"cat": 0, "dog": 1}
    assert found == constants
    side = size or 16
    rows = [{"pixel_values": torch.zeros(3, side, side), "kind": kind} for kind in (1, 0)]
    batch = ImageCollator("kind", found)(rows)
    assert batch["labels"].tolist() == [1, 0]
    assert model(**batch).logits.shape == (2, 2)


def test_classifier_from_scratch_reads_no_weights_and_follows_the_seed(classifier):
    torch.manual_seed(3)
    first, *_ = load_classifier(str(classifier), ["cat", "dog"], pretrained=False)
    torch.manual_seed(3)
    again, *_ = load_classifier(str(classifier), ["cat", "dog"], pretrained=False)
    pretrained, *_ = load_classifier(str(classifier), ["cat", "dog"])
    name = "vit.embeddings.patch_embeddings.projection.weight"
    weights = [model.state_dict()[name] for model in (first, again, pretrained)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# The command and the recipe


class Arguments(Exception):
    """Carries what `plan` was called with out of a program."""

    def __init__(self, model, dataset, config, *, args, data_collator, **others):
        self.model, self.dataset, self.collator, self.config = model, dataset, data_collator, config


def stop(*args, **kwargs):
    raise Arguments(*args, **kwargs)


@pytest.mark.parametrize(
    "options", ["", "--augmentation color --min-crop 0.6", "--augmentation none", "--image-size 32"]
)
def test_command_plans_for_the_pixels_and_the_model_of_the_recipe(classifier, parquet, options, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    import image_classification

    monkeypatch.setattr(plan_command, "plan", stop)
    monkeypatch.setattr(image_classification, "plan", stop)
    with pytest.raises(Arguments) as planned:
        command.main(["plan", str(classifier), "--data", str(parquet), *options.split()])
    recipe = f"--model_name_or_path {classifier} --train_files {parquet} --validation_files {parquet} --plan"
    with pytest.raises(Arguments) as trained:
        image_classification.main(f"{recipe} --output_dir {tmp_path} --report_to none {options}".split())
    first, second = planned.value, trained.value
    assert type(first.model) is type(second.model) and first.model.config.to_dict() == second.model.config.to_dict()
    batches = []
    for side in (first, second):
        torch.manual_seed(0)
        batches.append(side.collator([side.dataset[row] for row in range(6)]))
    assert batches[0].keys() == batches[1].keys()
    for name in ("pixel_values", "labels"):
        assert torch.equal(batches[0][name], batches[1][name])
