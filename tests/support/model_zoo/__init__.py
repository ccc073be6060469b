"""One zoo of tiny models over every classification family of Transformers, and families of timm and torchvision.

`ENTRIES` has them by name; `UNAVAILABLE` says which classes have no tiny model, and why.
"""

from __future__ import annotations

from . import timm_models, torchvision_models, transformers_models
from .entry import Entry, randomize
from .inputs import inputs

_LIBRARIES = (transformers_models, timm_models, torchvision_models)
#: Name -> entry.
ENTRIES: dict[str, Entry] = {entry.name: entry for library in _LIBRARIES for entry in library.entries()}
#: Class -> why the zoo has no tiny model of it.
UNAVAILABLE: dict[str, str] = dict(transformers_models.UNAVAILABLE)

__all__ = ["ENTRIES", "UNAVAILABLE", "Entry", "inputs", "randomize"]
