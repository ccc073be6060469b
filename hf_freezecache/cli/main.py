"""The `freezecache` command: its options, and which function answers it.

torch, Transformers and datasets take seconds to import. They are imported by the commands, after the options were
read, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

from .predictor_options import add_predictor


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit code: 0, or 1 if a store or a head is missing or damaged, an input is wrong or missing, or the Hub refuses
        something; the reason is on stderr.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.command == "inspect" and options.output is not None and not options.sensitivity:
        parser.error("--output names the picture of --sensitivity: give both")

    run = _choose(options)
    from ..cache.manifest import StoreError
    from ..hub.errors import HeadError

    try:
        run()
    except (StoreError, HeadError, OSError, ImportError, ValueError) as error:
        print(f"freezecache: {error}", file=sys.stderr)
        return 1
    return 0


def _choose(options: argparse.Namespace) -> Callable[[], None]:
    """Imports the command of the options and returns it, ready to run."""
    if options.command == "plan":
        from .plan import plan_images

        return lambda: print(json.dumps(plan_images(options).to_dict()) if options.json else plan_images(options))
    if options.command == "head":
        from . import heads

        return partial(getattr(heads, options.action), options)
    if options.command == "predictor":
        from . import predictor

        return partial(getattr(predictor, options.action), options)
    if options.command == "report":
        from .report import report

        return partial(report, options.directories, options.output, options.metric, options.json)
    if options.command == "zo-cost":
        from .zero_order import print_costs

        return partial(print_costs, options)
    from . import stores

    if options.command == "inspect":
        picture = (options.output or "sensitivity.png") if options.sensitivity else None
        return partial(stores.inspect, options.directory, picture, options.json)
    if options.command == "verify":
        return partial(stores.verify, options.directory, options.json)
    return partial(stores.clean, options.directory, options.yes, options.json)


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands, without importing what they need."""
    parser = argparse.ArgumentParser(
        prog="freezecache",
        description="Plans feature stores, inspects, verifies and removes them; saves, loads and pushes heads; "
        "reports on trainings; makes predictors of what has settled; estimates random numbers in hardware.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands)
    inspect = commands.add_parser("inspect", help="print what a store holds")
    inspect.add_argument(
        "directory", metavar="DIR", help="a store: the folder that contains manifest.json, or its URL (s3://...)"
    )
    inspect.add_argument(
        "--sensitivity", action="store_true", help="draw which channels are stored for every view; needs matplotlib"
    )
    inspect.add_argument("--output", metavar="PNG", help="file of that picture (default: sensitivity.png)")
    verify = commands.add_parser("verify", help="read a whole store and compare every checksum")
    verify.add_argument(
        "directory", metavar="DIR", help="a store: the folder that contains manifest.json, or its URL (s3://...)"
    )
    clean = commands.add_parser("clean", help="remove the stores in a folder and the leftovers of killed builds")
    clean.add_argument(
        "directory",
        metavar="DIR",
        help="the folder of the stores (feature_cache_dir), or the output folder of a training",
    )
    report = commands.add_parser("report", help="make a page on a training, or on several side by side")
    report.add_argument("directories", metavar="DIR", nargs="+", help="output folders of trainings")
    report.add_argument(
        "--output", metavar="HTML", default="freeze_cache_report.html", help="file of the page (default: %(default)s)"
    )
    report.add_argument("--metric", metavar="NAME", help="what is compared (default: the first metric of evaluations)")
    report.add_argument("--json", action="store_true", help="print the records as JSON in place of a page")
    for command in (inspect, verify, clean):
        command.add_argument("--json", action="store_true", help="print JSON in place of a table")
    mode = clean.add_mutually_exclusive_group()
    mode.add_argument("--yes", action="store_true", help="remove them; without this option they are only listed")
    mode.add_argument("--dry-run", action="store_true", help="only list them (the default)")
    _add_head(commands)
    add_predictor(commands)
    _add_zero_order_cost(commands)
    return parser


def _add_head(commands: argparse._SubParsersAction) -> None:
    head = commands.add_parser("head", help="save, load or push what was trained behind the frozen blocks")
    actions = head.add_subparsers(dest="action", required=True, metavar="ACTION")
    save = actions.add_parser(
        "save",
        help="save the head of a trained model",
        description="Saves what comes behind the cut of a model, and blocks before it that differ from the base.",
    )
    save.add_argument("model", metavar="MODEL", help="folder of the trained model, such as a checkpoint of a training")
    save.add_argument("output", metavar="DIR", help="folder of the head")
    save.add_argument(
        "--base", required=True, metavar="BASE", help="what it was trained from: folder or id on the Hub"
    )
    save.add_argument(
        "--cut", type=int, metavar="N", help="blocks before the head, stem included (default: that of the checkpoint)"
    )
    save.add_argument("--no-prefix", action="store_true", help="refuse where blocks before the head were trained")
    load = actions.add_parser(
        "load",
        help="put a head on its base and save the whole model",
        description="Puts a head on its base and saves the model as its library does.",
    )
    load.add_argument("head", metavar="HEAD", help="folder or id on the Hub")
    load.add_argument("output", metavar="DIR", help="folder of the whole model")
    load.add_argument("--base", metavar="BASE", help="folder or id on the Hub (default: the one that the head names)")
    load.add_argument("--revision", metavar="NAME", help="commit, branch or tag of the head on the Hub")
    push = actions.add_parser(
        "push",
        help="push a saved head to the Hub",
        description="Pushes a saved head. The token is that of `hf auth login`, or of the variable HF_TOKEN.",
    )
    push.add_argument("head", metavar="DIR", help="folder of the head")
    push.add_argument("repo", metavar="REPO", help="owner/name on the Hub; made if it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="make a private repository")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")
    push.add_argument("--revision", metavar="BRANCH", help="branch (default: the main one)")
    for action in (save, load, push):
        action.add_argument("--json", action="store_true", help="print what was done as JSON")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="measure what freezing and caching an image classifier would save",
        description="Measures on a few batches what a store at every cut would cost and save. Writes no store.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of an image classifier")
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="parquet files, or one folder with a folder of images per class",
    )
    data.add_argument("--image-column", metavar="NAME", help="default: the first column of type Image")
    data.add_argument(
        "--label-column", metavar="NAME", help="default: the first column of type ClassLabel, or label, or labels"
    )
    data.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: the model's own)")
    data.add_argument(
        "--augmentation",
        choices=("crop", "color", "none"),
        default="crop",
        help="of training images: random crop and flip, the same and colour jitter, or none (default: %(default)s)",
    )
    data.add_argument(
        "--min-crop",
        type=float,
        default=0.35,
        metavar="SHARE",
        help="smallest share of an image that a random crop shows (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON in place of a table")
    measuring = parser.add_argument_group("measurement")
    measuring.add_argument(
        "--cuts", type=_numbers, help="cuts to measure: numbers of frozen blocks, e.g. 4,8 (default: all)"
    )
    measuring.add_argument(
        "--batches", type=int, default=3, metavar="N", help="batches to measure at every cut (default: %(default)s)"
    )
    measuring.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: %(default)s)")
    measuring.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes of the data loader (default: %(default)s)"
    )
    measuring.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: its own choice)")
    measuring.add_argument("--cpu", action="store_true", help="measure on the CPU even if there is an accelerator")
    measuring.add_argument("--bf16", action="store_true", help="use mixed precision")
    store = parser.add_argument_group("store")
    store.add_argument("--codec", metavar="NAME", help="encoding of the features (default: that of FreezeCacheConfig)")
    store.add_argument("--lossless", action="store_true", help="compress the codes of every row with zstd")
    store.add_argument("--progressive", metavar="CODECS", help="codecs by depth, e.g. 0.25:int8,0.5:int4")
    store.add_argument("--views", type=int, metavar="N", help="augmented views beside the base view (default: 1)")
    store.add_argument("--budget", metavar="SIZE", help="largest size of a store, e.g. 20GB")
    store.add_argument("--cache-dir", metavar="DIR", help="folder of the stores: its disk must have room for them")


def _add_zero_order_cost(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "zo-cost",
        help="estimate what random numbers for zeroth-order training cost in hardware",
        description="Estimates, from published building blocks, the random numbers of a step and the size of the "
        "generators that give them on an FPGA: Gaussian ones, and those of PeZO.",
    )
    parser.add_argument("parameters", type=int, metavar="WEIGHTS", help="how many weights are trained")
    parser.add_argument(
        "--lanes", type=int, default=8, metavar="N", help="numbers a clock cycle (default: %(default)s)"
    )
    parser.add_argument("--bits", type=int, default=8, metavar="N", help="of a uniform number (default: %(default)s)")
    parser.add_argument("--pool-size", type=int, default=4095, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--estimator", choices=("two_point", "one_sided"), default="two_point", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--estimates", type=int, default=1, metavar="N", help="directions a step (default: %(default)s)"
    )
    parser.add_argument("--exact-scaling", action="store_true", help="multiply uniform numbers in place of shifting")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
