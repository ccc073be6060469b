"""Every Python block of the README and of the pages in `docs/` runs, in order, on tiny models and random images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from sybil import Sybil
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser
from torchvision.transforms import v2
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TO_TENSOR = v2.Compose([v2.ToImage(), v2.Resize((224, 224)), v2.ToDtype(torch.float32, scale=True)])


def parse(page: Path) -> Document:
    return Sybil([PythonCodeBlockParser()], path=str(page.parent)).parse(page)


def make_model() -> ViTForImageClassification:
    """4 blocks (stem included) and few tokens, at the image size that the pages write."""
    config = ViTConfig(
        image_size=224,
        patch_size=56,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def make_images() -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 64, 72, 3), dtype=np.uint8)
    features = Features({"image": Image(), "labels": ClassLabel(names=["cat", "dog", "owl"])})
    return Dataset.from_dict({"image": list(pixels), "labels": [row % 3 for row in range(16)]}, features=features)


def to_pixels(rows: dict[str, list]) -> dict[str, list]:
    return {"pixel_values": [TO_TENSOR(image.convert("RGB")) for image in rows["image"]], "labels": rows["labels"]}


def namespace(output_dir: Path) -> dict[str, Any]:
    """The names that `docs/index.md` promises."""
    args = TrainingArguments(
        str(output_dir),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    images = make_images()
    pixels = images.with_transform(to_pixels)
    return {
        "model": make_model(),
        "make_model": make_model,
        "args": args,
        "images": images,
        "train_set": pixels,
        "eval_set": pixels,
    }


def run(page: Path, names: dict[str, Any]) -> int:
    """Runs the blocks of a page in one namespace and returns their number; a traceback names the page's line."""
    document = parse(page)
    document.namespace.update(names)
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    return len(examples)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_seed(0)


def test_readme_is_one_complete_script_that_trains_and_reports(capsys):
    assert run(ROOT / "README.md", {}) == 1
    printed = capsys.readouterr().out
    assert "replay" in printed and "plain training, estimated" in printed
    assert Path("outputs/digits").is_dir()


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem) for page in PAGES if "```python" in page.read_text()]
)
def test_code_blocks_of_page_run(page, tmp_path):
    assert run(page, namespace(tmp_path / "outputs")) == page.read_text().count("```python\n")


def test_a_block_that_fails_is_reported_with_its_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError) as failure:
        run(page, {})
    last = failure.traceback[-1]
    assert (Path(str(last.path)), last.lineno + 1) == (page, 4)
