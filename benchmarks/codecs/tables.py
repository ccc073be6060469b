"""What a person reads of the codecs' results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(title: str, case: Mapping[str, Any]) -> str:
    """One model at one cut as a table in Markdown."""
    lines = [f"### {title}", "", "| codec | bits a value | KL | top-1 | encode MB/s | decode MB/s | zstd saves |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, result in case.items():
        lines.append(
            f"| `{name}` | {result['bits_per_value']:.3f} | {result['kl']:.2e} | {result['top1_agreement']:.1%} "
            f"| {result['encode_mb_per_second']:,.0f} | {result['decode_mb_per_second']:,.0f} "
            f"| {result['zstd_saves']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """KL of the logits against bits a value: uniform, mixed and ZFP."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), squeeze=False)
    for axis, (title, case) in zip(axes.flat, results.items(), strict=False):
        for family, marker in (("int", "o"), ("mixed", "s"), ("zfp", "^")):
            points = sorted((r["bits_per_value"], r["kl"]) for name, r in case.items() if name.startswith(family))
            axis.plot(*zip(*points, strict=True), marker=marker, label={"int": "int2, 3, 4, 8"}.get(family, family))
        axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("bits a value, in the Arrow file")
        axis.set_ylabel("KL of the logits (nats)")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
