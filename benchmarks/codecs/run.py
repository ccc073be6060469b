"""Rate and distortion of the codecs on real features, and their speed.

python -m benchmarks.codecs.run --threads 1
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from hf_freezecache import make_codec
from hf_freezecache.cache.codec import Codec, check_codec_name
from hf_freezecache.cache.shards import ShardWriter
from hf_freezecache.cache.view_columns import ViewColumns, ViewSpec

from .._common import Claim, interleave, make_parser, prepare, result_folder, summary, write_result
from .models import CUTS, Case, make_cases, run_suffix
from .tables import plot, table

CODECS = "fp16 int8 int4 int3 int2 mixed@8 mixed@4 mixed@3 mixed@2.5 mixed@2 zfp@8 zfp@4 zfp@3 zfp@2".split()
ZFP_RATES = (2, 4, 8)


def measure_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All codecs on one model at one cut, by their names."""
    codecs = {name: fit_codec(name, case) for name in options.codecs}
    results = {name: measure_distortion(codec, case, options) for name, codec in codecs.items()}
    part = case.test[: options.timed_images]
    rows = {name: codec.encode(part) for name, codec in codecs.items()}
    encoding = {name: functools.partial(codec.encode, part) for name, codec in codecs.items()}
    decoding = {name: functools.partial(codec.decode, rows[name]) for name, codec in codecs.items()}
    for what, sides in (("encode", encoding), ("decode", decoding)):
        for name, seconds in interleave(sides, options.repeats).items():
            taken = summary(seconds)
            results[name][f"{what}_seconds"] = taken
            results[name][f"{what}_mb_per_second"] = part.nbytes / 1e6 / taken["median"]
    for name, stored in rows.items():
        results[name]["zstd_saves"] = zstd_saves(stored)
    return results


def fit_codec(name: str, case: Case) -> Codec:
    codec = make_codec(name, case.layout)
    return codec.fit(case.fit, weights=case.weights if codec.uses_weights else None)


def measure_distortion(codec: Codec, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Bits of the Arrow file, and how far the logits of decoded features are from those of the features."""
    rows = [codec.encode(batch) for batch in case.test.split(options.batch_size)]
    decoded = torch.cat([codec.decode(batch) for batch in rows])
    expected = case.log_probabilities
    found = run_suffix(case.chain, decoded, case.cut, options)
    divergence = (expected.exp() * (expected - found)).sum(dim=1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [arrow_bytes(Path(folder) / "rows.arrow", codec, batches) for batches in ([], rows)]
    values = len(case.test) * case.layout.values
    return {
        "bits_per_value": 8 * (sizes[1] - sizes[0]) / values,
        "kl": float(divergence.mean()),
        "kl_standard_error": float(divergence.std() / len(divergence) ** 0.5),
        "kl_median": float(divergence.median()),
        "top1_agreement": float((expected.argmax(1) == found.argmax(1)).double().mean()),
        "mean_squared_error": float((decoded - case.test).double().square().mean()),
    }


def arrow_bytes(path: Path, codec: Codec, batches: list[dict[str, torch.Tensor]]) -> int:
    """Size of the Arrow file of a store with these rows, and nothing else but their numbers."""
    first = 0
    with ShardWriter(path, codec, ViewColumns(ViewSpec(), codec), {}) as writer:
        for batch in batches:
            writer.write(first, batch, {})
            first += len(batch["base"])
    return path.stat().st_size


def zstd_saves(rows: dict[str, torch.Tensor]) -> float:
    """Share of a batch's codes that Arrow's zstd takes away."""
    buffers = [value.contiguous().numpy().tobytes() for value in rows.values()]
    packed = sum(pa.Codec("zstd").compress(buffer).size for buffer in buffers)
    return 1 - packed / sum(map(len, buffers))


def measure_step(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Decoding int4 beside the training step of the suffix that it feeds."""
    batch = case.test[: options.batch_size]
    codec = fit_codec("int4", case)
    rows = codec.encode(batch)
    labels = torch.arange(len(batch))
    model = case.chain.model

    def step() -> None:
        with case.chain.replay(case.cut):
            model(pixel_values=batch, labels=labels)["loss"].backward()
        model.zero_grad()

    case.chain.freeze(case.cut)
    seconds = {"step": interleave({"step": step}, options.steps)["step"]}
    # On its own, so that the step's memory is not in the way of the cache: in training, both are.
    case.chain.unfreeze()
    seconds["decode"] = interleave({"decode": lambda: codec.decode(rows)}, options.repeats * 3)["decode"]
    medians = {name: summary(values) for name, values in seconds.items()}
    return {**medians, "share": medians["decode"]["median"] / medians["step"]["median"]}


# Claims


def make_claims(results: dict[str, dict[str, Any]], steps: dict[str, Any]) -> list[Claim]:
    claims = []
    for name, case in results.items():
        deit = name.startswith("deit")
        if deit:
            claims.append(Claim(f"{name}: KL of int4", case["int4"]["kl"], at_most=0.005))
            ratio = case["mixed@2.5"]["kl"] / case["int2"]["kl"]
            claims.append(Claim(f"{name}: KL of mixed@2.5 / int2", ratio, at_most=0.5))
            bits = case["mixed@2.5"]["bits_per_value"]
            claims.append(Claim(f"{name}: bits of mixed@2.5", bits, at_most=2.6))
        time = case["int4"]["decode_seconds"]["median"] / case["int8"]["decode_seconds"]["median"]
        claims.append(Claim(f"{name}: decoding int4 / int8, time", time, at_most=2))
        for rate in ZFP_RATES:
            speed = best_against_zfp(case, f"zfp@{rate}")
            what = f"{name}: decoding speed / zfp@{rate}, of the fastest with lower KL at no more bits"
            claims.append(Claim(what, speed["speed"], at_least=10))
    for name, step in steps.items():
        claims.append(Claim(f"{name}: decoding int4 / training step, time", step["share"], at_most=0.02))
    return claims


def best_against_zfp(case: dict[str, Any], zfp: str) -> dict[str, Any]:
    """The fastest codec that is better than ZFP in both bits and KL; speed 0 if there is none."""
    theirs = case[zfp]
    best = {"codec": None, "speed": 0.0}
    for name, ours in case.items():
        if check_codec_name(name)[0] == "zfp" or ours["bits_per_value"] > theirs["bits_per_value"]:
            continue
        speed = ours["decode_mb_per_second"] / theirs["decode_mb_per_second"]
        if ours["kl"] < theirs["kl"] and speed > best["speed"]:
            best = {"codec": name, "speed": speed}
    return best


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    parser.add_argument("--fit_images", type=int, default=192)
    parser.add_argument("--fisher_images", type=int, default=96)
    parser.add_argument("--test_images", type=int, default=256, help="of Caltech-101")
    parser.add_argument("--cifar_images", type=int, default=1000)
    parser.add_argument("--timed_images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    options = parser.parse_args(argv)
    if options.smoke:
        options.fit_images, options.fisher_images, options.test_images, options.cifar_images = 16, 8, 8, 16
        options.timed_images, options.repeats, options.steps, options.batch_size = 4, 2, 1, 8
    return options


def main() -> None:
    options = parse_options()
    prepare(options)
    results, steps = {}, {}
    for case in make_cases(options):
        results[case.name] = measure_case(case, options)
        if case.model == "deit":
            steps[case.name] = measure_step(case, options)
        print(table(case.name, results[case.name]), flush=True)
    names = "codecs fit_images fisher_images test_images cifar_images timed_images repeats steps batch_size".split()
    settings = {**{name: getattr(options, name) for name in names}, "cuts": CUTS}
    against = {
        name: {f"zfp@{rate}": best_against_zfp(case, f"zfp@{rate}") for rate in ZFP_RATES}
        for name, case in results.items()
    }
    folder = result_folder("codecs", options.smoke)
    plot(results, folder / "codecs.png")
    content = {"cases": results, "best_against_zfp": against, "int4_beside_a_training_step": steps}
    write_result("codecs", options, settings, content, make_claims(results, steps))


if __name__ == "__main__":
    main()
