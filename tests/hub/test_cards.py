"""Cards: what was measured, what is estimated, and what is not told."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from support.heads import load_base, logits, make_base, trained
from support.helpers import make_args, manual, pixel_dataset, run
from transformers import Trainer

import hf_freezecache
from hf_freezecache import FreezeCacheTrainer, save_head, wrap_classifier
from hf_freezecache.hub.card import CardFacts

ROOT = Path(__file__).parents[2]
BASE = "google/vit-base-patch16-224-in21k"
FACTS = CardFacts(
    model_name="Pixels",
    dataset="Random pixels",
    dataset_tags=["ann/pixels"],
    plain={"accuracy": 0.5},
    license="apache-2.0",
    language="en",
    tags=["tiny"],
    finetuned_from=BASE,
    limits=["Other sizes of images were not tried."],
)


def accuracy(answers):
    return {"accuracy": float((answers.predictions.argmax(-1) == answers.label_ids).mean())}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("vit", tmp_path_factory.mktemp("bases") / "vit")


@pytest.fixture(scope="module")
def trainer(base, tmp_path_factory):
    """An epoch each at cut 0, 1 and 3, evaluated."""
    return run(
        load_base(base),
        pixel_dataset(32),
        tmp_path_factory.mktemp("runs") / "run",
        manual("1:1,2:3"),
        num_train_epochs=3,
        eval_dataset=pixel_dataset(16, seed=4),
        eval_strategy="epoch",
        compute_metrics=accuracy,
    )


def snippet_of(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def rows_of(card, header):
    lines = card[card.index(header) :].splitlines()[2:]
    table = lines[: lines.index("")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_metadata_is_what_the_hub_reads(trainer, tmp_path):
    card = ModelCard.load(save_head(trainer, tmp_path / "head", card=FACTS) / "README.md")
    data = card.data
    assert (data.base_model, data.library_name, data.license) == (BASE, "transformers", "apache-2.0")
    assert (data.datasets, data.metrics, data.tags) == (["ann/pixels"], ["accuracy"], ["hf_freezecache", "tiny"])
    assert (data.pipeline_tag, data.language, data.model_name) == ("image-classification", "en", "Pixels")
    [result] = data.eval_results
    value = next(entry["eval_accuracy"] for entry in reversed(trainer.state.log_history) if "eval_accuracy" in entry)
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "image-classification",
        "ann/pixels",
        "Random pixels",
    )
    assert (result.metric_type, result.metric_value) == ("accuracy", value)


def test_timeline_is_that_of_the_report(trainer, tmp_path):
    card = (save_head(trainer, tmp_path / "head") / "README.md").read_text()
    rows = rows_of(card, "| frozen blocks | mode |")
    report = trainer.freeze_cache_report()
    assert [row[:4] for row in rows] == [
        [str(phase.cut), phase.mode, str(phase.epochs), str(phase.steps)] for phase in report.phases
    ]
    assert [float(row[4]) for row in rows] == pytest.approx([phase.seconds for phase in report.phases], abs=0.06)
    assert [float(row[5]) for row in rows] == pytest.approx([phase.flops / 1e12 for phase in report.phases], rel=1e-3)
    assert "- epochs: 1 on samples, 2 on stored features" in card
    assert "cut 3, codec int4" in card
    assert "seconds saved, estimated from measured steps of plain training" in card
    assert "operations saved, estimated from a measured step" in card
    assert "`policy='manual'`, `freeze_points='1:1,2:3'`, `cache='always'`" in card


def test_metrics_stand_beside_those_of_plain_training(trainer, tmp_path):
    card = (save_head(trainer, tmp_path / "head", card=FACTS) / "README.md").read_text()
    rows = {row[0]: row[1:] for row in rows_of(card, "| metric | this model | plain training |")}
    assert rows["accuracy"][1] == "0.5" and rows["loss"][1] == "not measured"
    assert "- Other sizes of images were not tried." in card
    assert "Not measured" not in card


def test_card_says_what_was_not_measured(base, tmp_path):
    card = (save_head(trained(base, 2), tmp_path / "head", cut=2) / "README.md").read_text()
    assert "The course of the training is not known." in card
    assert (
        "Not measured, and therefore not told: what the training took; how well it does on data that it was not "
        "trained on; what plain training would have reached."
    ) in card
    assert not re.search(r"accuracy|seconds|TFLOP|None|nan\b", card.split("---\n")[2])
    assert ModelCard(card).data.eval_results is None


@pytest.mark.parametrize("known", ["head", "all", "nothing"])
def test_tables_have_as_many_cells_in_every_row_and_no_gaps(known, trainer, base, tmp_path):
    subject = trained(base, 2) if known == "nothing" else trainer
    card = (
        save_head(subject, tmp_path / "head", cut=2, card=FACTS if known == "all" else None) / "README.md"
    ).read_text()
    for table in re.findall(r"(?:^\|.*\n)+", card, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "\n\n\n" not in card and "{{" not in card and "{%" not in card


def test_snippet_of_a_head_loads_it(trainer, base, tmp_path, monkeypatch):
    folder = save_head(trainer, tmp_path / "head")
    monkeypatch.chdir(folder)
    names = {}
    exec(snippet_of((folder / "README.md").read_text()).replace("folder or id of the base", str(base)), names)
    assert torch.equal(logits(names["model"]), logits(trainer.model))


def test_snippet_of_a_head_without_a_base_loads_it(base, tmp_path, monkeypatch):
    model = trained(base, 2)
    model.config._name_or_path = ""
    folder = save_head(model, tmp_path / "head", cut=2)
    monkeypatch.chdir(folder)
    names = {}
    exec(snippet_of((folder / "README.md").read_text()), names)
    assert torch.equal(logits(names["model"]), logits(model))


def test_card_of_a_trainer_is_the_same_and_its_snippet_loads_the_model(trainer, monkeypatch):
    trainer.create_model_card(license="mit", tags="mine", dataset_tags="ann/pixels", dataset="Random pixels")
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert data.tags == ["hf_freezecache", "mine", "generated_from_trainer"] and data.license == "mit"
    assert data.datasets == ["ann/pixels"] and data.eval_results[0].metric_type == "accuracy"
    assert "| frozen blocks | mode |" in text and "It is a whole model" in text
    monkeypatch.chdir(folder)
    names = {}
    exec(snippet_of(text), names)
    assert torch.equal(logits(names["model"]), logits(trainer.model))
    trainer.create_model_card(tags=["other"])
    assert "mine" in ModelCard.load(folder / "README.md").data.tags


def test_card_of_a_plain_training_is_that_of_trainer(base, tmp_path):
    args = make_args(tmp_path / "run", num_train_epochs=1)
    for folder, trainer_class, settings in (
        ("ours", FreezeCacheTrainer, {"freeze_cache": {"policy": "none"}}),
        ("theirs", Trainer, {}),
    ):
        args.output_dir = str(tmp_path / folder)
        trainer_class(
            model=load_base(base), args=args, train_dataset=pixel_dataset(16), **settings
        ).create_model_card()
    ours, theirs = ((tmp_path / name / "README.md").read_text() for name in ("ours", "theirs"))
    assert ours == theirs.replace("theirs", "ours")


def test_wrapped_classifier_gets_a_card_without_a_snippet_of_transformers(tmp_path):
    import timm

    trainer = FreezeCacheTrainer(
        model=wrap_classifier(timm.create_model("test_vit", num_classes=5)),
        args=make_args(tmp_path / "run"),
        train_dataset=pixel_dataset(16),
    )
    trainer.create_model_card()
    text = (tmp_path / "run/README.md").read_text()
    assert "`ImageClassifier`" in text and "from_pretrained" not in text


def test_no_path_of_the_machine_is_in_a_card(trainer, tmp_path):
    trainer.create_model_card()
    for card in (save_head(trainer, tmp_path / "head") / "README.md", Path(trainer.args.output_dir) / "README.md"):
        assert "/tmp" not in card.read_text() and str(tmp_path) not in card.read_text()


def test_template_is_in_the_wheel(tmp_path):
    """An installed package finds it."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copytree(ROOT / "hf_freezecache", source / "hf_freezecache", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "hf_freezecache/hub/card.md.jinja" in archive.namelist()
    assert (Path(hf_freezecache.__file__).parent / "hub/card.md.jinja").is_file()
