"""Building a store (forward, encode, write) against the bare forward of the prefix over the same pixels.

python -m benchmarks.materialize.run
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from hf_freezecache import BlockChain
from hf_freezecache.build.feature_sources import ImageFeatures
from hf_freezecache.build.materialize import materialize
from hf_freezecache.build.store_spec import StoreSpec
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.distributed import Group

from .._common import Claim, interleave, make_parser, pick, prepare, summary, write_result
from .._images import Pixels, add_image_options, as_batch, load_caltech, load_deit

LIMIT = 1.10


def measure_cut(cut: int, model: nn.Module, images: Pixels, options: argparse.Namespace) -> dict[str, Any]:
    """Builds the store and runs the bare prefix in turn, each over all images."""
    probe = images.__getitems__(range(2))
    chain = BlockChain.from_model(model, probe=probe)
    chain.freeze(cut)
    source = RowSource(images, as_batch, options.batch_size, options.seed)
    stores, numbers = [], itertools.count()

    def bare() -> None:
        for batch in images.pixel_values.split(options.batch_size):
            chain.prefix({"pixel_values": batch}, cut)

    with tempfile.TemporaryDirectory() as folder:

        def build() -> None:
            plan = StoreSpec(
                chain=chain,
                cut=cut,
                source=source,
                codec=options.codec,
                layout=chain.layout(cut),
                made_from={"build": next(numbers)},
                directory=Path(folder),
                feature_source=ImageFeatures(chain, cut, source, chain.layout(cut), lambda batch: batch),
                disable_tqdm=True,
            )
            stores.append(materialize(plan, Group()))

        seconds = interleave({"build": build, "bare": bare}, options.repeats)
        store_bytes = stores[-1].bytes
    result = {side: summary(values) for side, values in seconds.items()}
    return {
        "cut": cut,
        "build_seconds": result["build"],
        "prefix_forward_seconds": result["bare"],
        "ratio": result["build"]["median"] / result["bare"]["median"],
        "rows_per_second": len(images) / result["build"]["median"],
        "store_bytes": store_bytes,
        "bytes_per_row": store_bytes / len(images),
    }


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--cuts", type=int, nargs="+", default=[4, 8, 10])
    parser.add_argument("--codec", default="int4")
    add_image_options(parser, rows=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    if options.smoke:
        options.cuts, options.batch_size, options.rows, options.repeats = [4], 16, 48, 2
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    images = load_caltech(options, "train", options.image_size, options.rows)
    model = load_deit(options)
    results, claims = [], []
    for cut in options.cuts:
        result = measure_cut(cut, model, images, options)
        results.append(result)
        build, bare = result["build_seconds"]["median"], result["prefix_forward_seconds"]["median"]
        print(f"cut {cut}: build {build:.3f} s, prefix {bare:.3f} s, ratio {result['ratio']:.3f}", flush=True)
        claims.append(Claim(f"building the store / prefix forward, cut {cut}", result["ratio"], at_most=LIMIT))
    settings = pick(options, "codec image_size batch_size rows repeats")
    write_result("materialize", options, settings, results, claims)


if __name__ == "__main__":
    main()
