"""What zstd saves of every row's codes, and what packing and unpacking cost.

python -m benchmarks.codecs.lossless --threads 1
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_freezecache.cache.arrow_stream import read_stream
from hf_freezecache.cache.codec import Codec
from hf_freezecache.cache.held_files import HeldFile, open_file
from hf_freezecache.cache.lossless import LEVEL, pack_rows
from hf_freezecache.cache.shards import file_sha256
from hf_freezecache.cache.stored_columns import FixedColumn, PackedColumn

from .._common import Claim, interleave, make_parser, pick, prepare, summary, write_result
from .._stores import arrow_bytes
from .models import CUTS, fit_codec, make_cases

CODECS = ("int8", "int4", "int3", "mixed")


def measure(codec: Codec, features: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the Arrow files with rows as they are and packed, and the speed of both.

    Megabytes are those of the codes before they are packed.
    """
    batches = [codec.encode(batch) for batch in features.split(options.batch_size)]
    codes = torch.cat([batch["base"] for batch in batches]).numpy()
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.arrow" for kind in ("plain", "packed")}
        sizes = {kind: arrow_bytes(path, codec, batches, lossless=kind == "packed") for kind, path in paths.items()}
        files = {kind: HeldFile(path, open_file(path), sizes[kind], file_sha256(path)) for kind, path in paths.items()}
        (plain_schema, plain_batches), (packed_schema, packed_batches) = map(read_stream, files.values())
        plain = FixedColumn(plain_batches, plain_schema, "base", folder)
        packed = PackedColumn(packed_batches, packed_schema, "base", folder, codes.shape[1])
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


def make_claims(results: dict[str, dict[str, Any]]) -> list[Claim]:
    """It is offered because it saves that much with int4; an incompressible row costs next to nothing."""
    claims = []
    for name, codecs in results.items():
        if "int4" in codecs:
            least = 0.09 if name.startswith("deit") else 0.1
            claims.append(Claim(f"{name}: share that packing int4 saves", codecs["int4"]["saved"], at_least=least))
        for codec, result in codecs.items():
            grown = result["packed_bytes"] / result["plain_bytes"]
            claims.append(Claim(f"{name}: packed / plain bytes of {codec}", grown, at_most=1.01))
    return claims


def describe(name: str, codec: str, result: dict[str, Any]) -> str:
    """One line for a person."""
    read, packed, pack = (result[f"{key}_mb_per_second"]["median"] for key in ("read_plain", "read_packed", "pack"))
    sizes = f"{result['plain_bytes']:,} -> {result['packed_bytes']:,} bytes ({result['saved']:.1%} saved)"
    return f"{name} {codec}: {sizes}; read {read:.0f} and packed {packed:.0f} MB/s, packing {pack:.0f} MB/s"


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    parser.add_argument("--fit_images", type=int, default=96)
    parser.add_argument("--fisher_images", type=int, default=32)
    parser.add_argument("--test_images", type=int, default=128, help="test images of Caltech-101")
    parser.add_argument("--cifar_images", type=int, default=512, help="test images of CIFAR-10")
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
    for case in make_cases(options):
        results[case.name] = {}
        for name in options.codecs:
            results[case.name][name] = measure(fit_codec(name, case), case.test, options)
            print(describe(case.name, name, results[case.name][name]), flush=True)
    names = "codecs fit_images fisher_images test_images cifar_images repeats batch_size"
    settings = {**pick(options, names), "cuts": CUTS, "level": LEVEL}
    write_result("codecs", options, settings, results, make_claims(results), file="lossless.json")


if __name__ == "__main__":
    main()
