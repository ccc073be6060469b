"""The recipes run as a user runs them, on tiny models and generated images."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from support.processes import run_code, run_script
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from hf_freezecache import FreezeCacheConfig

RECIPES = Path(__file__).parents[1] / "recipes"
TRAINING = "--num_train_epochs 2 --per_device_train_batch_size 4 --use_cpu --save_strategy epoch --report_to none"
FREEZING = "--policy manual --freeze_points 1:2 --cache always --codec fp32"


@pytest.fixture
def recipes_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))


@pytest.fixture
def tiny_vit(tmp_path):
    """A folder with a ViT of two layers for 16x16 images, and its processor."""
    set_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=5,
    )
    folder = tmp_path / "model"
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def make_images(count):
    """Photos of differing sizes; every third one is grayscale."""
    generator = np.random.default_rng(0)
    for index in range(count):
        shape = (20, 24 + index % 3) if index % 3 == 0 else (20, 24 + index % 3, 3)
        yield PILImage.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def parquet(tmp_path):
    features = Features({"picture": Image(), "label": ClassLabel(names=["cat", "dog", "owl"])})
    rows = {"picture": list(make_images(12)), "label": [index % 3 for index in range(12)]}
    path = tmp_path / "images.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


@pytest.fixture
def image_folder(tmp_path):
    folder = tmp_path / "images"
    for index, image in enumerate(make_images(12)):
        path = folder / ["cat", "dog"][index % 2] / f"{index}.{'jpg' if index % 4 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def modes(report):
    return {phase["mode"] for phase in report["freeze_cache"]["phases"]}


def test_image_classification_on_parquet_writes_report_and_model(recipes_on_path, tiny_vit, parquet, tmp_path):
    import image_classification

    output = tmp_path / "run"
    arguments = f"--model_name_or_path {tiny_vit} --train_files {parquet} --output_dir {output} --eval_strategy epoch"
    image_classification.main(f"{arguments} {TRAINING} {FREEZING}".split())

    report = json.loads((output / "report.json").read_text())
    assert {"live", "build", "replay"} <= modes(report)
    assert report["train_images"] + report["validation_images"] == 12
    assert 0 <= report["metrics"]["eval_accuracy"] <= 1
    assert report["train_seconds"] > 0
    assert ViTForImageClassification.from_pretrained(output).config.id2label == {0: "cat", 1: "dog", 2: "owl"}


def test_image_classification_resumed_from_last_continues(recipes_on_path, tiny_vit, parquet, tmp_path):
    import image_classification

    output = tmp_path / "run"
    arguments = f"--model_name_or_path {tiny_vit} --train_files {parquet} --output_dir {output}"
    arguments = f"{arguments} {TRAINING} {FREEZING} --resume_from_checkpoint last".split()
    image_classification.main(arguments)
    report = image_classification.main([*arguments, "--num_train_epochs", "3"])
    assert "replay" in modes(report)
    state = json.loads(next(output.glob("checkpoint-9/trainer_state.json")).read_text())
    assert state["epoch"] == 3


def test_image_classification_at_another_size_interpolates_positions(recipes_on_path, tiny_vit, parquet, tmp_path):
    import image_classification

    arguments = f"--model_name_or_path {tiny_vit} --train_files {parquet} --validation_files {parquet}"
    arguments += f" --image_size 32 --limit 8 --output_dir {tmp_path / 'run'}"
    report = image_classification.main(f"{arguments} {TRAINING} {FREEZING}".split())
    assert (report["train_images"], report["validation_images"]) == (8, 8)
    assert "replay" in modes(report)


def test_image_classification_with_plan_prints_it_and_trains_nothing(
    recipes_on_path, tiny_vit, parquet, tmp_path, capsys
):
    import image_classification

    output = tmp_path / "run"
    arguments = f"--model_name_or_path {tiny_vit} --train_files {parquet} --output_dir {output} --plan"
    found = image_classification.main(f"{arguments} {TRAINING} {FREEZING}".split())
    assert [row["cut"] for row in found["rows"]] == [1, 2, 3]
    assert "Plain training, nothing frozen" in capsys.readouterr().out
    assert not output.exists()


def test_image_classification_without_data_names_the_options(recipes_on_path, tiny_vit, tmp_path):
    import image_classification

    with pytest.raises(ValueError, match="--train_files"):
        image_classification.main(["--model_name_or_path", str(tiny_vit), "--output_dir", str(tmp_path)])


def test_vit_imagenet_on_local_folders_writes_report(recipes_on_path, tiny_vit, image_folder, tmp_path):
    import vit_imagenet

    output = tmp_path / "run"
    arguments = f"--model_name_or_path {tiny_vit} --train_dir {image_folder} --validation_dir {image_folder}"
    arguments += f" --limit 10 --output_dir {output} --dataloader_num_workers 0"
    vit_imagenet.main(f"{arguments} {TRAINING} {FREEZING}".split())
    report = json.loads((output / "report.json").read_text())
    assert report["train_images"] == 10
    assert "replay" in modes(report)


@pytest.mark.parametrize(
    ("recipe", "package"),
    [pytest.param("image_classification", "evaluate", marks=pytest.mark.slow), ("quickstart", "sklearn")],
)
def test_recipe_without_a_package_names_it_and_the_command_that_installs_it(recipe, package, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(RECIPES)!r}); sys.modules[{package!r}] = None; import {recipe}"
    finished = run_code(code, tmp_path)
    assert finished.returncode == 1
    assert finished.stderr.endswith(f'The recipes need the package {package}: pip install -e ".[recipes]"\n')


@pytest.mark.parametrize("arm", ["plain", "short", "cached", "none"])
def test_quickstart_arm_measures_accuracy_time_and_flops(recipes_on_path, arm, tmp_path, monkeypatch):
    import quickstart

    monkeypatch.setattr(quickstart, "make_model", lambda: ViTForImageClassification(TINY))
    monkeypatch.setattr(quickstart, "FreezeCacheConfig", partial(FreezeCacheConfig, cache="always"))
    options = f"--arm {arm} --limit 64 --epochs 2 --output_dir {tmp_path} --freeze_points 1:2"
    (result,) = quickstart.main(options.split())
    assert result == json.loads((tmp_path / f"{arm}.json").read_text())
    assert 0 <= result["accuracy"] <= 1
    assert min(result["train_seconds"], result["train_flops"], result["peak_memory_bytes"]) > 0
    assert ("replay" in {phase["mode"] for phase in result["phases"]}) == (arm == "cached")


TINY = ViTConfig(
    image_size=32,
    patch_size=8,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    num_labels=10,
)


@pytest.mark.slow
def test_quickstart_compares_its_arms_in_processes_of_their_own(tmp_path):
    command = [sys.executable, str(RECIPES / "quickstart.py"), "--limit", "64", "--epochs", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["arm"] for result in results] == ["plain", "short", "cached"]
    assert [result["epochs"] for result in results] == [4, 2, 4]
    assert (tmp_path / "comparison.png").stat().st_size > 0
    assert "FreezeCacheTrainer" in finished.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--nonsense", "1"], "--nonsense", marks=pytest.mark.slow),
        pytest.param(["--codec", "int5"], "int5", marks=pytest.mark.slow),
        (["--train_files", "missing.parquet"], "missing.parquet does not exist"),
    ],
)
def test_mistake_of_a_user_is_answered_in_one_line(options, words, tiny_vit, tmp_path):
    arguments = ["--model_name_or_path", tiny_vit, "--output_dir", tmp_path / "run", *options]
    finished = run_script(RECIPES / "image_classification.py", arguments, tmp_path)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("image_classification.py: ") and words in last
