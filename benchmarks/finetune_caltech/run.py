"""DeiT-Tiny on Caltech-101: plain, freeze-only and cached training from the same live epochs, and a linear probe.

python -m benchmarks.finetune_caltech.run
python -m benchmarks.finetune_caltech.run --resume          # continues a killed run
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from .._common import make_parser, pick, prepare, quiet, result_folder, write_json, write_result
from .._partials import run_tasks, settle_run_options
from ..gpu.workload import describe_card
from .arms import PLAIN, Arm, Data, checkpoint_folder, make_arms, train_arm
from .tables import by_arm, by_schedule, make_claims, plot, table

#: Settings that must not change when a run is continued.
SETTINGS = (
    "image_size rows test_rows epochs batch_size learning_rate probe_learning_rate warmup weight_decay evaluate_every "
    "schedules codec gpu processes threads"
)


def run_seed(seed: int, turn: int, options: argparse.Namespace) -> None:
    """Trains all arms of a seed one after the other; each is written down as soon as it is done.

    Args:
        seed: of head, order and dropout.
        turn: number of the seed in the list; rotates the order of the arms.
        options: the settings.
    """
    quiet()
    torch.set_num_threads(options.threads)
    folder, record = Path(options.output_dir) / f"seed-{seed}", partial_file(options, seed)
    measurements = json.loads(record.read_text()) if record.exists() else {}
    plain_arm, *others = make_arms(options)
    arms_left = [arm for arm in rotated(others, turn) if arm.name not in measurements]
    if PLAIN in measurements and not arms_left:
        return
    data = Data.load(options)
    if PLAIN not in measurements or not has_checkpoints(folder, arms_left, len(data.train), options):
        shutil.rmtree(folder, ignore_errors=True)
        measurements, arms_left = {}, rotated(others, turn)
        train_and_note(plain_arm, seed, data, folder, measurements, record, options)
    for arm in arms_left:
        train_and_note(arm, seed, data, folder, measurements, record, options)
    shutil.rmtree(folder, ignore_errors=True)


def train_and_note(
    arm: Arm,
    seed: int,
    data: Data,
    folder: Path,
    measurements: dict[str, Any],
    record: Path,
    options: argparse.Namespace,
) -> None:
    result = train_arm(arm, seed, data, folder, measurements.get(PLAIN), options)
    measurements[arm.name] = {**result, "position": len(measurements)}
    write_json(record, measurements)
    print(
        f"seed {seed}, {arm.name}: {100 * result['accuracy']:.2f} %, training {result['train_seconds']:.1f} s (own "
        f"{result['own_seconds']:.1f}, build {result['build_seconds']:.1f}), {result['flops'] / 1e12:.2f} TFLOP, "
        f"setup {result['setup_seconds']:.1f} s, evaluation {result['eval_seconds']:.1f} s",
        flush=True,
    )


def rotated(arms: list[Arm], turn: int) -> list[Arm]:
    """Every arm comes early in some seeds and late in others; in odd ones the order is reversed."""
    turned = [*arms[turn % len(arms) :], *arms[: turn % len(arms)]]
    return turned[:: 1 if turn % 2 == 0 else -1]


def has_checkpoints(folder: Path, arms: list[Arm], rows: int, options: argparse.Namespace) -> bool:
    steps = -(-rows // options.batch_size)
    return all(checkpoint_folder(folder, arm.branch * steps).is_dir() for arm in arms if arm.branch)


def partial_file(options: argparse.Namespace, seed: int) -> Path:
    return Path(options.output_dir) / f"seed-{seed}.json"


def begin(options: argparse.Namespace) -> None:
    """Clears what an earlier run left, or checks that it was made with the same settings.

    Raises:
        SystemExit: if `--resume` is given and the settings differ.
    """
    folder = Path(options.output_dir)
    settings = pick(options, SETTINGS)
    settings_file = folder / "settings.json"
    if options.resume and settings_file.exists():
        before = json.loads(settings_file.read_text())
        different = [name for name, value in settings.items() if before.get(name) != value]
        if different:
            raise SystemExit(f"--resume: the run in {folder.name} had another {', '.join(different)}; leave it out.")
        return
    shutil.rmtree(folder, ignore_errors=True)
    write_json(settings_file, settings)


def finish(options: argparse.Namespace) -> None:
    """Table, plot and JSON of all seeds that were asked for."""
    runs = {seed: json.loads(partial_file(options, seed).read_text()) for seed in options.seeds}
    # The order of the arms differs between seeds; tables have one order.
    names = [arm.name for arm in make_arms(options)]
    runs = {seed: {name: arms[name] for name in names} for seed, arms in runs.items()}
    arms, schedules = by_arm(runs), by_schedule(runs, options.schedules)
    place = "gpu/" if options.gpu else ""
    target = result_folder("finetune_caltech", options.smoke) / place
    target.mkdir(exist_ok=True)
    text = table(arms, schedules, len(runs))
    (target / "table.md").write_text(text)
    print(text)
    plot(runs, options.schedules, target / "accuracy_vs_time.png")
    settings = pick(options, f"{SETTINGS} seeds")
    results = {"arms": arms, "schedules": schedules, "runs": runs}
    if options.gpu:
        results["gpu"] = describe_card()
    write_result("finetune_caltech", options, settings, results, make_claims(arms, schedules), f"{place}result.json")


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="numbers separated by commas")
    parser.add_argument("--schedules", nargs="+", default=["2:10", "5:8"], help="epoch:cut, one freeze point each")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--probe_learning_rate", type=float, default=1e-3, help="learning rate of the linear probe")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--evaluate_every", type=int, default=3, help="epochs between evaluations")
    parser.add_argument("--rows", type=int, help="number of training images (default: all)")
    parser.add_argument("--test_rows", type=int, help="number of test images (default: all)")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU, in bf16; results go to gpu/")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes, each with its own seed; they share the cores"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue a killed run: its finished arms are not trained again"
    )
    parser.add_argument(
        "--output_dir", help="folder of checkpoints, stores and partial results (default: below outputs/)"
    )
    options = parser.parse_args(argv)
    if options.smoke:
        options.epochs, options.rows, options.test_rows = 4, 128, 101
        options.schedules, options.seeds = ["1:10", "2:8"], "0,1"
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    settle_run_options(options, "finetune_caltech", options.processes)
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    begin(options)
    run_tasks([(run_seed, seed, turn, options) for turn, seed in enumerate(options.seeds)], options.processes)
    finish(options)


if __name__ == "__main__":
    main()
