"""What it costs to make a store from the store before: the codec's error twice or thrice, against seconds saved.

Seconds are the processor's: other work on the machine does not count.

python -m benchmarks.codecs.chained --threads 1
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import ViTForImageClassification

from hf_freezecache import BlockChain, FeatureStore
from hf_freezecache.build.deepening import deepened, why_not_deepen
from hf_freezecache.build.feature_sources import ImageFeatures
from hf_freezecache.build.materialize import materialize
from hf_freezecache.build.store_spec import StoreSpec
from hf_freezecache.cache.codec import CODEC_NAMES
from hf_freezecache.cache.fingerprint import fingerprint_inputs
from hf_freezecache.cache.manifest import FORMAT_VERSION
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.distributed import Group

from .._common import Claim, make_parser, prepare, shared_folder, write_result
from .._images import WEIGHTS, Pixels, as_batch, load_caltech

FOLDER = "codecs"
CODECS = ("int8", "int4", "int3")
#: Cuts of the stores made one from the other, the first one from images.
PATHS = ((8,), (4, 8), (10,), (4, 10), (4, 7, 10))
#: A build from cut 4 to 8 must take at most this part of the seconds of one from images.
MOST_SECONDS = 0.85


class Builder:
    """Builds the stores of one codec and keeps them with the processor seconds they took.

    Args:
        chain: the model.
        images: all samples.
        codec: name.
        folder: where stores lie.
        options: with `batch_size` and `seed`.
    """

    def __init__(self, chain: BlockChain, images: Pixels, codec: str, folder: Path, options: argparse.Namespace):
        self.chain, self.codec, self.folder = chain, codec, folder
        self.source = RowSource(images, as_batch, options.batch_size, options.seed)
        self._built: dict[tuple[int, ...], tuple[FeatureStore, float]] = {}

    def build(self, path: tuple[int, ...]) -> tuple[FeatureStore, float]:
        """The store at the path's last cut, and the processor seconds of its last build alone.

        Raises:
            RuntimeError: if a store cannot be made from the one before.
        """
        if path not in self._built:
            plan = self._plan(path[-1])
            if len(path) > 1:
                before, _ = self.build(path[:-1])
                reason = why_not_deepen(before, plan)
                if reason is not None:
                    raise RuntimeError(reason)
                plan = deepened(plan, before, lambda batch: batch)
            start = time.process_time()
            store = materialize(plan, Group())
            self._built[path] = store, time.process_time() - start
        return self._built[path]

    def _plan(self, cut: int) -> StoreSpec:
        chain, source, layout = self.chain, self.source, self.chain.layout(cut)
        made_from = fingerprint_inputs(
            source=source,
            model=chain.model,
            tensors=chain.prefix_state(cut),
            cut=cut,
            blocks=chain.names[:cut],
            codec=self.codec,
            augmentation={"views": 0},
            precision="no",
            format_version=FORMAT_VERSION,
        )
        return StoreSpec(
            chain=chain,
            cut=cut,
            source=source,
            codec=self.codec,
            layout=layout,
            made_from=made_from,
            directory=self.folder,
            feature_source=ImageFeatures(chain, cut, source, layout, lambda batch: batch),
            disable_tqdm=True,
        )


def compare(store: FeatureStore, chain: BlockChain, expected: torch.Tensor, batch_size: int) -> dict[str, float]:
    """Answers on a store's features against those on images.

    Args:
        store: to replay.
        chain: the model.
        expected: logits `(N, K)` on the images.
        batch_size: rows at once.

    Returns:
        Mean KL divergence in nats, and the share of images with the same most likely class.
    """
    cut, logits = store.manifest.cut, []
    with torch.no_grad(), chain.replay(cut):
        for first in range(0, len(store), batch_size):
            rows = range(first, min(first + batch_size, len(store)))
            logits.append(chain.model(**{chain.main_input: store.read(rows)}).logits)
    found = torch.cat(logits)
    divergence = F.kl_div(found.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean")
    return {"kl": divergence.item(), "top1_agreement": (found.argmax(1) == expected.argmax(1)).float().mean().item()}


def measure_codec(
    codec: str, chain: BlockChain, images: Pixels, expected: torch.Tensor, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a path."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(chain, images, codec, Path(folder), options)
        for path in PATHS:
            store, seconds = builder.build(path)
            error = compare(store, chain, expected, options.batch_size)
            rows.append({"codec": codec, "path": list(path), "build_cpu_seconds": seconds, **error})
            print(f"{describe(rows[-1])}: {seconds:.2f} processor s, KL {error['kl']:.3g}", flush=True)
    return rows


def describe(row: dict[str, Any]) -> str:
    """Codec and path in words."""
    return f"{row['codec']} images -> {' -> '.join(map(str, row['path']))}"


def make_claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What chaining must save and may lose."""
    by_path = {(row["codec"], tuple(row["path"])): row for row in rows}
    claims = []
    for codec in dict.fromkeys(row["codec"] for row in rows):
        ratio = by_path[codec, (4, 8)]["build_cpu_seconds"] / by_path[codec, (8,)]["build_cpu_seconds"]
        claims.append(Claim(f"{codec}: seconds 4 -> 8 / from images to 8", ratio, at_most=MOST_SECONDS))
    if ("int8", (4, 7, 10)) in by_path:
        agreement = by_path["int8", (4, 7, 10)]["top1_agreement"]
        claims.append(Claim("int8: top-1 agreement after 4 -> 7 -> 10", agreement, at_least=0.98))
    return claims


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--codecs", nargs="+", default=[name for name in CODECS if name in CODEC_NAMES])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rows", type=int, default=128)
    options = parser.parse_args(argv)
    if options.smoke:
        options.codecs, options.batch_size, options.rows = ["int4"], 8, 16
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    images = load_caltech(options, "train", options.image_size, options.rows)
    # With the head that the weights were trained with: a fresh one would answer at random.
    weights = shared_folder(options, "weights", WEIGHTS)
    model = ViTForImageClassification.from_pretrained(weights, local_files_only=True).eval()
    chain = BlockChain.from_model(model, probe=images.__getitems__(range(2)))
    with torch.no_grad():
        expected = torch.cat([model(pixels).logits for pixels in images.pixel_values.split(options.batch_size)])
    rows = [row for codec in options.codecs for row in measure_codec(codec, chain, images, expected, options)]
    names = ("codecs", "image_size", "batch_size", "rows")
    settings = {name: getattr(options, name) for name in names}
    write_result(FOLDER, options, settings, rows, make_claims(rows), file="chained.json")


if __name__ == "__main__":
    main()
