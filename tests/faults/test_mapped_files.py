"""No file of a store is mapped into memory by a training: one that is cut short would end the process by SIGBUS."""

import mmap
from functools import partial
from pathlib import Path

import psutil
import pytest
from support.helpers import make_args, manual, pixel_dataset, through, tiny_vit
from transformers import TrainerCallback

from hf_freezecache import FreezeCacheTrainer


def mapped(folder):
    """Files below a folder that this process or one that it has started has mapped."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    maps = [Path(f"/proc/{process.pid}/maps") for process in processes]
    lines = [line for file in maps if file.exists() for line in file.read_text().splitlines()]
    return {line.split(maxsplit=5)[5] for line in lines if f"{folder}/" in line}


class Looks(TrainerCallback):
    """Looks at the mapped files at every step and evaluation."""

    def __init__(self, folder):
        self.folder, self.found, self.looks = folder, set(), 0

    def look(self, *args, **kwargs):
        self.found |= mapped(self.folder)
        self.looks += 1

    on_step_begin = on_step_end = on_prediction_step = on_epoch_end = look


def test_a_mapped_file_is_seen(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    with open(tmp_path / "file", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert mapped(tmp_path) == {str(tmp_path / "file")}


@pytest.mark.parametrize(
    ("config", "workers"),
    [
        (partial(manual, "1:2,2:3", deepen="cache"), 1),
        (partial(through, "1:2"), 0),
    ],
)
def test_no_file_of_a_store_is_mapped_in_a_training(config, workers, tmp_path):
    stores = tmp_path / "stores"
    looks = Looks(stores)
    FreezeCacheTrainer(
        model=tiny_vit(),
        args=make_args(tmp_path, num_train_epochs=3, eval_strategy="epoch", dataloader_num_workers=workers),
        train_dataset=pixel_dataset(),
        eval_dataset=pixel_dataset(8, seed=1),
        freeze_cache=config(cache_eval=True, feature_cache_dir=str(stores)),
        callbacks=[looks],
    ).train()
    assert looks.found == set() and looks.looks > 20 and any(stores.iterdir())
