"""The card of a predictor: how it was made, and how well it knows what has settled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

TRAINING, EVALUATION, CARD = "training.json", "evaluation.json", "README.md"
_TEMPLATE = "card.md.jinja"


def write_card(folder: Path) -> None:
    """Writes the card of a predictor from the files beside it.

    Args:
        folder: with `training.json`, and `evaluation.json` where it was evaluated.
    """
    template = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["share"] = _share
    training = _read(folder / TRAINING)
    networks: dict[str, dict[str, Any]] = {}
    for run in training["runs"]:
        entry = networks.setdefault(run["network"], {"data": run["data"], "runs": 0})
        entry["runs"] += 1
    text = environment.from_string(template).render(
        training=training, evaluation=_read(folder / EVALUATION), networks=networks
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _read(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
