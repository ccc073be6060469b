"""Whether rows of a store are what the samples and the model give now; and if not, which row differs and in what."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np
import torch

from ..augment.geometry import PROJECTIVE
from ..cache.names import GEOMETRY, own_input, view_column
from ..cache.rows import is_same
from ..cache.store import FeatureStore
from .deepening import DEEPENED_FROM
from .feature_sources import ViewRun
from .row_columns import pick_rows

#: Rounding of a forward pass relative to the root mean square of its features, by the type in which it computes.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
#: Multiplications of float32 in a type of 10 bits (TF32), which GPUs do by default in convolutions.
_ROUNDING_TF32 = 2e-3
#: Times the expected deviation that is still taken for rounding.
_SLACK = 3.0
#: A store that was made from a coarse one: share of what distinguishes a sample from the mean that may be lost.
_DEEPENED = 0.5


@dataclass(frozen=True)
class Difference:
    """A row of a store that is not what the sample gives now.

    Args:
        sample: its number.
        view: number of the view, 0 for the base view.
        entry: what differs: `features`, `geometry`, or the name of a model input.
        detail: how much, as a clause.
    """

    sample: int
    view: int
    entry: str
    detail: str

    def __str__(self) -> str:
        view = f", view {self.view}," if self.view else ""
        what = self.entry if self.entry in ("features", GEOMETRY) else f"the model input '{self.entry}'"
        return f"sample {self.sample}{view} differs in {what}: {self.detail}"

    @property
    def likely_cause(self) -> str:
        """What has probably changed, as the end of a sentence."""
        if self.entry == "features":
            return (
                "its image or file, a file or value that the transform reads, the code of the transform or the "
                "model's forward, or weights that were changed in place"
            )
        if self.entry == GEOMETRY:
            return "the random transform or its random numbers"
        return f"what the data set, its transform or the collator makes of '{self.entry}'"


def compare_rows(
    store: FeatureStore,
    samples: Sequence[int],
    views: Sequence[int] | np.ndarray | int,
    view_run: ViewRun,
    rounding: float | None = None,
    left_out: Collection[str] = (),
) -> Difference | None:
    """Compares rows of a store with what the samples and the model give now.

    Features are encoded as a build would, and the codes compared. Where they differ, both are decoded: they may lie
    apart by what rounding in a forward pass explains, which moves some values to the next code. Model inputs must be
    equal, those with a fraction up to rounding. The features of a deepened store, which were computed from the decoded
    ones of another, must keep most of what distinguishes a sample.

    Args:
        store: complete, or being read.
        samples: row numbers `(B,)`.
        views: view of each sample, or of all; 0 is the base view.
        view_run: of the samples and views, as a build gets it from a `FeatureSource`. Features or geometry that are
            None are not compared.
        rounding: of a forward pass, relative to the root mean square of a feature; None: what its precision suggests.
        left_out: model inputs that are not compared.

    Returns:
        The first difference; None if there is none.

    Shapes: B samples.
    """
    numbers = np.broadcast_to(np.asarray(views, dtype=np.int64), (len(samples),))
    constants = store.manifest.constants
    if not _equal(view_run.constants, constants):
        detail = f"the collator's constants are {view_run.constants}, and {constants} in the store"
        return Difference(samples[0], int(numbers[0]), "constants", detail)
    for view in np.unique(numbers).tolist():
        positions = np.flatnonzero(numbers == view)
        rows = [int(samples[position]) for position in positions.tolist()]
        found = _compare_view(store, rows, view, pick_rows(view_run, positions), rounding, left_out)
        if found is not None:
            return found
    return None


def compare_settled(store: FeatureStore, samples: Sequence[int], draws: Sequence[ViewRun]) -> Difference | None:
    """Compares what no draw changes (labels, as a rule) in rows whose draws do not come again.

    Args:
        store: complete.
        samples: row numbers `(B,)`.
        draws: of the samples, two at least; what differs between them is not compared.

    Returns:
        The first difference; None if there is none.

    Shapes: B samples.
    """
    first = replace(draws[0], features=None, geometry=None)
    drawn = {
        name for draw in draws[1:] for name, value in draw.columns.items() if not is_same(value, first.columns[name])
    }
    views = range(store.manifest.views + 1)
    found = (compare_rows(store, samples, view, first, left_out=drawn) for view in views)
    return next((difference for difference in found if difference is not None), None)


def rounding_of(store: FeatureStore, device: torch.device | str = "cpu") -> float:
    """Rounding of the forward pass that filled a store, relative to the root mean square of its features.

    Args:
        store: its layout and its mixed precision count.
        device: on which the forward pass is repeated.
    """
    precision = str(store.manifest.made_from.get("precision", ""))
    roundings = [_ROUNDING[store.codec.layout.dtype]]
    names = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "torch.float16": torch.float16}
    roundings += [_ROUNDING[dtype] for name, dtype in names.items() if name in precision]
    if torch.device(device).type != "cpu":
        roundings.append(_ROUNDING_TF32)
    return max(roundings)


def _compare_view(
    store: FeatureStore,
    samples: list[int],
    view: int,
    view_run: ViewRun,
    rounding: float | None,
    left_out: Collection[str],
) -> Difference | None:
    for name, column in store.manifest.inputs.items():
        if name in left_out:
            continue
        stored_name = own_input(view, name) if view and store.manifest.own_inputs else name
        stored, live = store.read_input(stored_name, column, samples), view_run.columns.get(name)
        place, detail = _first_unequal(live, stored)
        if place is not None:
            return Difference(samples[place], view, name, detail)
    missing = sorted(view_run.columns.keys() - store.manifest.inputs.keys())
    if missing:
        return Difference(samples[0], view, missing[0], "the store does not hold it")
    if view and not store.views.spec.whole and view_run.geometry is not None:
        stored_geometry = store.read_codes([view_column(GEOMETRY, view)], samples)[view_column(GEOMETRY, view)]
        exact = store.views.spec.geometry != PROJECTIVE
        place, detail = _first_unequal(view_run.geometry.cpu(), stored_geometry, exact)
        if place is not None:
            return Difference(samples[place], view, GEOMETRY, detail)
    return _compare_features(store, samples, view, view_run, rounding)


def _compare_features(
    store: FeatureStore, samples: list[int], view: int, view_run: ViewRun, rounding: float | None
) -> Difference | None:
    if view_run.features is None or (view and not store.views.spec.needs_features(store.codec.layout)):
        return None
    rows, features = samples, view_run.need_features()
    samples = list(view_run.samples_of(rows))  # of texts, that of each token
    if tuple(features.shape[1:]) != store.codec.layout.shape or features.dtype != store.codec.layout.dtype:
        detail = f"they are {features.dtype} {tuple(features.shape[1:])} now"
        return Difference(samples[0], view, "features", detail)
    try:
        codes = store.views.encode_features(view, features, samples) if view else store.codec.encode(features, samples)
    except ValueError as error:  # not finite, or beyond the codec's range
        return Difference(samples[0], view, "features", str(error))
    stored = {name: value.to(features.device) for name, value in store.read_codes(list(codes), rows).items()}
    if all(torch.equal(codes[name], stored[name]) for name in codes):
        return None
    rounding = rounding_of(store, features.device) if rounding is None else rounding
    coarse = DEEPENED_FROM in store.manifest.made_from
    parts = store.views.parts(features) if view else {"": features}
    decode = store.views.decode_view if view else lambda rows, _: {"": store.codec.decode(rows)}
    now, before = decode(codes, view), decode(stored, view)
    for name, live in parts.items():
        off, allowed = _deviation(live, now[name], before[name], rounding, coarse)
        bad = ~(off <= allowed)
        if bad.any():
            place = int((off / allowed.clamp_min(1e-30)).nan_to_num(torch.inf).argmax())
            share = float(off[place] / _rms(live)[place].clamp_min(1e-30))
            detail = f"those of the store are off by {100 * share:.3g} % (root mean square)"
            return Difference(samples[place], view, "features", detail)
    return None


def _deviation(
    live: torch.Tensor, now: torch.Tensor, before: torch.Tensor, rounding: float, coarse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the stored features of each row are from those of now, and how far they may be: `(B,)` each.

    A codec with steps of s turns a deviation of r into steps for a share r / s of the values, so that the root mean
    square is sqrt(r * s).
    """
    expected = rounding * _rms(live)
    if coarse:
        values = live.float()
        distinct = values - values.mean(0) if len(values) > 1 else values
        return _rms(before.float() - values), _DEEPENED * _rms(distinct) + expected
    step = sqrt(12) * _rms(now.float() - live.float())
    return _rms(before.float() - now.float()), _SLACK * (expected + (expected * step).sqrt())


def _rms(values: torch.Tensor) -> torch.Tensor:
    return values.float().flatten(1).square().mean(1).sqrt()


def _first_unequal(live: Any, stored: Any, exact: bool = False) -> tuple[int | None, str]:
    """The first row in which two columns differ, and how; None if they are equal."""
    if not isinstance(live, torch.Tensor) or not isinstance(stored, torch.Tensor):
        if isinstance(live, torch.Tensor) or isinstance(stored, torch.Tensor) or live is None:
            return 0, f"it is {type(live).__name__} now and {type(stored).__name__} in the store"
        pairs = enumerate(zip(live, stored, strict=True))
        place = next((place for place, (one, other) in pairs if not _equal(one, other)), None)
        return place, "" if place is None else f"{live[place]!r} now, {stored[place]!r} in the store"
    if live.shape != stored.shape or live.dtype != stored.dtype:
        return 0, f"{live.dtype} {tuple(live.shape[1:])} now, {stored.dtype} {tuple(stored.shape[1:])} in the store"
    live = live.detach().cpu()
    if torch.equal(live, stored):
        return None, ""
    if live.is_floating_point() and not exact:
        same = torch.isclose(live.double(), stored.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
    else:
        same = live == stored
        if live.is_floating_point():
            same |= live.isnan() & stored.isnan()
    rows = ~same.reshape(len(same), -1).all(1)
    if not rows.any():
        return None, ""
    place = int(rows.int().argmax())
    return place, f"{_show(live[place])} now, {_show(stored[place])} in the store"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    return one == other or (one != one and other != other)


def _show(row: torch.Tensor) -> str:
    values = row.flatten()[:4].tolist()
    return str(values[0]) if row.ndim == 0 else f"{values}{'...' if row.numel() > 4 else ''}"
