"""What zstd takes away of every row's codes, and what packing and unpacking cost.

python -m benchmarks.codecs.lossless --threads 1
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_freezecache import BlockChain, make_codec
from hf_freezecache.build.fisher import fisher_weights
from hf_freezecache.cache.codec import Codec
from hf_freezecache.cache.lossless import LEVEL, pack_rows
from hf_freezecache.cache.mapped import MappedColumn, PackedColumn
from hf_freezecache.cache.shards import ShardWriter
from hf_freezecache.cache.view_columns import ViewColumns, ViewSpec

from .._common import Claim, interleave, make_parser, prepare, summary, write_result
from .models import CUTS, load_models, run_prefix

CODECS = ("int8", "int4", "int3", "mixed")


@dataclass(frozen=True)
class Features:
    """A model's features at a cut.

    Args:
        name: of model and cut.
        codecs: fitted on other features, by name.
        test: `(N, *shape)`.
    """

    name: str
    codecs: dict[str, Codec]
    test: torch.Tensor


def make_features(options: argparse.Namespace) -> Iterator[Features]:
    """Every model at every cut, one after the other."""
    for name, load in load_models().items():
        model, blocks, train, test = load(options)
        chain = BlockChain.from_model(model.eval(), blocks=blocks, probe={"pixel_values": train[:2]})
        fisher = [{"pixel_values": batch} for batch in train[: options.fisher_images].split(options.batch_size)]
        for cut in CUTS[name]:
            fit = run_prefix(chain, train, cut, options)
            codecs = {codec: make_codec(codec, chain.layout(cut)) for codec in options.codecs}
            weighted = any(codec.uses_weights for codec in codecs.values())
            weights = fisher_weights(chain, cut, fisher, options.seed, bands=True) if weighted else None
            for codec in codecs.values():
                codec.fit(fit, weights=weights if codec.uses_weights else None)
            yield Features(f"{name} cut {cut}", codecs, run_prefix(chain, test, cut, options))


def measure(codec: Codec, features: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the Arrow files with rows as they are and packed, and the speed of both.

    Megabytes are those of the codes before they are packed.
    """
    batches = [codec.encode(batch) for batch in features.split(options.batch_size)]
    codes = torch.cat([batch["base"] for batch in batches]).numpy()
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.arrow" for kind in ("plain", "packed")}
        sizes = {kind: write(path, codec, batches, kind == "packed") for kind, path in paths.items()}
        columns = {kind: datasets.Dataset.from_file(str(path)).data.column("base") for kind, path in paths.items()}
        plain, packed = MappedColumn(columns["plain"]), PackedColumn(columns["packed"], codes.shape[1], "base")
        order = np.random.default_rng(options.seed).permutation(len(codes))
        if not np.array_equal(plain.take(order), packed.take(order)):
            raise ValueError("packed rows are not the rows that were packed")
        sides = {
            "read_plain": functools.partial(plain.take, order),
            "read_packed": functools.partial(packed.take, order),
            "pack": functools.partial(pack_rows, codes),
            "encode": lambda: [codec.encode(batch) for batch in features.split(options.batch_size)],
        }
        seconds = interleave(sides, options.repeats)
    speeds = {name: summary([codes.nbytes / 1e6 / each for each in values]) for name, values in seconds.items()}
    return {
        "plain_bytes": sizes["plain"],
        "packed_bytes": sizes["packed"],
        "saved": 1 - sizes["packed"] / sizes["plain"],
        "row_bytes": codes.shape[1],
        "mean_frame_bytes": packed.frame_bytes,
        **{f"{name}_mb_per_second": speed for name, speed in speeds.items()},
    }


def write(path: Path, codec: Codec, batches: list[dict[str, torch.Tensor]], lossless: bool) -> int:
    """Size of the Arrow file of a store with these rows, and nothing else but their numbers."""
    first = 0
    with ShardWriter(path, codec, ViewColumns(ViewSpec(), codec), {}, lossless) as writer:
        for batch in batches:
            writer.write(first, batch, {})
            first += len(batch["base"])
    return path.stat().st_size


def make_claims(results: dict[str, dict[str, Any]]) -> list[Claim]:
    """It is offered because it saves that much with int4; an incompressible row costs next to nothing."""
    claims = []
    for name, codecs in results.items():
        if "int4" in codecs:
            least = 0.09 if name.startswith("deit") else 0.1
            claims.append(Claim(f"{name}: share that packing int4 saves", codecs["int4"]["saved"], at_least=least))
        for codec, found in codecs.items():
            grown = found["packed_bytes"] / found["plain_bytes"]
            claims.append(Claim(f"{name}: packed / plain bytes of {codec}", grown, at_most=1.01))
    return claims


def describe(name: str, codec: str, found: dict[str, Any]) -> str:
    """One line for a person."""
    read, packed, pack = (found[f"{key}_mb_per_second"]["median"] for key in ("read_plain", "read_packed", "pack"))
    return (
        f"{name} {codec}: {found['plain_bytes']:,} -> {found['packed_bytes']:,} bytes ({found['saved']:.1%} saved); "
        f"read {read:.0f} and packed {packed:.0f} MB/s, packing {pack:.0f} MB/s"
    )


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    parser.add_argument("--fit_images", type=int, default=96)
    parser.add_argument("--fisher_images", type=int, default=32)
    parser.add_argument("--test_images", type=int, default=128, help="of Caltech-101")
    parser.add_argument("--cifar_images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args(argv)
    if options.smoke:
        options.fit_images, options.fisher_images, options.test_images, options.cifar_images = 16, 8, 8, 16
        options.repeats, options.batch_size = 2, 8
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    results: dict[str, dict[str, Any]] = {}
    for features in make_features(options):
        results[features.name] = {}
        for name, codec in features.codecs.items():
            results[features.name][name] = measure(codec, features.test, options)
            print(describe(features.name, name, results[features.name][name]), flush=True)
    names = "codecs fit_images fisher_images test_images cifar_images repeats batch_size".split()
    settings = {**{name: getattr(options, name) for name in names}, "cuts": CUTS, "level": LEVEL}
    write_result("codecs", options, settings, results, make_claims(results), file="lossless.json")


if __name__ == "__main__":
    main()
