"""Trains a tiny model in one of several processes and writes what every process saw to a JSON file."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from support.helpers import losses, manual, pixel_dataset, run, tiny_resnet, tiny_vit  # noqa: E402
from support.images import FlipAndErase, picture_dataset, pictures_with_a_marked_one, replayable  # noqa: E402
from support.policies import Answers  # noqa: E402
from support.pretrained import settle  # noqa: E402
from support.sessions import chain_of  # noqa: E402
from support.sized_images import GroupingTrainer, SizedImages  # noqa: E402
from support.sounds import PadSounds, Sounds, wav2vec2  # noqa: E402
from support.token_rows import Pad, Texts, bert, bert_of_questions  # noqa: E402
from support.troubles import TROUBLES  # noqa: E402

from hf_freezecache import FreezeCacheTrainer, FreezePolicy  # noqa: E402
from hf_freezecache.cache.fingerprint import tensors_digest  # noqa: E402
from hf_freezecache.policies import AutoFreezePolicy, AutoPolicy, SimFreezePolicy  # noqa: E402
from hf_freezecache.training import freezing_trial, similarities, step_state  # noqa: E402
from hf_freezecache.training.proof import MismatchError  # noqa: E402
from hf_freezecache.training.rehearsal import RehearsalError  # noqa: E402


def augmented(kind: str):
    """50 pictures; rarely erased: the misfit is in the last process's range alone."""
    if kind == "crop":
        return picture_dataset(50).with_transform(replayable())
    return pictures_with_a_marked_one(49).with_transform(replayable(FlipAndErase()))


class PadsOtherwiseAtFirst(TrainerCallback):
    """Lets a collator pad on the left until the first step."""

    def __init__(self, collator: Pad):
        self.collator = collator
        collator.side = "left"

    def on_step_begin(self, args, state, control, **kwargs):
        self.collator.side = "right"


class NotesWeights(TrainerCallback):
    """Notes the weights of this process after every epoch: where blocks freeze, those of the first one are sent."""

    def __init__(self):
        self.digests = []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.digests.append(tensors_digest(dict(model.named_parameters())))


def mirror_in_step(step: int) -> None:
    """In this step the last process alone calls the model on other images than those of the batch."""
    plain = FreezeCacheTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step == step and self.accelerator.process_index and model.training:
            inputs = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
        return plain(self, model, inputs, *args, **kwargs)

    FreezeCacheTrainer.compute_loss = compute_loss


def communicate(when: str, ranks: str, step: int) -> None:
    """The loss communicates; before or after it, some processes read the images in one step, or in evaluations."""
    plain = FreezeCacheTrainer.compute_loss
    place, _, order = when.partition(", ")

    def compute_loss(self, model, inputs, *args, **kwargs):
        session, step_now = self._session, self.state.global_step
        rehearses = session is not None and session.proof.rehearsal.is_running
        now = {
            "rehearsal": rehearses,
            "step": model.training and step_now == step and not rehearses,
            "evaluation": not model.training and step_now > step,
        }
        reads = now[place] and str(self.accelerator.process_index) in ranks
        if reads and order == "before":
            float(inputs["pixel_values"].mean())
        processes = torch.ones(1)
        torch.distributed.all_reduce(processes)
        if reads and order == "after":
            float(inputs["pixel_values"].mean())
        found = plain(self, model, inputs, *args, **kwargs)
        scale = processes.item() / 2  # 1, unless it was taken for another operation
        return (found[0] * scale, *found[1:]) if isinstance(found, tuple) else found * scale

    FreezeCacheTrainer.compute_loss = compute_loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    models = ["vit", "resnet", "resnet of sizes", "bert", "bert of questions", "wav2vec2"]
    parser.add_argument("--model", choices=models, default="vit")
    parser.add_argument("--cache", default="always")
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--find_unused", choices=["true", "false"], default=None)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--points", default="1:2,3:4")
    parser.add_argument("--materialize", default="upfront")
    parser.add_argument("--augmented", choices=["crop", "rarely erased"])
    parser.add_argument("--cache_eval", action="store_true")
    parser.add_argument("--on_mismatch", default="fallback")
    parser.add_argument("--head_start_epochs", type=int, default=0, help="the model is a pretrained one then")
    parser.add_argument("--anneal", default="none")
    parser.add_argument("--layer_decay", type=float, default=1.0)
    parser.add_argument("--tries_freezing", action="store_true", help="policy auto, with a longer trial")
    parser.add_argument("--main_decides", action="store_true", help="a rule that freezes in the main process alone")
    parser.add_argument("--observes", choices=["gradients", "similarities"], help="a rule that looks at these")
    parser.add_argument("--trouble", choices=list(TROUBLES))
    parser.add_argument("--trouble_rank", default="0", help="the processes that have it")
    parser.add_argument("--trouble_step", type=int, default=0)
    parser.add_argument("--left_at_first", help="the process that pads texts on the left until the first step")
    parser.add_argument("--mirror_in_step", type=int)
    parser.add_argument("--communicates", help="when images are read: 'step, before', 'evaluation, after' ...")
    parser.add_argument("--ends_itself", action="store_true", help="the interpreter ends as in a user's script")
    options = parser.parse_args()
    step_state._PATIENCE_SECONDS = 3.0
    if options.communicates is not None:
        communicate(options.communicates, options.trouble_rank, options.trouble_step)
    if options.mirror_in_step is not None:
        mirror_in_step(options.mirror_in_step)
    try:
        train(options)
    except (MismatchError, RehearsalError) as error:
        path = options.output / f"rank-{os.environ['RANK']}.json"
        path.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    if options.ends_itself:
        return
    os._exit(0)  # threads of libraries still abort the interpreter's own end now and then


def train(options: argparse.Namespace) -> None:
    has_trouble = options.trouble is not None and os.environ["RANK"] == options.trouble_rank
    callbacks = [TROUBLES[options.trouble](options.trouble_step)] if has_trouble else []
    model, size = (tiny_resnet(), 32) if options.model == "resnet" else (tiny_vit(), 16)
    dataset = pixel_dataset(50, size) if options.augmented is None else augmented(options.augmented)
    texts = {}
    if options.model == "bert":
        model, dataset, collator = bert(), Texts(70), Pad(width=None if options.left_at_first is None else 13)
        texts = {"data_collator": collator}
        if options.left_at_first == os.environ["RANK"]:
            callbacks.append(PadsOtherwiseAtFirst(collator))
    if options.model == "bert of questions":
        model, dataset, texts = bert_of_questions(), Texts(70, label="span"), {"data_collator": Pad()}
    if options.model == "wav2vec2":
        model, dataset, texts = wav2vec2(), Sounds(70), {"data_collator": PadSounds()}
    if options.model == "resnet of sizes":
        model, dataset, texts = tiny_resnet(), SizedImages(70), {"trainer_class": GroupingTrainer}
    if options.head_start_epochs or options.tries_freezing:
        model = settle(model)
    notes = NotesWeights()
    policy: FreezePolicy | None = None
    if options.main_decides:
        policy = Answers(*([0, 2, 2, 2] if os.environ["RANK"] == "0" else [0] * 4))
    if options.observes is not None:
        similarities._SHARE = 9.0
        policy = AutoFreezePolicy(4) if options.observes == "gradients" else SimFreezePolicy(0.3, window=2)
    if options.tries_freezing:
        policy, freezing_trial._SHARE, freezing_trial._SHARE_HELD_OUT = AutoPolicy(), 0.4, 0.2
    trainer = run(
        model,
        dataset,
        options.output / "run",
        manual(
            options.points,
            cache=options.cache,
            codec=options.codec,
            cache_eval=options.cache_eval,
            materialize=options.materialize,
            on_mismatch=options.on_mismatch,
            head_start_epochs=options.head_start_epochs,
            anneal=options.anneal,
            anneal_epochs=int(options.main_decides),
            layer_decay=options.layer_decay,
            feature_cache_dir=str(options.output / "cache"),
        ),
        policy=policy,
        callbacks=[*callbacks, notes],
        eval_dataset=pixel_dataset(30, size, seed=5) if options.cache_eval else None,
        eval_strategy="epoch" if options.cache_eval else "no",
        per_device_train_batch_size=4,
        ddp_timeout=60,
        gradient_accumulation_steps=options.accumulate,
        remove_unused_columns=options.augmented is None and not texts,
        ddp_find_unused_parameters=None if options.find_unused is None else options.find_unused == "true",
        **texts,
    )
    status = trainer.freeze_status()
    # Live BatchNorm statistics differ between processes until the next forward pass, under plain `Trainer` too.
    frozen = chain_of(trainer).prefix_buffers(status.cut)
    seen = {
        "losses": losses(trainer),
        "evaluations": [entry for entry in trainer.state.log_history if any("eval" in name for name in entry)],
        "cut": status.cut,
        "replaying": status.replaying,
        "store": None if status.store_path is None else status.store_path.name,
        "padding": [
            sorted(chain_of(trainer).padding.ignored(status.cut)),
            chain_of(trainer).padding.why_kept(status.cut),
        ],
        "weights": tensors_digest({**dict(trainer.model.named_parameters()), **frozen}),
        "weights_by_epoch": notes.digests,
        "why": getattr(policy, "why", None),
        "modes": [phase.mode for phase in trainer.freeze_cache_report().phases],
        "processes": trainer.accelerator.num_processes,
    }
    path = options.output / f"rank-{trainer.accelerator.process_index}.json"
    path.write_text(json.dumps(seen), encoding="utf-8")
    trainer.accelerator.end_training()  # a process group that is not taken down may abort at exit


if __name__ == "__main__":
    main()
