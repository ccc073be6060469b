"""Random rows of a store against `np.memmap`, and a store against what one would write by hand with `datasets`.

python -m benchmarks.store.run
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from hf_freezecache import FeatureStore, ReplayCollator, make_codec
from hf_freezecache.build.materialize import fit_stride
from hf_freezecache.model.layout import FeatureLayout
from hf_freezecache.replay.collator import take_codes
from hf_freezecache.replay.dataset import ReplayDataset
from hf_freezecache.replay.requests import SourceSwitch, stamp_rows

from .._common import Claim, interleave, make_parser, pick, prepare, summary, write_result
from .._stores import LABELS, write_store

TOKENS = 197
CLASSES = 101
#: Rows that a build encodes and writes at a time.
BUILD_BATCH = 32
#: Ranges on which a build fits its codec.
FIT_BATCHES = 8


# Random rows against np.memmap


def measure_random_rows(channels: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Random batches of uint8 codes of `(197, channels)`: `FeatureStore.read_rows` and `np.memmap`, warm."""
    generator = np.random.default_rng(options.seed)
    width = TOKENS * channels
    codes = generator.integers(0, 256, (options.rows, width), np.uint8)
    codec = make_codec("int8", FeatureLayout((TOKENS, channels), None, 0, torch.float32))
    codec.load_tensors({"scale": torch.ones(channels), "offset": torch.zeros(channels)})
    parts = torch.from_numpy(codes).split(BUILD_BATCH)
    store = write_store(folder / f"rows-{channels}", codec, (({"base": part}, {}) for part in parts), {})
    flat = folder / f"rows-{channels}.bin"
    codes.tofile(flat)
    mapped = np.memmap(flat, np.uint8, "r", shape=codes.shape)

    everything = np.arange(options.rows)
    if not (np.array_equal(store.read_rows(everything)["base"].numpy(), codes) and np.array_equal(mapped, codes)):
        raise SystemExit("the store, the mapped file and the codes differ.")
    orders = {side: random_batches(options) for side in ("store", "memmap")}
    sides = {
        "store": lambda: store.read_rows(next(orders["store"])),
        "memmap": lambda: mapped[next(orders["memmap"])],
    }
    seconds = {side: summary(values) for side, values in interleave(sides, options.batches, warmup=10).items()}
    rate = {side: options.batch_size * width / value["median"] for side, value in seconds.items()}
    return {
        "row": [TOKENS, channels],
        "store_seconds_per_batch": seconds["store"],
        "memmap_seconds_per_batch": seconds["memmap"],
        "store_bytes_per_second": rate["store"],
        "memmap_bytes_per_second": rate["memmap"],
        "speed_ratio": rate["store"] / rate["memmap"],
    }


def random_batches(options: argparse.Namespace) -> Iterator[np.ndarray]:
    """Rows of random batches; the same ones for every caller."""
    generator = np.random.default_rng(options.seed)
    while True:
        yield generator.choice(options.rows, options.batch_size, replace=False)


# Against the hand-written way


#: What people give `Dataset.from_generator` as a row, fastest first.
HAND = {"arrays": np.asarray, "tensors": torch.from_numpy, "lists": np.ndarray.tolist}


def generate_rows(features_file: str, labels_file: str, kind: str) -> Iterator[dict[str, Any]]:
    """The features come from a file, so that hashing the generator's arguments costs nothing."""
    features = np.asarray(np.load(features_file, mmap_mode="c"))
    for feature, label in zip(features, np.load(labels_file).tolist(), strict=True):
        yield {"feature": HAND[kind](feature), "labels": label}


def write_by_hand(features_file: Path, labels_file: Path, kind: str, cache_dir: Path) -> datasets.Dataset:
    array = datasets.Array2D((TOKENS, 192), "float32")
    features = datasets.Features(feature=array, labels=datasets.Value("int64"))
    dataset = datasets.Dataset.from_generator(
        generate_rows,
        features=features,
        gen_kwargs={"features_file": str(features_file), "labels_file": str(labels_file), "kind": kind},
        cache_dir=str(cache_dir),
        keep_in_memory=False,
    )
    return dataset.with_format("torch")


def write_ours(features: torch.Tensor, labels: torch.Tensor, path: Path, codec_name: str) -> FeatureStore:
    """Fits, encodes and writes as a build does."""
    codec = make_codec(codec_name, FeatureLayout(tuple(features.shape[1:]), (14, 14), 1, torch.float32))
    parts = features.split(BUILD_BATCH)
    chosen = sorted({round(number) for number in np.linspace(0, len(parts) - 1, FIT_BATCHES)})
    sample = torch.cat([parts[number] for number in chosen])
    codec.fit(sample[:: fit_stride(len(sample), codec.layout)])
    batches = (
        (codec.encode(part), {"labels": part_labels})
        for part, part_labels in zip(parts, labels.split(BUILD_BATCH), strict=True)
    )
    return write_store(path, codec, batches, LABELS)


def measure_by_hand(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Writing, reading and size of features `(197, 192)` with their labels."""
    generator = torch.Generator().manual_seed(options.seed)
    features = torch.randn(options.hand_rows, TOKENS, 192, generator=generator)
    labels = torch.randint(CLASSES, (options.hand_rows,), generator=generator)
    features_file, labels_file = folder / "features.npy", folder / "labels.npy"
    np.save(features_file, features.numpy())
    np.save(labels_file, labels.numpy())
    numbers, written = itertools.count(), {}

    def by_hand(kind: str) -> None:
        target = folder / f"{kind}-{next(numbers)}"
        written["hand"] = write_by_hand(features_file, labels_file, kind, target)

    def ours() -> None:
        written["store"] = write_ours(features, labels, folder / f"store-{next(numbers)}", options.codec)

    sides = {"store": ours, **{kind: functools.partial(by_hand, kind) for kind in HAND}}
    writing = {side: summary(values) for side, values in interleave(sides, options.write_repeats).items()}
    store, hand = written["store"], written["hand"]
    hand_bytes = sum(Path(file["filename"]).stat().st_size for file in hand.cache_files)
    reading = measure_reading(store, hand, options)
    rows = {side: options.hand_rows / value["median"] for side, value in writing.items()}
    return {
        "row": [TOKENS, 192],
        "rows": options.hand_rows,
        "write_seconds": writing,
        "written_rows_per_second": rows,
        "read_seconds_per_batch": reading,
        "read_rows_per_second": {side: options.batch_size / value["median"] for side, value in reading.items()},
        "bytes": {"store": store.bytes, "hand": hand_bytes},
        "write_speedup": {kind: rows["store"] / rows[kind] for kind in HAND},
        "read_speedup": reading["hand"]["median"] / reading["store_decoded"]["median"],
        "read_speedup_in_a_loader": reading["hand_loader"]["median"] / reading["store_loader"]["median"],
        "read_speedup_without_decoding": reading["hand"]["median"] / reading["store_codes"]["median"],
        "times_smaller": hand_bytes / store.bytes,
    }


def measure_reading(store: FeatureStore, hand: datasets.Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Random batches of float features and labels: by index, and as a training's loader delivers them."""
    narrow = argparse.Namespace(**{**vars(options), "rows": options.hand_rows})
    orders = {side: random_batches(narrow) for side in ("decoded", "codes", "hand")}
    replayed, by_hand = endless_loader(replay_dataset(store), options), endless_loader(hand, options)

    def loaded() -> None:
        store.codec.decode(take_codes(next(replayed)).codes)

    sides = {
        "store_decoded": lambda: store.codec.decode(store.read_rows(next(orders["decoded"]))),
        "store_codes": lambda: store.read_rows(next(orders["codes"])),
        "hand": lambda: hand[next(orders["hand"])],
        "store_loader": loaded,
        "hand_loader": lambda: next(by_hand),
    }
    seconds = interleave(sides, options.hand_batches, warmup=5)
    return {side: summary(values) for side, values in seconds.items()}


def replay_dataset(store: FeatureStore) -> ReplayDataset:
    """The data set of a replay epoch."""
    switch = SourceSwitch(len(store))
    switch.set(store.path)
    return ReplayDataset(range(len(store)), switch, seed=0)


def endless_loader(dataset: Any, options: argparse.Namespace) -> Iterator[Any]:
    """Shuffled full batches for ever; torch's own collate for rows, `ReplayCollator` for a store's."""
    generator = torch.Generator().manual_seed(options.seed)
    collate = ReplayCollator(default_collate)
    loader = DataLoader(dataset, options.batch_size, True, collate_fn=collate, drop_last=True, generator=generator)
    if isinstance(dataset, ReplayDataset):
        stamp_rows(loader, dataset.switch)
        with dataset.switch.requesting():
            while True:
                yield from loader
    while True:
        yield from loader


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--codec", default="int4", help="codec of the store that is compared with the hand-written data set"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the store that is compared with np.memmap")
    parser.add_argument("--batches", type=int, default=400, help="timed batches of the store and of np.memmap")
    parser.add_argument("--hand_rows", type=int, default=4096)
    parser.add_argument("--hand_batches", type=int, default=100)
    parser.add_argument("--write_repeats", type=int, default=3)
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.batches, options.hand_rows = 512, 40, 256
        options.hand_batches, options.write_repeats = 10, 2
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    claims = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_rows = []
        for channels in (192, 768):
            result = measure_random_rows(channels, folder, options)
            random_rows.append(result)
            what = f"random rows of {TOKENS}x{channels}: speed / np.memmap"
            claims.append(Claim(what, result["speed_ratio"], at_least=0.8))
        by_hand = measure_by_hand(folder, options)
    claims += [
        *(
            Claim(f"written rows/s / by hand, rows given as {kind}", speedup, at_least=50)
            for kind, speedup in by_hand["write_speedup"].items()
        ),
        Claim("read rows/s, decoded / by hand", by_hand["read_speedup"], at_least=10),
        Claim("read rows/s in a DataLoader, decoded / by hand", by_hand["read_speedup_in_a_loader"], at_least=10),
        Claim("bytes by hand / bytes", by_hand["times_smaller"], at_least=7.5),
    ]
    print({side: round(rate) for side, rate in by_hand["written_rows_per_second"].items()}, "rows/s written")
    print({side: round(rate) for side, rate in by_hand["read_rows_per_second"].items()}, "rows/s read")
    settings = pick(options, "codec batch_size rows batches hand_rows hand_batches write_repeats")
    write_result("store", options, settings, {"random_rows": random_rows, "by_hand": by_hand}, claims)


if __name__ == "__main__":
    main()
