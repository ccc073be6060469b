# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From images to a pushed head
#
# Fine-tunes a Vision Transformer with `FreezeCacheTrainer`, looks at what that cost, saves the part that was trained,
# loads it again on its base, and pushes it to the Hub.
#
# As it stands it runs offline in a minute on a CPU: scikit-learn's handwritten digits, and a small ViT that was
# trained on CIFAR-10 and comes with this repository. Each cell that you change for real use says how. On Colab, run
# this first:
#
# ```python
# !git clone https://github.com/<owner>/hf_freezecache && pip install "./hf_freezecache[recipes]"
# %cd hf_freezecache/recipes
# ```

# %%
import os
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2
from transformers import TrainingArguments, ViTForImageClassification, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer, load_head, plan, push_head_to_hub, save_head

BASE = "tiny_vit_cifar10"  # for real use: "google/vit-base-patch16-224-in21k"
IMAGE_SIZE = 32  # for real use: 224
PUSH_TO = os.environ.get("PUSH_TO")  # for real use: "your-name/digits-head"; None pushes nothing
OUTPUT = Path(os.environ.get("OUTPUT", "../outputs/notebook"))
set_seed(0)

# %% [markdown]
# ## Images
#
# For real use: `load_dataset("imagefolder", data_dir=...)`, or any data set with images and labels.

# %%
digits = load_digits()
images = [PIL.Image.fromarray((image * 255 / 16).astype("uint8")) for image in digits.images]
features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
dataset = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
splits = dataset.train_test_split(0.2, seed=0, stratify_by_column="label")

to_pixels = v2.Compose(
    [v2.ToImage(), v2.Resize(IMAGE_SIZE), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
)


def transform(rows):
    return {"pixel_values": [to_pixels(image.convert("RGB")) for image in rows["image"]], "labels": rows["label"]}


train_set, test_set = (splits[name].with_transform(transform) for name in ("train", "test"))

# %% [markdown]
# ## What would freezing cost and save?
#
# `plan` measures a few batches at every cut: how large a store is, how long it takes to build, after how many epochs
# it has paid. Nothing is written.

# %%
labels = splits["train"].features["label"].names
model = ViTForImageClassification.from_pretrained(
    BASE,
    num_labels=len(labels),
    id2label=dict(enumerate(labels)),
    label2id={name: number for number, name in enumerate(labels)},
    dtype=torch.float32,
)
print(plan(model, train_set))

# %% [markdown]
# ## Training
#
# The one class name that differs from a script with `Trainer`. Here the first four of seven blocks are frozen from the
# start, so that what is trained is small; leave `freeze_cache` out for a schedule that freezes later.


# %%
def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


trainer = FreezeCacheTrainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(OUTPUT / "run"),
        num_train_epochs=4,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="epoch",
        remove_unused_columns=False,
        report_to="none",
        seed=0,
    ),
    train_dataset=train_set,
    eval_dataset=test_set,
    compute_metrics=accuracy,
    freeze_cache=FreezeCacheConfig(policy="manual", freeze_points="0:4", cache="always", report="html"),
)
trainer.train()

# %% [markdown]
# ## What did it cost?
#
# The report stands beside the run as JSON, as a picture and as a page (`freeze_cache_report.html`).

# %%
print(trainer.freeze_cache_report())
PIL.Image.open(OUTPUT / "run" / "freeze_cache_report.png")

# %% [markdown]
# ## The head
#
# What was trained is saved without the blocks that everybody has: the base's first four.

# %%
folder = save_head(trainer, OUTPUT / "head")
head_bytes = (folder / "head.safetensors").stat().st_size
whole_bytes = sum(value.numel() * value.element_size() for value in model.state_dict().values())
print(f"head {head_bytes / 1e6:.2f} MB, whole model {whole_bytes / 1e6:.2f} MB")

# %% [markdown]
# Elsewhere, the head is put on its base again: an ordinary Transformers model with the same answers.

# %%
loaded = load_head(folder, base=BASE)
pixels = torch.stack([row["pixel_values"] for row in test_set.select(range(8))])
with torch.no_grad():
    same = torch.equal(loaded(pixels).logits, trainer.model.eval().cpu()(pixels).logits)
print("the same logits, bit for bit:", same)

# %% [markdown]
# ## To the Hub
#
# `hf auth login` first. The feature store is never uploaded.

# %%
if PUSH_TO is not None:
    print(push_head_to_hub(folder, PUSH_TO, private=True).commit_url)
