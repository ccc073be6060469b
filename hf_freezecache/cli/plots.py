"""Pictures for people; matplotlib comes with the extra `recipes`."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..augment.sensitivity import Sensitivity
from ..reporting.charts import make_figure

_CHOSEN, _FOLLOWS, _EMPTY = "#d95f02", "#5b7fa6", "#c8c8c8"
_COLUMNS = ("base view", "augmented view", "base, warped", "|difference|")
_MOST_SAMPLES = 2


def plot_sensitivity(sensitivity: Sensitivity, channels: torch.Tensor, path: str | os.PathLike, title: str) -> None:
    """Draws how well the channels follow the augmentation, and some channels' maps.

    Above, the similarity of all channels, the stored ones in another colour. Below, channels from the least to the
    most similar, for up to two samples: the feature of the base view, the true one of the augmented view, the base
    view's after warping, and how far the last two differ. Maps of one channel and sample share one scale.

    Args:
        sensitivity: what was measured.
        channels: int64, the channels that are stored for every view.
        path: of the PNG; its folder exists.
        title: of the picture.

    Raises:
        ImportError: without matplotlib.
    """
    figure = make_figure(11, 3.6)
    shown = sensitivity.previews["channels"].tolist()
    samples = min(_MOST_SAMPLES, len(sensitivity.previews["sample_ids"]))
    # 1.25 inches a map, the curve above, room for the channels' names on the left.
    maps_height = 1.25 * len(shown) + 0.6 if samples else 0.0
    figure.set_size_inches(11, 3.6 + maps_height)
    figure.suptitle(title, fontsize=13)
    if samples:
        (curve,), (maps,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.1, maps_height], hspace=0.03)
        _draw_maps(maps, sensitivity, set(channels.tolist()), samples)
    else:
        curve = figure
    _draw_curve(curve.subplots(), sensitivity, channels)
    figure.savefig(path, dpi=130)


def _draw_curve(axes: Any, sensitivity: Sensitivity, channels: torch.Tensor) -> None:
    order = sensitivity.ranking()
    similarity = sensitivity.similarity[order]
    stored = torch.isin(order, channels.cpu())
    ranks = torch.arange(len(order))
    kinds = (
        (stored, _CHOSEN, f"stored for every view: {int(stored.sum())} of {len(order)} channels"),
        (~stored, _FOLLOWS, "warped from the base view"),
    )
    for rows, colour, label in kinds:
        axes.bar(ranks[rows].numpy(), similarity[rows].numpy(), width=1.0, color=colour)
        # Bars of their own for the legend: there may be no channel of this kind.
        axes.bar(0, 0, color=colour, label=label)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlim=(-0.6, len(order) - 0.4), ylim=(min(0.0, float(similarity.min())) - 0.02, 1.05))
    axes.set_xlabel("channels, from the least to the most similar")
    axes.set_ylabel(f"similarity\n(mean of {sensitivity.samples} views)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)
    # Above the axes: channels may all reach 1, so no corner inside is always free.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)


def _draw_maps(figure: Any, sensitivity: Sensitivity, stored: set[int], samples: int) -> None:
    names = sensitivity.previews["sample_ids"].tolist()
    figure.supxlabel(
        "Below each channel its similarity. One scale per channel and sample; grey: nothing of the base view shown.",
        fontsize=9,
    )
    groups = figure.subfigures(1, samples, wspace=0.02, squeeze=False)[0]
    for sample, group in enumerate(groups):
        group.suptitle(f"sample {names[sample]}", fontsize=11)
        grid = group.subplots(len(sensitivity.previews["channels"]), len(_COLUMNS), squeeze=False)
        for column, name in enumerate(_COLUMNS):
            grid[0][column].set_title(name, fontsize=9)
        for row, channel in enumerate(sensitivity.previews["channels"].tolist()):
            _draw_row(grid[row], sensitivity, sample, row)
            # Plus zero: no "-0.00".
            text = f"channel {channel}\n{round(float(sensitivity.similarity[channel]), 2) + 0:.2f}"
            colour = _CHOSEN if channel in stored else _FOLLOWS
            grid[row][0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9, color=colour)


def _draw_row(axes: Any, sensitivity: Sensitivity, sample: int, row: int) -> None:
    base, view, warped = (sensitivity.previews[name][sample, row].float() for name in ("base", "view", "warped"))
    low, high = float(min(base.min(), view.min())), float(max(base.max(), view.max()))
    for place, values in enumerate((base, view, warped)):
        axes[place].imshow(values.numpy(), vmin=low, vmax=high, cmap="viridis")
    axes[3].imshow((view - warped).abs().numpy(), vmin=0, vmax=high - low, cmap="magma")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        # Where the view shows nothing of the base view there is nothing to draw.
        axis.set_facecolor(_EMPTY)
