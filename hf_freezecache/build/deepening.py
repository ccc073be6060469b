"""A store at a deeper cut, made from a store before it: only the blocks in between run, on the features it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..augment.geometry import DENSE
from ..cache.fingerprint import config_digest, tensors_digest
from ..cache.manifest import StoreError
from ..cache.rows import RowSource, split_batch
from ..cache.store import FeatureStore
from ..model.chain import BlockChain
from ..model.layout import FeatureLayout
from ..replay.decode import replay_features
from .feature_sources import ViewRun
from .store_spec import StoreSpec

#: Entry of a fingerprint's inputs: the fingerprint of the store that a deeper one was made from.
DEEPENED_FROM = "deepened_from"

#: What two stores of the same samples and the same training share, in words.
_SHARED = {
    "dataset": "the data set",
    "collator": "the data collator",
    "rows": "the number of samples",
    "model": "the model's class",
    "precision": "mixed precision",
    "seed": "the seed",
    "batch_size": "the batch size of builds",
}


class StoreFeatures:
    """Runs the blocks between two cuts on a store's features, decoded and replayed as training gets them.

    The codec's error of the store goes through the blocks in between and adds to the new one's. Augmented views are
    replayed too: where the store holds only sensitive channels, the others are the base view's, warped.

    Args:
        chain: the model, traced and proved at `cut`.
        cut: frozen blocks of the new store.
        source: the samples; only their ranges count.
        layout: the feature at `cut`.
        store: at an earlier cut.
        model_inputs: selects the prefix's inputs from a batch whose main input is the feature, on `device`.
        device: the device of the model.
        count_run: is told `(store's cut, cut, samples)` after every run; every view of a sample counts.
    """

    def __init__(
        self,
        chain: BlockChain,
        cut: int,
        source: RowSource,
        layout: FeatureLayout,
        store: FeatureStore,
        model_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        device: torch.device | str = "cpu",
        count_run: Callable[[int, int, int], None] | None = None,
    ):
        self.chain, self.cut, self.source, self.layout, self.store = chain, cut, source, layout, store
        self.model_inputs, self.device, self.count_run = model_inputs, device, count_run

    def over(self, source: RowSource) -> StoreFeatures:
        return StoreFeatures(
            self.chain, self.cut, source, self.layout, self.store, self.model_inputs, self.device, self.count_run
        )

    def run(
        self, numbers: Sequence[int], views: int = 0, geometry: str | None = None, own_features: bool = True
    ) -> Iterator[tuple[int, list[ViewRun]]]:
        """As `FeatureSource.run`.

        Raises:
            ValueError: if the store does not hold so many views, or their geometry in another kind;
                `why_not_deepen` tells before.
        """
        stored = self.store.views.spec
        if views > stored.count or geometry not in (None, stored.geometry):
            raise ValueError(
                f"{self.store.path} holds {stored.count} views with {stored.geometry} geometry; "
                f"{views} with {geometry} geometry were asked for. Build from samples instead."
            )
        for number in numbers:
            rows = self.source.rows(number)
            yield number, [self._run_view(rows, view, geometry, own_features) for view in range(views + 1)]

    def _run_view(self, rows: Sequence[int], view: int, geometry: str | None, own_features: bool) -> ViewRun:
        manifest = self.store.manifest
        batch = self.store.read_rows(rows, np.full(len(rows), view) if view else None)
        codes = {name: batch[name] for name in self.store.code_names(batch)}
        columns = {name: batch[name] for name in manifest.inputs}
        constants = dict(manifest.constants)
        features = None
        if view == 0 or own_features:
            features = self._advance(codes, {**columns, **constants})
        return ViewRun(columns, constants, features, codes["geometry"] if view and geometry is not None else None)

    def _advance(self, codes: Mapping[str, torch.Tensor], others: Mapping[str, Any]) -> torch.Tensor:
        features = replay_features(self.store, {name: value.to(self.device) for name, value in codes.items()})
        if self.count_run is not None:
            self.count_run(self.store.manifest.cut, self.cut, len(features))
        inputs = self.model_inputs({**others, self.chain.main_input: features})
        return self.chain.advance(inputs, self.store.manifest.cut, self.cut)


def deepened(
    spec: StoreSpec,
    store: FeatureStore,
    model_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    device: torch.device | str = "cpu",
    count_run: Callable[[int, int, int], None] | None = None,
) -> StoreSpec:
    """The spec with a store in place of the samples; for a store that `why_not_deepen` has nothing against.

    Its fingerprint is another one: features made from coarse features are never taken for features made from samples.
    The geometry has the store's kind, which fits every view. If a build finds that it does not, by a
    `GeometryMisfit`, build from samples.

    Args:
        spec: for samples.
        store: at a cut before the spec's.
        model_inputs, device, count_run: see `StoreFeatures`.
    """
    features = StoreFeatures(spec.chain, spec.cut, spec.source, spec.layout, store, model_inputs, device, count_run)
    views = spec.views
    if not views.whole:
        views = replace(views, geometry=store.views.spec.geometry)
    made_from = {**spec.made_from, DEEPENED_FROM: store.manifest.fingerprint}
    return replace(spec, feature_source=features, views=views, made_from=made_from)


def why_not_deepen(store: FeatureStore, spec: StoreSpec) -> str | None:
    """Why a planned store cannot be made from another one; None if it can.

    Reads the whole store last: damage must not get into a store with valid checksums.

    Args:
        store: complete.
        spec: for samples.

    Returns:
        The reason, as the end of a sentence that begins with what is not done.
    """
    manifest, chain = store.manifest, spec.chain
    cut, made_from = manifest.cut, manifest.made_from
    if not 0 < cut < spec.cut:
        return f"the store at cut {cut} is not before cut {spec.cut}"
    for name, words in _SHARED.items():
        if made_from.get(name) != spec.made_from.get(name):
            return f"{words} is not what the store at cut {cut} was made with"
    if len(store) != len(spec.source):
        return f"the store at cut {cut} holds {len(store)} samples instead of {len(spec.source)}"
    blocks, modules = chain.names[:cut], chain.prefix_modules(cut)
    digests = [config_digest(chain.model, blocks, modules, neutral=neutral) for neutral in (True, False)]
    if made_from.get("blocks") != blocks or made_from.get("config") not in digests:
        return f"the model's configuration is not what the store at cut {cut} was made with"
    if store.codec.layout != chain.stored_layout(cut):
        layout = chain.stored_layout(cut)
        return f"the features at cut {cut} have another layout by now: {layout}, not {store.codec.layout}"
    if store.codec.layout.is_token:
        return "texts without padding, and samples of several sizes, run again from their own inputs"
    if store.codec.layout.is_trimmed:
        return "samples of several widths run again from their own inputs"
    if made_from.get("prefix") != tensors_digest(chain.prefix_state(cut)):
        return f"the {cut} blocks before the store's cut have other weights by now"
    split = split_batch(spec.source.probe(), chain.main_input)
    if split.describe() != manifest.inputs or split.constants != manifest.constants:
        return f"the store at cut {cut} holds other model inputs than the collator returns"
    reason = _why_not_views(store, spec)
    if reason is not None:
        return reason
    try:
        store.verify()
    except (StoreError, OSError) as error:
        return f"the store at cut {cut} is damaged: {error}"
    return None


def _why_not_views(store: FeatureStore, spec: StoreSpec) -> str | None:
    views, stored, cut = spec.views, store.views.spec, store.manifest.cut
    if views.count > stored.count:
        return f"the store at cut {cut} holds {stored.count} augmented views of a sample and {views.count} are wanted"
    if views.own_inputs and not stored.own_inputs:
        return f"the store at cut {cut} holds no model inputs of the views' own"
    if views.whole:
        return None
    if stored.whole:
        return f"the store at cut {cut} holds whole views, without the geometry that is wanted"
    grid = store.codec.layout.grid
    if stored.geometry == DENSE and grid != spec.layout.grid:
        return f"the store at cut {cut} holds geometry for a grid of {grid}, and cut {spec.cut} has {spec.layout.grid}"
    if views.geometry == DENSE and stored.geometry != DENSE:
        return f"the store at cut {cut} holds {stored.geometry} geometry, and {DENSE} geometry is wanted"
    return None
