"""What is random in the samples, and which views of them a store holds: settled before a store is built."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..augment.geometry import PROJECTIVE, decode_geometry
from ..augment.maps import check_grid
from ..augment.sensitivity import SENSITIVITY, SensitivityMeter
from ..cache.codec import make_codec
from ..cache.rows import RowError, RowSource, is_same
from ..cache.view_columns import ViewSpec
from ..distributed import Announcer
from ..model.inputs import ModelInputs
from ..model.layout import FeatureLayout
from ..model.modes import eval_mode
from ..rng import preserve_rng, seed_rng
from .company import why_not_by_row
from .errors import GeometryMisfit
from .materialize import check_geometry, spread
from .padded_samples import collator_pads, padded_split, what_is_read
from .several_sizes import rows_by_size
from .spread_rows import in_batches, spread_rows
from .store_spec import StoreSpec

logger = logging.get_logger(__name__)

#: Rows that are drawn, from all over the data set, and how many at a time.
_ROWS, _TOGETHER = 24, 8
#: Ranges whose rows are drawn where those from all over the data set cannot be collated together.
_RANGES = 3
#: Draws of each, and of the first ones, to see what is random.
_DRAWS, _MORE_DRAWS = 3, 8
#: How many of these draws ask for the geometry, and draws of the first rows' base view: a build finds what is refused
#: rarely.
_WITH_GEOMETRY, _BASE_DRAWS = 3, 4
#: Times that a batch is moved to the device, to see whether something random happens there.
_DRAWS_ON_DEVICE = 4
#: Share of the ranges that are drawn twice before a store is built, to see what is random rarely; and rows, at least.
_DRAWN_TWICE, _ROWS_TWICE = 0.01, 256
#: Share of the views' positions that may show nothing of the base view for warping it to be worth anything.
_MOST_OUTSIDE = 0.5


@dataclass(frozen=True)
class Augmentation:
    """What is random in the samples as the trainer gets them.

    Args:
        random: whether anything is.
        replayable: whether it can be replayed from the base view, by its geometry.
        why_not: why it cannot.
        own_inputs: whether model inputs besides the main one (labels) may be drawn too.
        declined: why nothing can be cached at all, as the end of a sentence; None if it can.
        padded: whether the collator pads samples to the longest of a batch, or each batch has a size of its own.
    """

    random: bool = False
    replayable: bool = False
    why_not: str | None = None
    own_inputs: bool = False
    declined: str | None = None
    padded: bool = False


#: What a random transform is that is not a `ReplayableTransform`.
OPAQUE = Augmentation(True, why_not="the random transform is not a `ReplayableTransform`", own_inputs=True)


def survey(source: RowSource, main_input: str) -> Augmentation:
    """Draws rows from all over the data set several times and compares the draws.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.

    Raises:
        ValueError: if the two pipelines of a `ReplayableTransform` do not fit each other.
    """
    if source.combined:
        return Augmentation(declined=source.combined)
    groups: list[Sequence[int]] = [spread_rows(source.dataset, _ROWS, source.seed)]
    if collator_pads(source, main_input) or (source.batch_size == 1 and rows_by_size(source, main_input)):
        return survey_padded(source, main_input, in_batches(groups[0], _TOGETHER))
    try:
        declined = why_not_by_row(source, groups[0], main_input)
        source.sizes = ()  # the collator puts them together
    except Exception as error:  # whatever a collator raises about samples that the training may never put together
        if rows_by_size(source, main_input):
            return survey_padded(source, main_input, in_batches(groups[0], _TOGETHER))
        Announcer.survived(logger, "Samples from all over the data set cannot be collated together", error)
        groups = [source.rows(number)[:_TOGETHER] for number in spread(source.num_ranges, _RANGES)]
        reasons = (why_not_by_row(source, rows, main_input) for rows in groups)
        declined = next((reason for reason in reasons if reason is not None), None)
    if declined is not None:
        return Augmentation(declined=declined)
    batches = [batch for rows in groups for batch in in_batches(rows, min(_TOGETHER, len(rows)))]
    looks = [_Look(source, batch, _DRAWS if place else _MORE_DRAWS) for place, batch in enumerate(batches)]
    base, view = looks[0].base.batch, looks[0].views[0].batch
    differ = any(look.differ for look in looks)
    drawn = [view for look in looks for view in look.views]
    refused = next((view.refused for view in drawn if view.refused is not None), None)
    if refused is None and drawn[0].geometry is None:
        return OPAQUE if differ or any(look.differs_from_base for look in looks) else Augmentation()
    _check_pipelines(base[main_input], view[main_input], differ)
    if any(look.base_is_random(1 if place else _BASE_DRAWS) for place, look in enumerate(looks)):
        return Augmentation(True, why_not="the data collator is random, or not only the transform", own_inputs=True)
    if not differ:
        return Augmentation()
    if any(look.changes_others(main_input) for look in looks):
        return Augmentation(True, why_not=f"not only '{main_input}' changes with the view", own_inputs=True)
    return Augmentation(True, refused is None, refused)


def survey_padded(source: RowSource, main_input: str, groups: Sequence[Sequence[int]]) -> Augmentation:
    """As `survey`, of samples that are collated in every epoch: labels may be random, what is stored may not.

    Args:
        source: the samples.
        main_input: name of the model's main input in a batch.
        groups: rows from all over the data set, each as many as are collated together.
    """
    try:
        source, split = padded_split(source, main_input)
        for rows in groups:
            draws = [split(source.draw(rows, view).batch).columns for view in range(_MORE_DRAWS)]
            if any(not is_same(draws[0], draw) for draw in draws[1:]):
                what = f"{what_is_read(source)}, or what the frozen blocks read beside them, are drawn at random"
                why = "(by the transform or the collator), so that their features are others in every epoch"
                return Augmentation(declined=f"{what} {why}")
        return Augmentation(declined=why_not_by_row(source, groups[0], main_input, split), padded=True)
    except RowError as error:
        return Augmentation(declined=str(error).rstrip("."), padded=True)


def tells_geometry(source: RowSource) -> bool:
    """Whether a `ReplayableTransform` draws the first samples."""
    rows = range(min(2, len(source))) if source.probe_rows is None else source.probe_rows[: source.batch_size]
    drawn = source.draw(rows, 1, (PROJECTIVE, (1, 1)))
    return drawn.geometry is not None or drawn.refused is not None


def look_closer(source: RowSource, padded_input: str | None = None) -> Augmentation | None:
    """Draws some ranges twice, in the loader's processes: what is random in one of hundreds of samples shows there.

    Args:
        source: samples in which `survey` has found nothing random.
        padded_input: name of the model's main input, where the collator pads it to the longest of a batch; else None.

    Returns:
        What was found; None if nothing was.
    """
    split = None
    if padded_input is not None:
        source, split = padded_split(source, padded_input)
    count = _looked_at_twice(source)
    numbers = np.random.default_rng(source.seed).choice(source.num_ranges, count, replace=False)
    for number, (first, second) in source.loader(sorted(numbers.tolist()), views=1):
        if split is not None:
            one, other = (split(drawn.batch).columns for drawn in (first, second))
            if not is_same(one, other):
                raise RowError(f"{what_is_read(source)} from sample {source.rows(number)[0]} on are drawn at random.")
        elif not is_same(first.batch, second.batch):
            return OPAQUE
    return None


def _looked_at_twice(source: RowSource) -> int:
    fewest = min(source.num_ranges, -(-_ROWS_TWICE // source.batch_size))
    return max(fewest, round(_DRAWN_TWICE * source.num_ranges))


def ranges_drawn(source: RowSource, closer: bool) -> float:
    """How many ranges of samples are drawn to see what is random: about, as it depends on what is found.

    Args:
        source: the samples.
        closer: by `look_closer`, not by `survey`.
    """
    if closer:
        return 2.0 * _looked_at_twice(source)
    draws = (2 + _MORE_DRAWS) * _TOGETHER + (2 + _DRAWS) * (_ROWS - _TOGETHER)
    return draws / source.batch_size


def why_random_on_device(model_inputs: ModelInputs, batch: Mapping[str, Any]) -> str | None:
    """Why the prefix's inputs of a training step are not those of the collated batch; None if they are.

    Args:
        model_inputs: moves a batch to the model's device, by the trainer's `_prepare_inputs`.
        batch: as the collator returned it.

    Returns:
        The reason, as the end of a sentence.
    """
    draws = []
    with preserve_rng(), eval_mode(model_inputs.model):
        model_inputs.model.train()
        for seed in range(_DRAWS_ON_DEVICE):
            seed_rng("device", seed)
            draws.append(model_inputs(copy.deepcopy(dict(batch))))
    if all(is_same(dict(draws[0]), dict(draw)) for draw in draws[1:]):
        return None
    return (
        "`_prepare_inputs` augments batches on the device, where a store would hold one draw for ever; augment in the "
        "data set's transform"
    )


class _Look:
    """A few rows, drawn several times.

    Args:
        source: the samples.
        rows: their numbers.
        draws: number of draws beside the one of the base view.
    """

    def __init__(self, source: RowSource, rows: Sequence[int], draws: int):
        self.source, self.rows = source, rows
        self.base = source.draw(rows)
        geometries = [(PROJECTIVE, (1, 1)) if draw < _WITH_GEOMETRY else None for draw in range(draws)]
        self.views = [source.draw(rows, view, geometry) for view, geometry in enumerate(geometries, start=1)]

    @property
    def differ(self) -> bool:
        """Whether the draws differ."""
        return any(not is_same(self.views[0].batch, view.batch) for view in self.views[1:])

    @property
    def differs_from_base(self) -> bool:
        """Whether a draw differs from that of the base view."""
        return not is_same(self.base.batch, self.views[0].batch)

    def base_is_random(self, times: int) -> bool:
        """Whether the base view differs when it is drawn again, so many times."""
        again = (self.source.draw(self.rows, again=number) for number in range(1, times + 1))
        return any(not is_same(self.base.batch, drawn.batch) for drawn in again)

    def changes_others(self, main_input: str) -> bool:
        """Whether entries besides the main input change with the view."""
        base = _others(self.base.batch, main_input)
        return any(not is_same(base, _others(view.batch, main_input)) for view in self.views)


def _others(batch: Mapping[str, Any], main_input: str) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != main_input}


def _check_pipelines(base: torch.Tensor, view: torch.Tensor, random: bool) -> None:
    if base.shape != view.shape:
        raise ValueError(
            f"ReplayableTransform: `base` returns images {tuple(base.shape[1:])} and `train` {tuple(view.shape[1:])}: "
            "give both the same size, e.g. v2.CenterCrop(224) beside v2.RandomResizedCrop(224)."
        )
    if not random and not torch.equal(base, view):
        raise ValueError(
            "ReplayableTransform: `train` draws nothing at random and differs from `base`, which replay epochs would "
            "show in its place: give the same pipeline twice."
        )


def make_view_spec(augmentation: Augmentation, layout: FeatureLayout, views: int, sensitive_channels: int) -> ViewSpec:
    """What a store will hold of the views, before the sensitive channels are known: the first ones take their place.

    Args:
        augmentation: what `survey` returned.
        layout: of the features.
        views: augmented views wanted.
        sensitive_channels: number of channels to store of each view.
    """
    if not augmentation.random or not views:
        return ViewSpec()
    if not augmentation.replayable or layout.grid is None or sensitive_channels == layout.channels:
        return ViewSpec(views, own_inputs=augmentation.own_inputs)
    return ViewSpec(views, PROJECTIVE, torch.arange(sensitive_channels), torch.zeros(layout.channels))


def count_sensitive(
    codec: str, layout: FeatureLayout, rows: int, views: int, fraction: float, limit: int | None
) -> int:
    """How many channels to store of every view.

    Args:
        codec: name of the codec.
        layout: of the features.
        rows: samples.
        views: augmented views.
        fraction: of the channels (the paper's gamma), where there is no limit.
        limit: bytes that the sensitive channels of all views of all samples may take; special tokens and geometry
            come on top.
    """
    if limit is None:
        return round(fraction * layout.channels)
    whole = make_codec(codec, layout)
    row_bytes = {count: whole.narrowed(torch.arange(count)).row_bytes for count in range(1, layout.channels + 1)}
    return max((count for count, size in row_bytes.items() if rows * views * size <= limit), default=0)


def choose_channels(spec: StoreSpec, similarity: str, batches: int, channel_map: bool) -> StoreSpec:
    """Measures which channels do not follow the augmentation, and completes the spec with them.

    Args:
        spec: whose `views` say how many channels are wanted.
        similarity: how the true features of a view and the warped ones of its base view are compared.
        batches: ranges of samples, drawn from the seed, that are compared at most.
        channel_map: whether to fit how the other channels follow from all of them.

    Raises:
        GeometryMisfit: if a view's geometry cannot be stored as the spec says.
    """
    if spec.views.whole:
        return spec
    meter = measure_sensitivity(spec, similarity, batches)
    sensitivity = meter.result()
    channels = sensitivity.choose(len(spec.views.warped.channels))
    maps, limits = (meter.channel_maps(channels) if channel_map else None) or (None, None)
    views = replace(
        spec.views,
        channels=channels,
        outside=sensitivity.outside.to(torch.float32),
        channel_maps=maps,
        limits=limits,
    )
    return replace(spec, views=views, notes={**spec.notes, SENSITIVITY: sensitivity.tensors()})


def measure_sensitivity(spec: StoreSpec, similarity: str, batches: int) -> SensitivityMeter:
    """Compares the channels over a sample of the data; see `choose_channels`."""
    source, kind, grid = spec.source, spec.views.warped.geometry, check_grid(spec.layout)
    count = min(batches, source.num_ranges)
    numbers = np.random.default_rng(source.seed).choice(source.num_ranges, count, replace=False)
    meter = SensitivityMeter(spec.layout, similarity)
    for number, (base, view) in spec.feature_source.run(sorted(numbers.tolist()), views=1, geometry=kind):
        rows = source.rows(number)
        check_geometry([view], rows)
        features = base.need_features()
        sources = decode_geometry(view.need_geometry().to(features.device), kind, grid)
        meter.update(features, view.need_features(), sources, rows)
    if meter.outside_share > _MOST_OUTSIDE:
        raise GeometryMisfit(
            f"{100 * meter.outside_share:.0f} % of what views show is not in their base view; a base pipeline that "
            "shows more of an image, such as v2.Resize((height, width)), would do better",
            for_all_kinds=True,
        )
    return meter
