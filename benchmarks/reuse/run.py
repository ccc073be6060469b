"""Seconds to open and to prove a large store of an earlier run, step by step.

python -m benchmarks.reuse.run
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_freezecache import BlockChain, FreezeCacheConfig
from hf_freezecache.build.context import BuildContext
from hf_freezecache.build.materialize import complete_store, open_matching
from hf_freezecache.build.spec_maker import SpecMaker
from hf_freezecache.cache.codec import make_codec
from hf_freezecache.cache.names import shard_name
from hf_freezecache.cache.row_files import describe_files, files_of
from hf_freezecache.cache.rows import RowSource, split_batch
from hf_freezecache.cache.shards import ShardWriter
from hf_freezecache.cache.store import create_aside
from hf_freezecache.cache.view_columns import ViewColumns
from hf_freezecache.distributed import Group
from hf_freezecache.model.inputs import ModelInputs

from .._common import Claim, make_parser, pick, prepare, write_result

T = TypeVar("T")
CODEC = "int4"
#: Rows that a build encodes and writes at a time.
BUILD_BATCH = 32


class Folder(torch.utils.data.Dataset):
    """A folder of images, a file a row; few of them differ, so that their features need not be computed row by row."""

    def __init__(self, folder: Path, rows: int, different: int, size: int, seed: int):
        generator = np.random.default_rng(seed)
        originals = [folder / f"original-{number}.jpg" for number in range(different)]
        for path in originals:
            coarse = generator.integers(0, 255, (8, 8, 3), np.uint8)
            PIL.Image.fromarray(coarse).resize((size, size)).save(path, quality=90)
        self.samples = []
        for row in range(rows):
            path = folder / f"{row:06}.jpg"
            os.link(originals[row % different], path)
            self.samples.append((str(path), row % 100))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> dict[str, Any]:
        path, label = self.samples[row]
        pixels = torch.from_numpy(np.array(PIL.Image.open(path))).permute(2, 0, 1) / 255
        return {"pixel_values": pixels, "labels": torch.tensor(label)}


def make_maker(dataset: Folder, folder: Path, options: argparse.Namespace) -> SpecMaker:
    """As in a training of a ViT with the shape of DeiT-Tiny."""
    torch.manual_seed(options.seed)
    shape = dict(hidden_size=192, num_attention_heads=3, intermediate_size=768)
    model = ViTForImageClassification(ViTConfig(image_size=options.image_size, num_labels=100, **shape)).eval()
    source = RowSource(dataset, torch.utils.data.default_collate, BUILD_BATCH, options.seed)
    model_inputs = ModelInputs(model, dict, ["labels"])
    chain = BlockChain.from_model(model, probe=model_inputs(source.probe()))
    config = FreezeCacheConfig(policy="manual", freeze_points=f"0:{options.cut}", cache="always", codec=CODEC)
    return SpecMaker(BuildContext(chain, source, config, folder / "cache", Group(), model_inputs, "no", True))


def write(maker: SpecMaker, options: argparse.Namespace) -> int:
    """Writes the store that a build of all rows would write, and returns its bytes."""
    spec = maker.settle(maker.make(options.cut, CODEC))
    probe = split_batch(spec.source.probe(), spec.chain.main_input)
    first = [
        spec.source.collate(range(start, start + BUILD_BATCH)) for start in range(0, options.different, BUILD_BATCH)
    ]
    features = torch.cat([spec.chain.prefix({"pixel_values": batch["pixel_values"]}, spec.cut) for batch in first])
    codec = make_codec(CODEC, spec.layout).fit(features)
    codes, views = codec.encode(features), ViewColumns(spec.views, codec)
    aside = create_aside(spec.path)
    with ShardWriter(aside / shard_name(0, 1), codec, views, probe.describe()) as writer:
        for number in range(spec.source.num_ranges):
            rows = torch.tensor(spec.source.rows(number))
            labels = rows % 100
            chosen = {name: value[rows % options.different] for name, value in codes.items()}
            writer.write(int(rows[0]), chosen, {"labels": labels})
    complete_store(spec, aside, codec, probe, [writer.shard()])
    store = open_matching(spec, Group())
    assert store is not None
    return store.bytes


def measure(dataset: Folder, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every step, as a second run takes them."""
    seconds: dict[str, float] = {}

    def timed(name: str, step: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = step()
        seconds[name] = time.perf_counter() - begin
        return result

    maker = make_maker(dataset, folder, options)
    spec = timed("fingerprint", lambda: maker.make(options.cut, CODEC))
    timed("checksums", lambda: open_matching(spec, Group()))
    timed("sizes and times of the files", lambda: describe_files(files_of(dataset) or [], content=False))
    timed("contents of the files", lambda: describe_files(files_of(dataset) or [], content=True))
    store = timed("open", lambda: maker.reuse.open(spec))
    if store is None:
        raise SystemExit("the store was refused.")
    rows = max(256, options.rows // 100)
    seconds["rows computed again"] = seconds["open"] - seconds["checksums"] - seconds["sizes and times of the files"]
    return {"seconds": seconds, "rows_computed_again": rows, "total_seconds": seconds["fingerprint"] + seconds["open"]}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--cut", type=int, default=8)
    parser.add_argument("--different", type=int, default=64, help="different images among the rows")
    options = parser.parse_args()
    if options.smoke:
        options.rows, options.image_size, options.cut = 1000, 32, 2
    prepare(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = Folder(folder, options.rows, options.different, options.image_size, options.seed)
        store_bytes = write(make_maker(dataset, folder, options), options)
        result = measure(dataset, folder, options)
    forward = result["seconds"]["rows computed again"] / result["rows_computed_again"]
    result |= {"store_bytes": store_bytes, "share_of_a_build": result["total_seconds"] / (forward * options.rows)}
    claims = [Claim("opening and proving relative to a build of all rows", result["share_of_a_build"], at_most=0.05)]
    settings = pick(options, "rows image_size cut different")
    write_result("reuse", options, {"codec": CODEC, **settings}, result, claims)


if __name__ == "__main__":
    main()
