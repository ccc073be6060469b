"""Trains a tiny model in processes on several "machines", each with a folder of its own for stores."""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from support.helpers import losses, make_args, manual, pixel_dataset, tiny_vit  # noqa: E402
from support.images import picture_dataset, replayable  # noqa: E402
from support.pretrained import settle  # noqa: E402

from hf_freezecache import FreezeCacheTrainer  # noqa: E402
from hf_freezecache.build import materialize  # noqa: E402
from hf_freezecache.cache.fingerprint import tensors_digest  # noqa: E402
from hf_freezecache.cache.store import FeatureStore  # noqa: E402
from hf_freezecache.replay.collator import take_codes  # noqa: E402
from hf_freezecache.training import head_start, scope  # noqa: E402
from hf_freezecache.training.head_batches import HeadBatches  # noqa: E402

SETTINGS = ("points", "codec", "cache", "cache_scope", "cache_budget")


class NotesRows(FreezeCacheTrainer):
    """Notes which rows this process replays, with their labels."""

    def __init__(self, *args, loses_in_step: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows, self.batches, self._loses_in_step = {}, {}, loses_in_step

    def training_step(self, model, inputs, *args, **kwargs):
        if self._session.proof.rehearsal.is_running or self._session.head_start.is_running:
            return super().training_step(model, inputs, *args, **kwargs)
        epoch, replayed = int(self.state.epoch), take_codes(inputs)
        self.batches[epoch] = self.batches.get(epoch, 0) + 1
        if replayed is not None:
            numbers, labels = replayed.rows.numbers.tolist(), replayed.inputs["labels"].tolist()
            self.rows.setdefault(epoch, []).extend(zip(numbers, labels, strict=True))
        if self.state.global_step == self._loses_in_step:
            _cut_short(self.freeze_status().store_path)
        return super().training_step(model, inputs, *args, **kwargs)


class NotesLearned(HeadBatches):
    """Notes the rows whose stored features a head start takes."""

    learned, loses_store = list[int](), False

    def make(self, batches, store, done=()):
        if store is not None and self.loses_store:
            _cut_short(store.path)
        made = super().make(batches, store, done)
        if store is not None:
            self.learned.extend(row for batch in batches for row in batch)
        return made


def _cut_short(store: Path) -> None:
    for file in store.glob("*.arrow"):
        os.truncate(file, 100)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--points", default="1:2,3:4")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--cache", default="always")
    parser.add_argument("--cache_scope", default="node")
    parser.add_argument("--cache_budget")
    parser.add_argument("--augmented", action="store_true")
    parser.add_argument("--by_default", action="store_true", help="no settings are given")
    parser.add_argument("--head_start_epochs", type=int, default=0)
    parser.add_argument("--save_steps", type=int)
    parser.add_argument("--resume", help="name of a checkpoint")
    parser.add_argument("--lost", help="the node whose folder is emptied before")
    parser.add_argument("--unwritable", help="the node whose folder is a file")
    parser.add_argument("--loses_in_step", type=int, help="the second node's store is cut short there")
    parser.add_argument("--loses_before_head_start", action="store_true", help="the same, as the head start begins")
    parser.add_argument("--sampling", default="random")
    parser.add_argument("--dispatch", action="store_true")
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--fails_in_build", help="the node whose disk fails then")
    parser.add_argument("--one_folder", action="store_true", help="of all nodes, as if they shared a disk")
    parser.add_argument("--folder_of_each", action="store_true", help="as if processes of a node shared none")
    parser.add_argument("--run", default="run", help="folder of the checkpoints")
    return parser.parse_args()


def fail(*args, **kwargs):
    raise OSError("the disk is full")


def main() -> None:
    options = parse()
    scope._PATIENCE = 0.3
    node = os.environ.get("FREEZECACHE_NODE") or os.environ["GROUP_RANK"]
    folder = options.output / f"cache-{node}"
    if options.lost == node and os.environ["LOCAL_RANK"] == "0":
        shutil.rmtree(folder)
    if options.unwritable == node and os.environ["LOCAL_RANK"] == "0":
        folder.write_text("no folder")
    if options.one_folder:
        folder = options.output / "cache"
    if options.folder_of_each:
        folder = options.output / f"cache-of-{os.environ['RANK']}"
    if options.fails_in_build == node:
        materialize.ShardWriter.write = fail
    head_start.HeadBatches = NotesLearned
    NotesLearned.loses_store = options.loses_before_head_start and os.environ["GROUP_RANK"] == "1"
    seen = {}
    try:
        seen = train(options, folder)
    except (ValueError, OSError) as error:
        seen = {"error": f"{type(error).__name__}: {error}"}
    (options.output / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of libraries still abort the interpreter's own end now and then


def train(options: argparse.Namespace, folder: Path) -> dict:
    dataset = pixel_dataset(options.rows)
    model = tiny_vit()
    if options.by_default or options.head_start_epochs:
        model = settle(model)
    if options.augmented:
        dataset = picture_dataset(options.rows).with_transform(replayable())
    config = None
    if not options.by_default:
        config = manual(
            options.points,
            codec=options.codec,
            cache=options.cache,
            cache_scope=options.cache_scope,
            cache_budget=options.cache_budget,
            head_start_epochs=options.head_start_epochs,
            feature_cache_dir=str(folder),
        )
    output = options.output / options.run
    if options.by_default:
        output = output / os.environ["RANK"]  # with the folder of the stores in it
    accelerator: dict = {"dispatch_batches": True} if options.dispatch else {}
    if options.split:
        accelerator["split_batches"] = True
    args = make_args(
        output,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=16 if options.split else 4,
        ddp_timeout=90,
        dataloader_num_workers=options.workers,
        dataloader_multiprocessing_context="fork" if options.workers else None,  # others import all that this one has
        remove_unused_columns=not options.augmented,
        train_sampling_strategy=options.sampling,
        length_column_name="labels",
        save_strategy="no" if options.save_steps is None else "steps",
        save_steps=options.save_steps or 500,
        accelerator_config=accelerator or None,
    )
    is_second = os.environ["GROUP_RANK"] == "1"
    trainer = NotesRows(
        model=model,
        args=args,
        train_dataset=dataset,
        freeze_cache=config,
        loses_in_step=options.loses_in_step if is_second else None,
    )
    resume = None if options.resume is None else str(output / options.resume)
    trainer.train(resume_from_checkpoint=resume)
    return what_was_seen(
        trainer, dataset.with_format("torch")["labels"][:].tolist() if not options.augmented else None
    )


def what_was_seen(trainer: NotesRows, labels: list[int] | None) -> dict:
    status = trainer.freeze_status()
    session = trainer._session
    store = session.store
    return {
        "losses": losses(trainer),
        "weights": tensors_digest(dict(trainer.model.named_parameters())),
        "rows": trainer.rows,
        "batches": trainer.batches,
        "labels": labels,
        "learned": NotesLearned.learned,
        "cut": status.cut,
        "replaying": status.replaying,
        "modes": [phase.mode for phase in trainer.freeze_cache_report().phases],
        "share": None if store is None or store.share is None else store.share.rows().tolist(),
        "rows_stored": None if store is None else FeatureStore.open(store.path).manifest.rows,
        "owner": session.keeper.provider.holdings.owner,
    }


if __name__ == "__main__":
    main()
