"""Whether and how a frozen prefix's features get into a store: reuse, decide, build, say so."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from .cache.build_plan import BuildPlan
from .cache.fingerprint import fingerprint_inputs
from .cache.materialize import BuildFailed, GeometryMisfit, materialize, open_matching
from .cache.rows import RowSource
from .cache.runs import ImageRuns
from .cache.sizing import estimate_bytes
from .cache.store import FORMAT_VERSION, FeatureStore
from .cache.views import ViewSpec
from .chain import BlockChain
from .config import FreezeCacheConfig, parse_bytes
from .distributed import Group
from .geometry import DENSE, PROJECTIVE
from .layout import FeatureLayout
from .replay.survey import choose_channels, count_sensitive, make_view_spec, survey
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
        #: Samples on which this process has run the prefix for builds.
        self.prefix_samples = 0
        # At the beginning, where a mistake in the pipelines costs nothing yet.
        self._found = survey(source, chain.main_input) if group.rank == 0 and config.cache != "never" else None
        self._said_what_is_random = False
        self._notes: Mapping[str, Any] = {}

    def obtain(self, cut: int, epochs_left: float) -> tuple[FeatureStore | None, bool]:
        """Opens the matching store or builds it, if that is wanted and possible.

        Args:
            cut: frozen blocks.
            epochs_left: epochs of training that remain.

        Returns:
            The store, None if training goes on from images; and whether it was built now.

        Raises:
            ValueError: under explicit settings, if the features cannot be kept (not finite, of several sizes).
        """
        survivable = BuildFailed if self.explicit else Exception
        try:
            plan = self._plan(cut)
            store = open_matching(plan, self.group)
            if store is not None:
                self._say_what_is_random(plan)
                self._say(f"Reusing the feature store {store.path} ({megabytes(store.bytes)}).", logging.INFO)
                return store, False
            refusal = self._refusal(plan, epochs_left)
            if refusal is None:
                self._say_what_is_random(plan)
                store, refusal = self._build(plan, epochs_left)
            if store is None:
                self._say(f"No feature store for cut {cut}, training goes on frozen, from images: {refusal}.")
                return None, False
        except survivable as error:
            self._say(f"The feature store could not be built, training goes on frozen, from images: {error}")
            return None, False
        self._say(
            f"Built the feature store {store.path} ({megabytes(store.bytes)}, {self.config.codec}, {len(store)} "
            f"samples{_describe_views(store)}): {cut} of {len(self.chain)} blocks are not run any more in training."
        )
        return store, True

    def _build(self, plan: BuildPlan, epochs_left: float) -> tuple[FeatureStore | None, str | None]:
        """Builds with the smallest kind of geometry that fits every view; whole views if none does.

        Returns:
            The store; or None and why `cache="auto"` does not build what turned out to be necessary.
        """
        while True:
            try:
                plan = self._settle(plan)
                return materialize(plan, self.group), None
            except GeometryMisfit as misfit:
                if plan.views.geometry == PROJECTIVE and not misfit.for_all_kinds:
                    plan = replace(plan, views=replace(plan.views, geometry=DENSE), notes={})
                    how = "Geometry is kept for every position of a feature"
                else:
                    plan = replace(plan, views=ViewSpec(plan.views.count), notes={})
                    how = "Views are kept whole, whatever sensitive_fraction and sensitive_budget say"
                bytes_then = self.group.on_main(partial(estimate_bytes, plan, self.group.size))
                self._say(f"{how} ({megabytes(bytes_then)} in all), because {misfit}.")
            refusal = self._refusal(plan, epochs_left)
            if refusal is not None:
                return None, refusal

    def _settle(self, plan: BuildPlan) -> BuildPlan:
        """Chooses the sensitive channels, on the main process.

        Raises:
            GeometryMisfit: on every process, if a view's geometry cannot be kept as the plan says.
        """

        def choose() -> ViewSpec | tuple[str, bool]:
            try:
                with preserve_rng():
                    config = self.config
                    chosen = choose_channels(plan, config.similarity, config.sensitivity_batches, config.channel_map)
            except GeometryMisfit as misfit:
                return str(misfit), misfit.for_all_kinds
            self._notes = chosen.notes  # pictures stay here: the main process writes them
            return chosen.views

        settled = self.group.on_main(choose)
        if isinstance(settled, tuple):
            raise GeometryMisfit(*settled)
        return replace(plan, views=settled, notes=self._notes)

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
        self._found = self.group.from_main(self._found)
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
            runs=ImageRuns(self.chain, cut, self.source, layout, self._count_and_take),
            disable_tqdm=self.disable_tqdm,
        )

    def _refusal(self, plan: BuildPlan, epochs_left: float) -> str | None:
        """Why a store is not built; None if it is."""
        if self.config.cutmix_alpha and plan.layout.grid is None:
            return f"cutmix pastes a box of positions, and features of shape {plan.layout.shape} have none"
        if self.config.cache == "always":
            return None
        if epochs_left < 1:
            return "less than one epoch remains"

        def compare() -> str | None:
            needed = estimate_bytes(plan, self.group.size)
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.cache_dir).free
            if needed <= _DISK_SHARE * free:
                return None
            return f"it needs {megabytes(needed)} and {self.cache_dir} has {megabytes(free)} free"

        return self.group.on_main(compare)

    def _count_and_take(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        inputs = self.model_inputs(batch)
        self.prefix_samples += len(inputs[self.chain.main_input])
        return inputs

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
        if not self._found.replayable:
            return {"views": self.config.views}
        names = ("views", "sensitive_fraction", "sensitive_budget", "similarity", "sensitivity_batches", "channel_map")
        return {name: getattr(self.config, name) for name in names}

    def _say_what_is_random(self, plan: BuildPlan) -> None:
        found, views = self._found, self.config.views
        if self._said_what_is_random:
            return
        self._said_what_is_random = True
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
            size = megabytes(self.group.on_main(partial(estimate_bytes, plan, self.group.size)))
            self._say(
                f"Augmentation cannot be replayed from one base view, because {found.why_not}: {views + 1} whole "
                f"draws of every sample are stored ({size}), {views + 1} times the bytes of one, and replay epochs "
                "repeat them."
            )

    def _say(self, message: str, level: int = logging.WARNING) -> None:
        """Logs on the main process. What writes to the disk or ends caching is said at the default log level."""
        if self.group.rank == 0:
            logger.log(level, message)


def _describe_views(store: FeatureStore) -> str:
    spec, layout = store.views.spec, store.codec.layout
    if not spec.count:
        return ""
    views = f", {spec.count} augmented view{'s' if spec.count > 1 else ''} each"
    return f"{views}, whole" if spec.whole else f"{views}, {len(spec.channels)} of {layout.channels} channels of it"


def megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
