"""What codecs do to the hidden states of texts, and whether some tokens or channels should be kept in more bits.

python -m benchmarks.text.codecs --threads 1
python -m benchmarks.text.codecs --tables_only          # of the result that is there
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from .._common import Claim, make_parser, pick, prepare, result_folder, write_json, write_result
from .._statistics import markdown_table
from .hidden_states import KINDS, Case, Vectors, make_cases
from .language_model import SETTINGS, add_language_model_options, language_model_folder
from .schemes import PLAIN, make_schemes, massive_channels
from .sources import add_text_options

#: Less is noise: answers that are the same to so many nats are the same.
_NOTHING = 1e-9


def measure_case(case: Case) -> dict[str, Any]:
    """Magnitudes, and every scheme by its name."""
    return {
        "magnitudes": magnitudes(case.test_vectors),
        "schemes": {name: measure_scheme(case, *scheme.run(case)) for name, scheme in make_schemes().items()},
    }


def measure_scheme(case: Case, decoded: torch.Tensor, bits: float) -> dict[str, float]:
    """How far the answers on decoded vectors are from those on the vectors themselves; means over answers."""
    answers = case.run_suffix(case.with_vectors(decoded))
    divergences, changes, agreements = [], [], []
    for expected, got, batch in zip(case.answers, answers, case.test, strict=True):
        divergences.append((expected.exp() * (expected - got)).sum(-1))
        targets = case.targets(batch)[:, None]
        changes.append((expected - got).gather(1, targets)[:, 0])
        agreements.append((expected.argmax(-1) == got.argmax(-1)).double())
    divergence, change = torch.cat(divergences), torch.cat(changes)
    return {
        "bits_per_value": bits,
        "kl": float(divergence.mean()),
        "kl_standard_error": float(divergence.std() / len(divergence) ** 0.5),
        "loss_change": float(change.mean()),
        "top1_agreement": float(torch.cat(agreements).mean()),
    }


def magnitudes(vectors: Vectors) -> dict[str, Any]:
    """How much larger some tokens and channels are than the others."""
    values = vectors.values
    largest_of_token, norms = values.abs().amax(1), values.square().mean(1).sqrt()
    by_kind = {}
    for number, kind in enumerate(KINDS):
        members = vectors.kinds == number
        if members.any():
            by_kind[kind] = {
                "tokens": int(members.sum()),
                "largest": float(largest_of_token[members].max()),
                "median_largest": float(largest_of_token[members].median()),
                "median_norm": float(norms[members].median()),
            }
    channels = values.square().mean(0)
    largest_of_channel = values.abs().amax(0)
    order = largest_of_channel.argsort(descending=True)[:4]
    z = (values - values.mean(0)) / values.std(0)
    return {
        "by_kind": by_kind,
        "median_absolute_value": float(values.abs().median()),
        "largest_channels": order.tolist(),
        "their_largest_value": largest_of_channel[order].tolist(),
        "median_channel_largest_value": float(largest_of_channel.median()),
        "share_of_squares_in_4_channels": float(channels.topk(4).values.sum() / channels.sum()),
        "norm_of_tokens_largest_over_median": float(norms.max() / norms.median()),
        "massive_channels": int(massive_channels(values).sum()),
        "share_of_values_beyond_6_sigma": float((z.abs() > 6).double().mean()),
    }


def gains(schemes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """KL of the plain codecs of the same family at a variant's bits, relative to the variant's: above 1 it gains.

    Between two plain codecs, the logarithm of the KL is taken as a line.
    """
    result = {}
    for name, scheme in schemes.items():
        family, comma, _ = name.partition(",")
        if comma:
            start = "mixed" if family.startswith("mixed") else "int"
            plain = sorted((schemes[c]["bits_per_value"], schemes[c]["kl"]) for c in PLAIN if c.startswith(start))
            result[name] = _at(plain, scheme["bits_per_value"]) / max(scheme["kl"], _NOTHING)
    return result


def _at(points: list[tuple[float, float]], bits: float) -> float:
    """The KL at some bits, on the line through the neighbouring points."""
    for (low, first), (high, second) in zip(points, points[1:], strict=False):
        if bits <= high:
            place = (bits - low) / (high - low)
            first, second = (math.log(max(value, _NOTHING)) for value in (first, second))
            return math.exp(first + place * (second - first))
    return points[-1][1]


def tables(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """Magnitudes, plain codecs and the gains of the variants, in Markdown."""
    lines = ["### Magnitudes", ""]
    header = "case | first: median norm | end | stop | other | largest value: first | end | stop | other"
    header += " | its channel / median channel | squares in 4 channels | beyond 6 sigma"
    rows = []
    for name, case in cases.items():
        sizes = case["magnitudes"]
        kinds = [sizes["by_kind"].get(kind) for kind in KINDS]
        row = [name, *(f"{kind['median_norm']:.2f}" if kind else "-" for kind in kinds)]
        row += [f"{kind['largest']:.1f}" if kind else "-" for kind in kinds]
        row.append(f"{sizes['their_largest_value'][0] / sizes['median_channel_largest_value']:.1f}")
        row.append(f"{sizes['share_of_squares_in_4_channels']:.0%}")
        rows.append([*row, f"{sizes['share_of_values_beyond_6_sigma']:.2%}"])
    lines += [*markdown_table(header, rows), "", "### Plain codecs: bits a value, KL in nats (change of the loss)", ""]
    header = "codec | bits | " + " | ".join(cases)
    rows = []
    for codec in PLAIN:
        points = [case["schemes"][codec] for case in cases.values()]
        cells = [f"{point['kl']:.1e} ({point['loss_change']:+.4f})" for point in points]
        rows.append([f"`{codec}`", f"{points[0]['bits_per_value']:.2f}", *cells])
    lines += [*markdown_table(header, rows), ""]
    lines += ["### Variants: KL of the plain codec at the same bits / KL of the variant", "", "Above 1 it gains.", ""]
    names = [name for name in next(iter(cases.values()))["schemes"] if "," in name]
    all_gains = {name: gains(case["schemes"]) for name, case in cases.items()}
    rows = []
    for name in names:
        bits = [case["schemes"][name]["bits_per_value"] for case in cases.values()]
        cells = [f"{all_gains[case][name]:.2f}" for case in cases]
        rows.append([name, f"{min(bits):.2f} to {max(bits):.2f}", *cells])
    lines += markdown_table("variant | bits | " + " | ".join(cases), rows)
    return "\n".join(lines) + "\n"


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add_text_options(parser)
    add_language_model_options(parser)
    parser.add_argument("--cuts", type=int, nargs="*", help="cuts (default: all)")
    parser.add_argument(
        "--fit_texts", type=int, default=256, help="training questions; half as many pieces of the LM's"
    )
    parser.add_argument(
        "--test_texts", type=int, default=192, help="test questions; a quarter as many pieces of the LM's"
    )
    parser.add_argument("--width_of_questions", type=int, default=32, help="longer questions are truncated")
    parser.add_argument("--fisher_batches", type=int, default=4)
    parser.add_argument("--fine_tuning_rows", type=int, default=4000)
    parser.add_argument("--fine_tuning_epochs", type=float, default=3)
    parser.add_argument("--fine_tuning_rate", type=float, default=5e-4)
    parser.add_argument(
        "--planted",
        type=float,
        default=0.0,
        help="plant activations of so many medians at the language model's first tokens, at its middle cut alone",
    )
    parser.add_argument("--tables_only", action="store_true", help="write the tables of the present result again")
    options = parser.parse_args(argv)
    if options.smoke:
        options.width, options.vocabulary, options.batch_size, options.cuts = 96, 400, 8, [2]
        options.fit_texts, options.test_texts, options.fisher_batches = 32, 32, 1
        options.fine_tuning_rows, options.fine_tuning_epochs = 64, 1
    return options


def make_claims(cases: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    return [Claim(f"{name}: KL of int8", case["schemes"]["int8"]["kl"], at_most=0.001) for name, case in cases.items()]


def main() -> None:
    options = parse_options()
    prepare(options)
    folder = result_folder("text", options.smoke)
    name = "planted" if options.planted else "codecs"
    if options.tables_only:
        cases = json.loads((folder / f"{name}.json").read_text())["results"]["cases"]
    else:
        cases = {}
        for case in make_cases(options):
            cases[case.name] = measure_case(case)
            write_json(folder / f"{name}_part.json", cases)
            print(f"{case.name} is measured", flush=True)
        (folder / f"{name}_part.json").unlink(missing_ok=True)
        names = (
            f"planted {SETTINGS} batch_size fit_texts test_texts width_of_questions fisher_batches fine_tuning_rows"
        )
        settings = pick(options, f"{names} fine_tuning_epochs fine_tuning_rate")
        trained = json.loads((language_model_folder(options) / "trained.json").read_text())
        content = {"cases": cases, "gains": {name: gains(case["schemes"]) for name, case in cases.items()}}
        write_result(
            "text", options, settings, {**content, "language_model": trained}, make_claims(cases), f"{name}.json"
        )
    (folder / f"{name}.md").write_text(tables(cases))
    print(tables(cases))


if __name__ == "__main__":
    main()
