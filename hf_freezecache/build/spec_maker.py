"""What would be built at a cut: features, codec, views, fingerprint; from the training's model, data and settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cache.codec import make_codec
from ..cache.fingerprint import fingerprint_inputs, tensors_digest
from ..cache.lossless import LOSSLESS
from ..cache.manifest import FORMAT_VERSION
from ..cache.rows import RowSource
from ..cache.view_columns import ViewSpec
from ..config import FreezeCacheConfig
from ..distributed import Group
from ..model.chain import BlockChain
from ..model.layout import FeatureLayout
from ..rng import preserve_rng
from ..units import parse_bytes
from .feature_sources import ImageFeatures
from .fisher import fisher_weights
from .materialize import GeometryMisfit, spread
from .store_spec import StoreSpec
from .survey import choose_channels, count_sensitive, make_view_spec, survey

#: Batches from all over the data on which a channel's weight in the loss is measured.
_WEIGHT_BATCHES = 8


class SpecMaker:
    """Makes the `StoreSpec` of a cut and a codec.

    Args:
        model: the model itself, not wrapped.
        chain: its blocks.
        source: the train samples as model inputs.
        config: the user's settings.
        cache_dir: where stores lie.
        group: the processes.
        model_inputs: of a collated batch, what the model takes, on its device.
        precision: mixed precision of the training.
        disable_tqdm: no progress bars.

    Raises:
        ValueError: if the pipelines of a `ReplayableTransform` do not fit each other.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        chain: BlockChain,
        source: RowSource,
        config: FreezeCacheConfig,
        cache_dir: Path,
        group: Group,
        model_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        precision: str,
        disable_tqdm: bool,
    ):
        self.model, self.chain, self.source, self.config = model, chain, source, config
        self.cache_dir, self.group, self.model_inputs = cache_dir, group, model_inputs
        self.precision, self.disable_tqdm = precision, disable_tqdm
        #: Samples on which this process has run blocks for builds, by the cuts between which they lie.
        self.samples_run: Counter[tuple[int, int]] = Counter()
        # At the beginning, where a mistake in the pipelines costs nothing yet.
        self.augmentation = survey(source, chain.main_input) if group.rank == 0 and config.cache != "never" else None
        #: Weight of every channel in the loss, by cut: measured once, for codecs that use it.
        self.weights: dict[int, torch.Tensor] = {}
        self._notes: Mapping[str, Any] = {}

    def make(self, cut: int, codec: str) -> StoreSpec:
        """What a store of this cut would be, before sensitive channels are chosen.

        Raises:
            ChainError: if the cut fails the proof on this training's data.
        """

        def prove():
            probe = self.model_inputs(self.source.probe())
            # Traced again: mixed precision set up since the training began may change the type of the features.
            self.chain.trace(probe)
            self.chain.prove(probe, cut)

        def made_from():
            inputs = fingerprint_inputs(
                augmentation=self._augmentation_settings(),
                source=self.source,
                model=self.model,
                tensors={**self.chain.prefix_parameters(cut), **self.chain.prefix_buffers(cut)},
                cut=cut,
                blocks=self.chain.names[:cut],
                codec=codec,
                precision=self.precision,
                format_version=FORMAT_VERSION,
            )
            return {**inputs, **LOSSLESS} if self.config.lossless else inputs

        self.group.on_all(prove)
        self.augmentation = self.group.broadcast(self.augmentation)
        return self.with_codec(replace(self.draft(cut, codec), made_from=self.group.on_main(made_from)), codec)

    def draft(self, cut: int, codec: str) -> StoreSpec:
        """A spec without a fingerprint: for measuring, not for building.

        Args:
            cut: frozen blocks; traced.
            codec: name of the codec.
        """
        layout = self.chain.layout(cut)
        return StoreSpec(
            chain=self.chain,
            cut=cut,
            source=self.source,
            codec=codec,
            layout=layout,
            views=self._view_spec(layout, codec),
            made_from={},
            directory=self.cache_dir,
            feature_source=ImageFeatures(self.chain, cut, self.source, layout, self.counting(0, cut)),
            disable_tqdm=self.disable_tqdm,
            lossless=self.config.lossless,
        )

    def with_codec(self, spec: StoreSpec, codec: str) -> StoreSpec:
        """The same features by another codec."""
        made_from, weights = {**spec.made_from, "codec": codec}, None
        made_from.pop("channel_weights", None)
        if make_codec(codec, spec.layout).uses_weights:
            weights = self._channel_weights(spec.cut)
            made_from["channel_weights"] = tensors_digest({"weights": weights})
        views = self._view_spec(spec.layout, codec)
        return replace(spec, codec=codec, made_from=made_from, weights=weights, views=views, notes={})

    def settle(self, spec: StoreSpec) -> StoreSpec:
        """Chooses the sensitive channels, on the main process.

        Raises:
            GeometryMisfit: on every process, if a view's geometry cannot be kept as the spec says.
        """

        def choose() -> ViewSpec | tuple[str, bool]:
            try:
                with preserve_rng():
                    config = self.config
                    chosen = choose_channels(spec, config.similarity, config.sensitivity_batches, config.channel_map)
            except GeometryMisfit as misfit:
                return str(misfit), misfit.for_all_kinds
            self._notes = chosen.notes  # pictures stay here: the main process writes them
            return chosen.views

        settled = self.group.on_main(choose)
        if isinstance(settled, tuple):
            raise GeometryMisfit(*settled)
        return replace(spec, views=settled, notes=self._notes)

    def _channel_weights(self, cut: int) -> torch.Tensor:
        """Measured where the first spec needs them; the same ever after, though the suffix goes on learning."""

        def measure() -> torch.Tensor:
            numbers = spread(self.source.num_ranges, min(_WEIGHT_BATCHES, self.source.num_ranges))
            batches = (self.model_inputs(self.source.collate(self.source.rows(number))) for number in numbers)
            return fisher_weights(self.chain, cut, batches, self.source.seed, bands=True)

        if cut not in self.weights:
            self.weights[cut] = self.group.on_main(measure)
        return self.weights[cut]

    def counting(self, from_cut: int, to_cut: int) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
        """Takes what the model takes of a batch, and counts its samples as run through the blocks between two cuts."""

        def take(batch: Mapping[str, Any]) -> Mapping[str, Any]:
            inputs = self.model_inputs(batch)
            self.samples_run[from_cut, to_cut] += len(inputs[self.chain.main_input])
            return inputs

        return take

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _view_spec(self, layout: FeatureLayout, codec: str) -> ViewSpec:
        config, rows = self.config, len(self.source)
        budget = None if config.sensitive_budget is None else parse_bytes(config.sensitive_budget)
        count = count_sensitive(codec, layout, rows, config.views, config.sensitive_fraction, budget)
        return make_view_spec(self.augmentation, layout, config.views, count)

    def _augmentation_settings(self) -> dict[str, Any]:
        """What of the settings decides which views a store holds."""
        if not self.augmentation.random or not self.config.views:
            return {"views": 0}
        if not self.augmentation.replayable:
            return {"views": self.config.views}
        names = ("views", "sensitive_fraction", "sensitive_budget", "similarity", "sensitivity_batches", "channel_map")
        return {name: getattr(self.config, name) for name in names}
