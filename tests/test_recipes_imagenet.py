"""The recipes for ImageNet-1k run as a user runs them: on tiny models, tar shards and folders, in two processes."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image as PILImage
from support.launching import launch
from support.processes import ROOT
from transformers import (
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

RECIPES = Path(__file__).parents[1] / "recipes"
CLASSES = 4
SHORT = "--num_train_epochs 3 --per_device_train_batch_size 4 --use_cpu true --bf16 false --dataloader_num_workers 0 "
SHORT += "--report_to none --cache always --codec fp32 --freeze_start 0.3 --head_start_epochs 0"


@pytest.fixture
def shards(tmp_path):
    """Two tar archives of eight images, as WebDataset has them."""
    generator = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as archive:
            for index in range(8):
                image = io.BytesIO()
                pixels = generator.integers(0, 256, (36, 40, 3), dtype=np.uint8)
                PILImage.fromarray(pixels).save(image, format="JPEG")
                label = str((8 * shard + index) % CLASSES).encode()
                for name, content in (("jpg", image.getvalue()), ("cls", label)):
                    entry = tarfile.TarInfo(f"{shard}{index:03}.{name}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return tmp_path / "train-*.tar"


@pytest.fixture
def tiny_resnet(tmp_path):
    """A folder with the config of a small ResNet, its processor and no weights."""
    folder = tmp_path / "resnet"
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.architectures = [ResNetForImageClassification.__name__]
    config.save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_vit(tmp_path):
    """A folder with a ViT of two layers for 16x16 images, and its processor."""
    set_seed(0)
    config = ViTConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    folder = tmp_path / "vit"
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def launch_by_command(config, recipe, arguments):
    """Runs a recipe by `accelerate launch` with one of the configurations, in two processes without accelerators."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(RECIPES / "accelerate" / config), "--num_processes", "2", "--num_cpu_threads_per_process", "1"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", str(RECIPES / recipe), *arguments.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-20000:]


def phases(output):
    return [phase["mode"] for phase in json.loads((output / "report.json").read_text())["freeze_cache"]["phases"]]


def test_resnet_from_scratch_on_tar_shards_in_two_processes(shards, tiny_resnet, tmp_path):
    output = tmp_path / "run"
    files = f"--train_files {shards} --validation_files {shards}"
    arguments = f"--model_name_or_path {tiny_resnet} {files} {SHORT} --output_dir {output}"
    launch(arguments.split(), script=RECIPES / "resnet_imagenet.py", output=tmp_path)
    assert "replay" in phases(output)
    report = json.loads((output / "report.json").read_text())
    assert report["train_images"] == 16
    assert json.loads((output / "config.json").read_text())["id2label"] == {str(i): str(i) for i in range(CLASSES)}


@pytest.mark.slow
def test_vit_on_tar_shards_with_more_augmentation_in_two_processes(shards, tiny_vit, tmp_path):
    output = tmp_path / "run"
    files = f"--train_files {shards} --validation_files {shards}"
    more = "--mixup_alpha 0.8 --cutmix_alpha 1.0 --random_erasing 0.25"
    launch_by_command(
        "eight_gpus.yaml",
        "vit_imagenet.py",
        f"--model_name_or_path {tiny_vit} {files} {SHORT} {more} --output_dir {output}",
    )
    assert "replay" in phases(output)


def as_folder(shards, target):
    """The images of the archives in a folder for each class; the options that name it."""
    for shard in sorted(shards.parent.glob("train-*.tar")):
        with tarfile.open(shard) as archive:
            for image in (name for name in archive.getnames() if name.endswith(".jpg")):
                stem = image.removesuffix(".jpg")
                label = archive.extractfile(f"{stem}.cls").read().decode()
                (target / label).mkdir(parents=True, exist_ok=True)
                (target / label / f"{stem}.jpg").write_bytes(archive.extractfile(image).read())
    return f"--train_dir {target} --validation_dir {target}"


def as_parquet(shards, target):
    """The same as two Parquet files."""
    as_folder(shards, target)
    rows = datasets.load_dataset("imagefolder", data_dir=str(target), split="train")
    for part in range(2):
        rows.shard(2, part).to_parquet(target.parent / f"part-{part}.parquet")
    return f"--train_files {target.parent}/part-*.parquet --validation_files {target.parent}/part-*.parquet"


@pytest.mark.slow
@pytest.mark.parametrize("store", [as_folder, as_parquet], ids=["folder", "parquet"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_folders_and_parquet_files_in_two_processes(kind, store, shards, tiny_resnet, tiny_vit, tmp_path):
    output, model = tmp_path / "run", {"vit": tiny_vit, "resnet": tiny_resnet}[kind]
    files = store(shards, tmp_path / "images")
    launch_by_command(
        "eight_gpus.yaml",
        f"{kind}_imagenet.py",
        f"--model_name_or_path {model} {files} {SHORT} --output_dir {output}",
    )
    assert "replay" in phases(output)
    assert json.loads((output / "report.json").read_text())["train_images"] == 16


@pytest.mark.parametrize(
    ("name", "machines", "processes", "kind"),
    [("one_gpu", 1, 1, "NO"), ("eight_gpus", 1, 8, "MULTI_GPU"), ("two_nodes", 2, 16, "MULTI_GPU")],
)
def test_configurations_are_those_that_accelerate_reads(name, machines, processes, kind):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes, config.distributed_type) == (machines, processes, kind)
    assert config.mixed_precision == "bf16" and not config.use_cpu


@pytest.mark.parametrize("recipe", ["vit_imagenet", "resnet_imagenet"])
def test_options_of_the_user_win_over_the_recipes_defaults(recipe, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    module, seen = __import__(recipe), []
    monkeypatch.setattr(module.image_classification, "main", seen.extend)
    module.main(["--learning_rate", "3e-3", "--train_dir=images"])
    assert seen[-3:] == ["--learning_rate", "3e-3", "--train_dir=images"]
    assert "--dataset_name" not in seen and seen.count("--learning_rate") == 2
    seen.clear()
    module.main([])
    assert seen[seen.index("--dataset_name") + 1] == "ILSVRC/imagenet-1k"
