"""Seconds of the proofs of a training (rehearsal, sentinel rows, watch) beside its own: DeiT-Tiny on Caltech-101.

python -m benchmarks.proofs.run
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from transformers import TrainingArguments, set_seed

from hf_freezecache import FreezeCacheConfig, FreezeCacheTrainer
from hf_freezecache.training import session
from hf_freezecache.training.proof import Proof
from hf_freezecache.training.session import FreezeSession

from .._common import QUIET, Claim, in_turn, make_parser, pick, prepare, silence, summary, write_result
from .._images import as_interpolated_batch, load_caltech, load_deit
from .._trainings import EpochClock
from ..replay_step.run import StepClock

#: What is timed: before the training, at every epoch's beginning, at every step.
PROOFS = {
    "rehearsal before the training": (FreezeSession, "rehearse"),
    "rehearsal and watch at epochs": (Proof, "of_prefix"),
    "sentinel rows at replay epochs": (Proof, "of_rows"),
    "watch at steps": (Proof, "at_step"),
    "state to run a step again": (session.StepState, "__init__"),
}


@contextlib.contextmanager
def timing(seconds: dict[str, list[float]]) -> Iterator[None]:
    """Inside, every call of a proof adds its seconds."""

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds.setdefault(name, []).append(time.perf_counter() - begin)

        return call

    with contextlib.ExitStack() as stack:
        for name, (owner, method) in PROOFS.items():
            stack.enter_context(mock.patch.object(owner, method, timed(name, getattr(owner, method))))
        yield


@contextlib.contextmanager
def without_step_proofs() -> Iterator[None]:
    """Inside, steps are not watched, and cannot be run again."""
    with (
        mock.patch.object(Proof, "at_step", lambda self: None),
        mock.patch.object(session, "StepState", lambda model: None),
    ):
        yield


def train(options: argparse.Namespace, images: Any, model: Any, folder: str, callbacks: Sequence[Any], **settings):
    """Trains as `finetune_caltech` does."""
    set_seed(options.seed)
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        **QUIET,
        seed=options.seed,
        **{"num_train_epochs": options.epochs, "max_steps": -1, **settings},
    )
    epoch = 0 if "max_steps" in settings else options.freeze_epoch
    config = FreezeCacheConfig(
        policy="manual", freeze_points=f"{epoch}:{options.cut}", cache="always", codec=options.codec
    )
    trainer = FreezeCacheTrainer(
        model=copy.deepcopy(model),
        args=args,
        train_dataset=images,
        data_collator=as_interpolated_batch,
        callbacks=list(callbacks),
        freeze_cache=config,
    )
    silence(trainer).train()
    return trainer


def measure_training(options: argparse.Namespace, images: Any, model: Any) -> dict[str, Any]:
    """A whole training: seconds of each proof, of each epoch, and of everything."""
    seconds: dict[str, list[float]] = {}
    clock = EpochClock(options.epochs + 1, set())
    with tempfile.TemporaryDirectory() as folder, timing(seconds):
        begin = time.perf_counter()
        # Evaluations are left out: they make the share of the proofs smaller.
        clock.on_epoch_end = count_epoch(clock)  # type: ignore[method-assign]
        trainer = train(options, images, model, folder, [clock])
        total = time.perf_counter() - begin
        report = trainer.freeze_cache_report()
    proofs = {name: sum(seconds.get(name, [0.0])) for name in PROOFS}
    replay = [phase for phase in report.phases if phase.mode == "replay"]
    epoch = sum(phase.seconds for phase in replay) / sum(phase.epochs for phase in replay)
    sentinels = seconds["sentinel rows at replay epochs"]
    return {
        "proof_seconds": proofs,
        "epoch_seconds": clock.epoch_seconds,
        "total_seconds": total,
        "build_seconds": report.totals.build_seconds,
        "replay_epoch_seconds": epoch,
        "sentinel_seconds": sentinels,
        "share_of_the_training": sum(proofs.values()) / total,
        "sentinels_share_of_a_replay_epoch": sum(sentinels) / len(sentinels) / epoch,
    }


def count_epoch(clock: EpochClock) -> Callable[..., None]:
    """Notes an epoch's seconds, and asks for nothing."""

    def on_epoch_end(*args: Any, **kwargs: Any) -> None:
        clock.epoch_seconds.append(time.perf_counter() - clock._since)

    return on_epoch_end


def measure_steps(options: argparse.Namespace, images: Any, model: Any) -> dict[str, Any]:
    """Replay steps with the proofs of a step and without them, blocks in turn."""
    sides = {"with": contextlib.nullcontext, "without": without_step_proofs}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, options.rounds):  # the first round builds the store and warms up
            for name in in_turn(sides, number):
                clock = StepClock()
                with sides[name]():
                    train(options, images, model, folder, [clock], max_steps=options.steps)
                if number >= 0:
                    seconds[name] += clock.seconds
    result = {name: summary(values) for name, values in seconds.items()}
    return {**result, "ratio": result["with"]["median"] / result["without"]["median"]}


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--freeze_epoch", type=int, default=1)
    parser.add_argument("--cut", type=int, default=10)
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--rows", type=int, help="number of training images (default: all)")
    parser.add_argument("--steps", type=int, default=24, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=5, help="timed blocks of each side")
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.freeze_epoch, options.rows, options.steps, options.rounds = 3, 1, 128, 4, 1
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    images = load_caltech(options, "train", options.image_size, options.rows)
    model = load_deit(options)
    training = measure_training(options, images, model)
    steps = measure_steps(options, images, model)
    claims = [
        Claim("proofs relative to the whole training", training["share_of_the_training"], at_most=0.01),
        Claim("sentinel rows relative to a replay epoch", training["sentinels_share_of_a_replay_epoch"], at_most=0.01),
        Claim("replay step relative to one without the proofs of a step", steps["ratio"], at_most=1.01),
    ]
    settings = pick(options, "epochs freeze_epoch cut codec batch_size image_size rows steps rounds")
    write_result("proofs", options, settings, {"training": training, "steps": steps}, claims)


if __name__ == "__main__":
    main()
