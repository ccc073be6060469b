"""Whether and how a frozen prefix's features get into a store: reuse, decide, build, say so."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .cache.fingerprint import fingerprint_inputs
from .cache.materialize import BuildFailed, BuildPlan, GeometryMisfit, estimate_bytes, materialize, open_matching
from .cache.rows import RowSource
from .cache.store import FORMAT_VERSION, FeatureStore
from .cache.views import ViewSpec
from .chain import BlockChain
from .config import FreezeCacheConfig, parse_bytes
from .distributed import Group
from .geometry import DENSE, PROJECTIVE
from .layout import FeatureLayout
from .replay.survey import Augmentation, choose_channels, count_sensitive, make_view_spec, survey
from .rng import preserve_rng

logger = logging.get_logger(__name__)

#: The part of the free disk that a store may take under `cache="auto"`: checkpoints need room too.
_DISK_SHARE = 0.9


class FeatureCaching:
    """Gets the store for a cut.

    Args:
        model: the model itself, not wrapped.
        chain: its blocks.
        source: the train samples as model inputs.
        config: the user's settings.
        explicit: whether the user gave them; the defaults never cost a training.
        cache_dir: where stores lie.
        group: the processes.
        model_inputs: of a collated batch, what the model takes, on its device.
        precision: mixed precision of the training.
        disable_tqdm: no progress bars.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        chain: BlockChain,
        source: RowSource,
        config: FreezeCacheConfig,
        explicit: bool,
        cache_dir: Path,
        group: Group,
        model_inputs: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        precision: str,
        disable_tqdm: bool,
    ):
        self.model, self.chain, self.source, self.config, self.explicit = model, chain, source, config, explicit
        self.cache_dir, self.group, self.model_inputs = cache_dir, group, model_inputs
        self.precision, self.disable_tqdm = precision, disable_tqdm
        self._found: Augmentation | None = None

    def obtain(self, cut: int, whole_epoch: bool) -> tuple[FeatureStore | None, bool]:
        """Opens the matching store or builds it, if that is wanted and possible.

        Args:
            cut: frozen blocks.
            whole_epoch: whether at least one whole epoch remains.

        Returns:
            The store, None if training goes on from images; and whether it was built now.

        Raises:
            ValueError: under explicit settings, if the features cannot be kept (not finite, of several sizes).
        """
        survivable = (BuildFailed,) if self.explicit else (BuildFailed, ValueError, RuntimeError)
        try:
            plan = self._plan(cut)
            store = open_matching(plan, self.group)
            if store is not None:
                self._say(f"Reusing the feature store {store.path} ({megabytes(store.bytes)}).", logging.INFO)
                return store, False
            refusal = self._refusal(plan, whole_epoch)
            if refusal is not None:
                self._say(f"No feature store for cut {cut}, training goes on frozen, from images: {refusal}.")
                return None, False
            store = self._build(plan)
        except survivable as error:
            self._say(f"The feature store could not be built, training goes on frozen, from images: {error}")
            return None, False
        self._say(
            f"Built the feature store {store.path} ({megabytes(store.bytes)}, {self.config.codec}, {len(store)} "
            f"samples{_describe_views(store)}): {cut} of {len(self.chain)} blocks are not run any more in training."
        )
        return store, True

    def _build(self, plan: BuildPlan) -> FeatureStore:
        """Builds with the smallest kind of geometry that fits every view; whole views if none does."""

        def settle() -> BuildPlan | str:
            try:
                return choose_channels(plan, self.config.similarity, self.config.sensitivity_batches)
            except GeometryMisfit as misfit:
                return str(misfit)

        while True:
            with preserve_rng():
                # Only what was measured goes between processes; a plan holds the model.
                settled = self.group.on_main(lambda: _measured(settle()))
            if isinstance(settled, str):
                misfit = settled
            else:
                try:
                    return materialize(replace(plan, views=settled[0], notes=settled[1]), self.group)
                except GeometryMisfit as error:
                    misfit = str(error)
            if plan.views.geometry == PROJECTIVE:
                plan = replace(plan, views=replace(plan.views, geometry=DENSE))
                self._say(f"Geometry is kept for every position: {misfit}.", logging.INFO)
            else:
                plan = replace(plan, views=ViewSpec(plan.views.count))
                self._say(f"Views are kept whole: {misfit}.")

    def _plan(self, cut: int) -> BuildPlan:
        def prove():
            probe = self.model_inputs(self.source.probe())
            # Traced again: mixed precision set up since the training began may change the type of the features.
            self.chain.trace(probe)
            self.chain.prove(probe, cut)

        def made_from():
            return fingerprint_inputs(
                augmentation=self._augmentation_settings(),
                source=self.source,
                model=self.model,
                tensors={**self.chain.prefix_parameters(cut), **self.chain.prefix_buffers(cut)},
                cut=cut,
                blocks=self.chain.names[:cut],
                codec=self.config.codec,
                precision=self.precision,
                format_version=FORMAT_VERSION,
            )

        self.group.locally(prove)
        if self._found is None:
            self._found = self.group.on_main(lambda: survey(self.source))
            self._say_what_is_random()
        layout = self.chain.layout(cut)
        return BuildPlan(
            chain=self.chain,
            cut=cut,
            source=self.source,
            codec=self.config.codec,
            layout=layout,
            views=self._view_spec(layout),
            made_from=self.group.on_main(made_from),
            directory=self.cache_dir,
            model_inputs=self.model_inputs,
            disable_tqdm=self.disable_tqdm,
        )

    def _refusal(self, plan: BuildPlan, whole_epoch: bool) -> str | None:
        """Why `cache="auto"` does not build; None if it does."""
        if self.config.cache == "always":
            return None
        if not whole_epoch:
            return "less than one epoch remains"

        def compare() -> str | None:
            needed = estimate_bytes(plan)
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.cache_dir).free
            if needed <= _DISK_SHARE * free:
                return None
            return f"it needs {megabytes(needed)} and {self.cache_dir} has {megabytes(free)} free"

        return self.group.on_main(compare)

    def _view_spec(self, layout: FeatureLayout) -> ViewSpec:
        config = self.config
        budget = None if config.sensitive_budget is None else parse_bytes(config.sensitive_budget)
        rows, views = len(self.source), config.views
        count = count_sensitive(config.codec, layout, rows, views, config.sensitive_fraction, budget)
        return make_view_spec(self._found, layout, views, count)

    def _augmentation_settings(self) -> dict[str, Any]:
        """What of the settings decides which views a store holds."""
        if not self._found.random or not self.config.views:
            return {"views": 0}
        names = ("views", "sensitive_fraction", "sensitive_budget", "similarity", "sensitivity_batches")
        return {name: getattr(self.config, name) for name in names}

    def _say_what_is_random(self) -> None:
        found, views = self._found, self.config.views
        if hasattr(self.source.dataset, "set_epoch"):
            self._say(
                "The train data set changes with the epoch: what it is when the feature store is built is repeated in "
                "every replay epoch."
            )
        if not found.random:
            return
        if not views:
            self._say(
                "The train data set is random (transform or collator): what is drawn when the feature store is built "
                "is repeated in every replay epoch (views=0); augmentation ends at the freeze point."
            )
        elif not found.replayable:
            self._say(
                f"Augmentation cannot be replayed from one base view, because {found.why_not}: {views + 1} whole "
                f"draws of every sample are stored, {views + 1} times the bytes of one, and replay epochs repeat them."
            )

    def _say(self, message: str, level: int = logging.WARNING) -> None:
        """Logs on the main process. What writes to the disk or ends caching is said at the default log level."""
        if self.group.rank == 0:
            logger.log(level, message)


def _measured(settled: BuildPlan | str) -> tuple[ViewSpec, Mapping[str, Any]] | str:
    return settled if isinstance(settled, str) else (settled.views, settled.notes)


def _describe_views(store: FeatureStore) -> str:
    spec, layout = store.views.spec, store.codec.layout
    if not spec.count:
        return ""
    views = f", {spec.count} augmented view{'s' if spec.count > 1 else ''} each"
    return f"{views}, whole" if spec.whole else f"{views}, {len(spec.channels)} of {layout.channels} channels of it"


def megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
