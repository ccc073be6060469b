"""Settings that change no feature as a rule: probabilities of dropout, and what describes the classes of a head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig

_CLASSES = {0: "LABEL_0", 1: "LABEL_1"}
#: What the entries of a configuration, and attributes of modules, that describe the classes of a head are set to.
_LABELS: dict[str, Any] = {
    "id2label": _CLASSES,
    "label2id": {label: number for number, label in _CLASSES.items()},
    "num_classes": len(_CLASSES),
    "num_labels": len(_CLASSES),
    "problem_type": None,
}


@contextlib.contextmanager
def neutral_settings(model: nn.Module) -> Iterator[None]:
    """Inside, probabilities of dropout are 0 and heads have two classes, as configurations and attributes say it.

    No module is made anew: tensors and code stay as they are. Names alone do not tell what a module does with such a
    value, so this is no claim: `proving.is_neutral` tries whether the frozen blocks give the same features inside.
    Everything is put back on leaving the context.

    Args:
        model: the model.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for entries, module in _holders(model):
            for name, value in _neutral(entries, module).items():
                before.append((entries, name, entries[name]))
                entries[name] = value
        yield
    finally:
        for entries, name, value in before:
            entries[name] = value


def _holders(model: nn.Module) -> list[tuple[dict[str, Any], nn.Module | None]]:
    """The attributes of all modules, each with its module, and the entries of their configurations, with None."""
    configs: dict[int, dict[str, Any]] = {}

    def collect(value: Any) -> None:
        if isinstance(value, PretrainedConfig) and id(value) not in configs:
            configs[id(value)] = vars(value)
            for part in vars(value).values():
                collect(part)

    for module in model.modules():
        for value in vars(module).values():
            collect(value)
    return [
        *((vars(module), module) for module in model.modules()),
        *((entries, None) for entries in configs.values()),
    ]


def _neutral(entries: Mapping[str, Any], module: nn.Module | None) -> dict[str, Any]:
    """What attributes of a module, or entries of a configuration, are to be set to, by name."""
    found: dict[str, Any] = {}
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    for name, value in entries.items():
        if name in _LABELS and (module is None or type(value) is int):
            found[name] = _LABELS[name]
        elif "drop" in name or (is_dropout and name == "p"):
            is_probability = type(value) in (int, float) and 0 <= value <= 1
            if is_probability or (module is None and value is None):  # None: a head takes that of the other layers
                found[name] = 0.0
    return found
