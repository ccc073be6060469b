"""The `freezecache` command: what a store holds, and whether it is undamaged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import safetensors.torch
import torch

from .cache.store import MANIFEST, FeatureStore, StoreError
from .layout import FeatureLayout
from .plots import plot_sensitivity
from .replay.sensitivity import SENSITIVITY, Sensitivity

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
        store = FeatureStore.open(options.directory)
        if options.command == "verify":
            store.verify()
            print(f"{store.path}: ok")
        else:
            print(describe(store))
            if options.sensitivity:
                draw_sensitivity(store, options.output or "sensitivity.png")
    except (StoreError, OSError, ImportError, ValueError) as error:
        print(f"freezecache: {error}", file=sys.stderr)
        return 1
    return 0


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
        ("codec", manifest.codec),
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
    parser = argparse.ArgumentParser(prog="freezecache", description="Looks into feature stores.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="print what a store holds")
    inspect.add_argument("directory", metavar="DIR", help=f"a store: the folder with {MANIFEST}")
    inspect.add_argument(
        "--sensitivity", action="store_true", help="draw which channels are kept for every view; needs matplotlib"
    )
    inspect.add_argument("--output", metavar="PNG", help="file of that picture (default: sensitivity.png)")
    verify = commands.add_parser("verify", help="read a whole store and compare every checksum")
    verify.add_argument("directory", metavar="DIR", help=f"a store: the folder with {MANIFEST}")
    return parser


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines whose columns stand below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
