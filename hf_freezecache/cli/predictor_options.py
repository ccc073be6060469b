"""The options of `freezecache predictor`."""

from __future__ import annotations

import argparse


def add_predictor(commands: argparse._SubParsersAction) -> None:
    """Adds the commands that make a predictor for policy smartfrz."""
    predictor = commands.add_parser("predictor", help="make a predictor for policy smartfrz from recorded trainings")
    actions = predictor.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_record(actions)
    label = actions.add_parser(
        "label",
        help="say from when on the blocks of recorded trainings had settled",
        description="Labels snapshots by the distance of a block's output from that of the finished model (1 - CKA), "
        "relative to the largest that it has had, and prints how much other rules would change. The rule is kept "
        "beside the runs.",
    )
    label.add_argument("runs", metavar="RUNS", help="folder of recorded trainings")
    label.add_argument(
        "--remaining", type=float, default=0.02, help="share of the largest distance, at most (default: %(default)s)"
    )
    label.add_argument("--floor", type=float, default=0.005, help="distance that is small (default: %(default)s)")
    label.add_argument("--window", type=int, default=3, help="snapshots that are averaged (default: %(default)s)")
    train = actions.add_parser("train", help="train a predictor on recorded trainings")
    train.add_argument("runs", metavar="RUNS", help="folder of recorded trainings")
    train.add_argument("output", metavar="DIR", help="folder of the predictor")
    train.add_argument("--variant", choices=("fixed", "fresh"), default="fixed", help="positions of the weights")
    train.add_argument("--window", type=int, default=8, help="snapshots that it looks at (default: %(default)s)")
    train.add_argument(
        "--inputs",
        nargs="+",
        metavar="NAME",
        help="what it reads of a snapshot, of those that the documentation of FreezePredictor names (default: all but "
        "the quantiles)",
    )
    train.add_argument("--epochs", type=int, default=5, help="(default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    train.add_argument("--no-leave-one-out", action="store_true", help="skip the predictors without each network")
    evaluate = actions.add_parser("evaluate", help="score a predictor on recorded trainings that it has not seen")
    evaluate.add_argument("predictor", metavar="DIR", help="folder of the predictor")
    evaluate.add_argument("runs", metavar="RUNS", help="folder of recorded trainings")
    evaluate.add_argument("--threshold", type=float, default=0.5, help="confidence of 'freeze' (default: %(default)s)")
    push = actions.add_parser("push", help="push a predictor to the Hub")
    push.add_argument("predictor", metavar="DIR", help="folder of the predictor")
    push.add_argument("repo", metavar="REPO", help="owner/name on the Hub; made if it does not exist")
    push.add_argument("--private", action="store_true", help="make a private repository")
    for action in (label, train, evaluate, push):
        action.add_argument("--json", action="store_true", help="print what was done as JSON")


def _add_record(actions: argparse._SubParsersAction) -> None:
    record = actions.add_parser(
        "record",
        help="train an image classifier and record its blocks",
        description="Trains with a plain Trainer. For other trainings, add the callback "
        "hf_freezecache.smartfrz.recording.HistoryRecorder to a trainer of your own.",
    )
    record.add_argument("model", metavar="MODEL", help="folder or hub id of an image classifier")
    record.add_argument("name", metavar="NAME", help="of the recorded training")
    record.add_argument("--output", required=True, metavar="DIR", help="folder of the recorded trainings")
    record.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="parquet files, or a folder with a folder per class"
    )
    record.add_argument("--data-name", default="images", help="of the data, for the card (default: %(default)s)")
    record.add_argument("--from-scratch", action="store_true", help="start from an initialization")
    record.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images (default: the model's)")
    record.add_argument("--epochs", type=int, default=6, help="(default: %(default)s)")
    record.add_argument("--learning-rate", type=float, default=1e-4, help="(default: %(default)s)")
    record.add_argument("--scheduler", default="linear", help="of the learning rate (default: %(default)s)")
    record.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    record.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    record.add_argument("--cpu", action="store_true", help="train on the CPU even if there is an accelerator")
