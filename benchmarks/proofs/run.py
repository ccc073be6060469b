"""Seconds of the proofs of a training (rehearsal, sentinel rows, watch) beside its own: DeiT-Tiny on Caltech-101.

python -m benchmarks.proofs.run
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
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

from .._common import QUIET, Claim, make_parser, pick, prepare, silence, summary, write_result
from .._images import as_interpolated_batch, load_caltech, load_deit
from .._statistics import paired
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
PROOFS_OF_A_STEP = ("watch at steps", "state to run a step again")


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
        mock.patch.object(session.StepState, "__init__", lambda self, model, buffers: None),
        mock.patch.object(session.StepState, "recording", contextlib.nullcontext),
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


class PairClock(StepClock):
    """A clock of steps that leaves the proofs of every second step out, in the order: with, without, without, with.

    Neighbours meet the same disturbances, and each side is first as often as it is second.
    """

    def __init__(self):
        super().__init__()
        self._sides: list[bool] = []
        self._without = contextlib.ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self._without.close()
        with_proofs = state.global_step % 4 in (0, 3)
        self._sides.append(with_proofs)
        if not with_proofs:
            self._without.enter_context(without_step_proofs())

    def on_train_end(self, args, state, control, **kwargs):
        self._without.close()

    def pairs(self) -> list[tuple[float, float]]:
        """Seconds of neighbours: with the proofs and without, the first four steps left out."""
        steps = list(zip(self.seconds, self._sides[1:], strict=False))[3:]
        return [
            (first, second) if first_with else (second, first)
            for (first, first_with), (second, _) in zip(steps[::2], steps[1::2], strict=False)
        ]


def measure_steps(options: argparse.Namespace, images: Any, model: Any) -> dict[str, Any]:
    """Replay steps with the proofs of a step beside neighbours without them, and the proofs by clocks of their own."""
    with tempfile.TemporaryDirectory() as folder:
        clock, seconds = PairClock(), {}
        train(options, images, model, folder, [clock], max_steps=options.steps)
        with timing(seconds):
            train(options, images, model, folder, [own_clock := StepClock()], max_steps=options.steps // 4)
    pairs = clock.pairs()
    without = [second for _, second in pairs]
    relative = paired([(first - second) / statistics.median(without) for first, second in pairs])
    proofs = sum(statistics.median(seconds[name]) for name in PROOFS_OF_A_STEP)
    return {
        "with": summary([first for first, _ in pairs]),
        "without": summary(without),
        "median_of_paired_differences": statistics.median(first - second for first, second in pairs),
        "mean_of_paired_differences_relative_to_a_step": {name: relative[name] for name in ("mean", "interval_95")},
        "clocked_seconds": proofs,
        "clocked_share_of_a_step": proofs / statistics.median(own_clock.seconds),
    }


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--freeze_epoch", type=int, default=1)
    parser.add_argument("--cut", type=int, default=10)
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--rows", type=int, help="number of training images (default: all)")
    parser.add_argument("--steps", type=int, default=400, help="replay steps that are timed in pairs")
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.freeze_epoch, options.rows, options.steps = 3, 1, 128, 12
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
        Claim("proofs of a step relative to a replay step", steps["clocked_share_of_a_step"], at_most=0.01),
    ]
    settings = pick(options, "epochs freeze_epoch cut codec batch_size image_size rows steps")
    write_result("proofs", options, settings, {"training": training, "steps": steps}, claims)


if __name__ == "__main__":
    main()
