"""The `freezecache` command: plans, what a store holds, whether it is undamaged, and taking stores away."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from ..augment.sensitivity import SENSITIVITY, Sensitivity
from ..cache.cleaning import Removable, find_stores, remove
from ..cache.store import MANIFEST, FeatureStore, StoreError
from ..model.layout import FeatureLayout
from ..units import show_bytes
from .plots import plot_sensitivity

_SENSITIVITY_FILE = f"{SENSITIVITY}.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        Exit code: 0, or 1 if a store is missing or damaged, or a picture cannot be made.
    """
    parser = _make_parser()
    options = parser.parse_args(argv)
    if options.command == "inspect" and options.output is not None and not options.sensitivity:
        parser.error("--output names the picture of --sensitivity: give both")
    try:
        if options.command == "plan":
            # Transformers and torchvision take seconds to import; the other commands do without.
            from .plan import plan_images

            print(plan_images(options))
        elif options.command == "clean":
            clean(Path(options.directory), options.yes)
        else:
            look_into(options)
    except (StoreError, OSError, ImportError, ValueError) as error:
        print(f"freezecache: {error}", file=sys.stderr)
        return 1
    return 0


def look_into(options: argparse.Namespace) -> None:
    """Prints what a store holds, or verifies it.

    Raises:
        StoreError: if it is missing or damaged.
    """
    store = FeatureStore.open(options.directory)
    if options.command == "verify":
        store.verify()
        print(f"{store.path}: ok")
        return
    print(describe(store))
    if options.sensitivity:
        draw_sensitivity(store, options.output or "sensitivity.png")


def clean(directory: Path, yes: bool) -> None:
    """Lists the stores in a directory and what builds have left there; takes them away if told so.

    Raises:
        OSError: if it is no directory, or something cannot be removed.
    """
    stores = find_stores(directory)
    if not stores:
        print(f"{directory}: no stores")
        return
    rows = [(show_bytes(store.bytes).rjust(9), _state(store), str(store.path)) for store in stores]
    print("\n".join(_align(rows)))
    if yes:
        print(f"removed {show_bytes(remove(stores))}")
    else:
        free = sum(store.bytes for store in stores if not store.running)
        print(f"{show_bytes(free)} can be removed; nothing was, say --yes for that")


def _state(store: Removable) -> str:
    if store.finished:
        return "store"
    return "being built, stays" if store.running else "left by a build"


def describe(store: FeatureStore) -> str:
    """What a store holds, as text: the manifest's facts and the files."""
    manifest, layout = store.manifest, FeatureLayout.from_json(store.manifest.layout)
    channels = manifest.sensitive_channels
    files = [(shard.name, shard.bytes, f"{shard.rows:,} samples") for shard in manifest.shards]
    files += [(name, entry["bytes"], "") for name, entry in manifest.files.items()]
    files.append((MANIFEST, (store.path / MANIFEST).stat().st_size, ""))
    facts = [
        ("path", str(store.path)),
        ("cut", f"{manifest.cut} frozen blocks"),
        ("codec", f"{manifest.codec}, every row packed with zstd" if manifest.lossless else manifest.codec),
        ("feature", f"{_times(layout.shape)}, {str(layout.dtype).removeprefix('torch.')}"),
        ("grid", "none" if layout.grid is None else _times(layout.grid)),
        ("special tokens", str(layout.special_tokens)),
        ("samples", f"{manifest.rows:,}"),
        ("views", f"{manifest.views} beside the base view"),
    ]
    if manifest.views:
        kept = f"all {layout.channels}" if channels is None else f"{len(channels)} of {layout.channels}"
        facts.append(("geometry", "none: views are kept whole" if manifest.geometry is None else manifest.geometry))
        facts.append(("sensitive channels", kept))
    facts.append(("bytes", f"{sum(size for _, size, _ in files):,}"))
    facts.append(("bytes a sample", f"{store.bytes / max(1, manifest.rows):,.0f}, in the Arrow files"))
    width = max(len(f"{size:,}") for _, size, _ in files)
    rows = [(name, f"{size:,}".rjust(width), note) for name, size, note in files]
    return "\n".join([*_align(facts), "", *_align(rows)])


def draw_sensitivity(store: FeatureStore, output: str) -> None:
    """Draws which channels a store keeps for every view, from what was measured before it was built.

    Raises:
        StoreError: if nothing was measured.
        ImportError: without matplotlib.
    """
    manifest = store.manifest
    if _SENSITIVITY_FILE not in manifest.files:
        if not manifest.views:
            reason = "it holds the base view alone"
        elif manifest.geometry is None:
            reason = "its views are kept whole"
        else:
            reason = f"it has no {_SENSITIVITY_FILE}"
        raise StoreError(f"no channel's sensitivity was measured for {store.path}: {reason}.")
    try:
        sensitivity = Sensitivity.from_tensors(safetensors.torch.load_file(store.path / _SENSITIVITY_FILE))
    except KeyError as error:
        raise StoreError(f"{store.path / _SENSITIVITY_FILE} lacks {error}: build the store again.") from error
    channels = torch.tensor(manifest.sensitive_channels, dtype=torch.int64)
    plot_sensitivity(sensitivity, channels, output, f"How the channels at cut {manifest.cut} follow the augmentation")
    print(f"\npicture: {output}")


def _make_parser() -> argparse.ArgumentParser:
    description = "Plans and looks into feature stores."
    parser = argparse.ArgumentParser(prog="freezecache", description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands.add_parser("plan", help="measure what freezing and caching an image classifier would save"))
    inspect = commands.add_parser("inspect", help="print what a store holds")
    inspect.add_argument("directory", metavar="DIR", help=f"a store: the folder with {MANIFEST}")
    inspect.add_argument(
        "--sensitivity", action="store_true", help="draw which channels are kept for every view; needs matplotlib"
    )
    inspect.add_argument("--output", metavar="PNG", help="file of that picture (default: sensitivity.png)")
    verify = commands.add_parser("verify", help="read a whole store and compare every checksum")
    verify.add_argument("directory", metavar="DIR", help=f"a store: the folder with {MANIFEST}")
    cleaning = commands.add_parser("clean", help="remove the stores in a folder and what killed builds have left")
    cleaning.add_argument("directory", metavar="DIR", help="the folder with the stores (feature_cache_dir)")
    mode = cleaning.add_mutually_exclusive_group()
    mode.add_argument("--yes", action="store_true", help="remove them; without it they are only listed")
    mode.add_argument("--dry-run", action="store_true", help="only list them, as without --yes")
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of an image classifier")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="parquet files, or a folder with one folder a class"
    )
    parser.add_argument("--image-column", help="found by its type if not given")
    parser.add_argument("--label-column", help="found by its type if not given")
    parser.add_argument("--image-size", type=int, help="side of the images (default: the model's own)")
    parser.add_argument(
        "--augmentation", choices=("crop", "none"), default="crop", help="random crops and flips, or none"
    )
    parser.add_argument("--cuts", type=_numbers, help="numbers of frozen blocks, e.g. 4,8 (default: every one)")
    parser.add_argument("--batches", type=int, default=3, help="measured at every cut (default: 3)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: 32)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: 0)")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU, even if there is an accelerator")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--codec", help="how features become bytes (default: that of FreezeCacheConfig)")
    parser.add_argument("--lossless", action="store_true", help="pack every row's codes with zstd")
    parser.add_argument("--progressive", help="codec by depth, e.g. 0.25:int8,0.5:int4")
    parser.add_argument("--views", type=int, help="augmented views beside the base view (default: 1)")
    parser.add_argument("--budget", metavar="SIZE", help="most bytes of a store, e.g. 20GB")
    parser.add_argument("--cache-dir", metavar="DIR", help="where stores would lie: its disk has to hold them")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines whose columns stand below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
