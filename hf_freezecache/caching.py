"""Whether and how a frozen prefix's features get into a store: reuse, decide, build, say so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .blueprints import Blueprints
from .cache.build_plan import BuildPlan
from .cache.codec import make_codec
from .cache.holdings import Holdings
from .cache.materialize import BuildFailed, GeometryMisfit, OverLimit, materialize, open_matching
from .cache.planner import disk_room
from .cache.sizing import estimate_bytes
from .cache.store import FeatureStore, StoreError, remove_store
from .cache.views import ViewSpec
from .config import parse_bytes
from .geometry import DENSE, PROJECTIVE
from .probing import Prober
from .replay.deepening import DEEPENED_FROM, deepened, why_not_deepen

logger = logging.get_logger(__name__)

#: Codecs that are taken, in this order, where the wanted one does not fit: none that is known to cost accuracy.
_COARSER = ("fp16", "int8", "int4", "int3")


@dataclass(frozen=True)
class Decision:
    """What was decided for a cut, to be decided so again after a resume.

    Args:
        codec: of its store.
        parent: cut of the store from which it was deepened; None if it was built from images.
    """

    codec: str
    parent: int | None = None


class _Declined(Exception):
    """No store is built, and why."""


class FeatureCaching:
    """Gets the store for a cut.

    Args:
        blueprints: what would be built.
        explicit: whether the user gave the settings; the defaults never cost a training.
    """

    def __init__(self, blueprints: Blueprints, explicit: bool):
        self.blueprints, self.explicit = blueprints, explicit
        self.config, self.group, self.chain = blueprints.config, blueprints.group, blueprints.chain
        self.source, self.cache_dir = blueprints.source, blueprints.cache_dir
        budget = self.config.cache_budget
        self.holdings = Holdings(None if budget is None else parse_bytes(budget))
        self._prober = Prober(
            self.chain, self.source, blueprints.model_inputs, config=self.config, processes=self.group.size
        )
        self._decisions: dict[int, Decision] = {}
        self._current: FeatureStore | None = None
        self._said_what_is_random = False

    def state(self) -> dict[str, Any]:
        """What a resumed training must know, as JSON values."""
        return {
            "decisions": {str(cut): [made.codec, made.parent] for cut, made in self._decisions.items()},
            "channel_weights": {str(cut): weights.tolist() for cut, weights in self.blueprints.weights.items()},
            "stores": self.holdings.state(),
            "current": None if self._current is None else self._current.path.name,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        self._decisions = {int(cut): Decision(*made) for cut, made in state.get("decisions", {}).items()}
        self.blueprints.weights = {
            int(cut): torch.tensor(weights) for cut, weights in state.get("channel_weights", {}).items()
        }
        self.holdings.load(state.get("stores", []), self.cache_dir)
        if state.get("current") is not None:
            self._current = self.group.on_main(partial(_open_if_there, self.cache_dir / state["current"]))

    def obtain(self, cut: int, epochs_left: float) -> tuple[FeatureStore | None, bool]:
        """Opens the matching store or builds it, if that is wanted and possible.

        The store of the cut before is removed, if this training has built it: as soon as the new one is complete, or
        before where the budget does not hold both.

        Args:
            cut: frozen blocks.
            epochs_left: epochs of training that remain at this cut.

        Returns:
            The store, None if training goes on from images; and whether it was built now.

        Raises:
            ValueError: under explicit settings, if the features cannot be kept (not finite, of several sizes).
        """
        survivable = BuildFailed if self.explicit else Exception
        current = self._current
        try:
            store, built = self._find_or_build(cut, epochs_left, current)
        except _Declined as reason:
            self._say(f"No feature store for cut {cut}, training goes on frozen, from images: {reason}.")
            store, built = None, False
        except survivable as error:
            self._say(f"The feature store could not be built, training goes on frozen, from images: {error}")
            store, built = None, False
        if current is not None and (store is None or store.path != current.path):
            self._remove(current)
        self._current = store
        return store, built

    def _find_or_build(self, cut: int, epochs_left: float, current: FeatureStore | None) -> tuple[FeatureStore, bool]:
        known = self._decisions.get(cut)
        wanted = self.config.codec_at(cut, len(self.chain)) if known is None else known.codec
        first = self.blueprints.plan(cut, wanted)
        parent = self._parent_cut(cut, known)
        if parent is not None:
            current = self._parent(parent, current)
        too_large = None
        for codec in self._codecs(wanted, first):
            images = first if codec == wanted else self.blueprints.with_codec(first, codec)
            plan = self._deepened(images, current)
            store = open_matching(plan, self.group)
            if store is not None and self._holds(store.total_bytes):
                self._say_what_is_random(plan)
                self._say(f"Reusing the feature store {store.path} ({megabytes(store.bytes)}).", logging.INFO)
                self._take(store, False, known)
                return store, False
            for attempt, goes_first in self._attempts(plan, images, current):
                if known is None:
                    self._check_worth(attempt, epochs_left)
                self._say_what_is_random(attempt)
                if goes_first is not None:
                    self._say(
                        f"The feature store of cut {goes_first.manifest.cut} is removed before the one of cut {cut} "
                        "is built: the budget does not hold both."
                    )
                    self._remove(goes_first)
                try:
                    store = self._build(attempt, images, epochs_left if known is None else None)
                except OverLimit as error:
                    too_large = error
                    continue
                self._take(store, True, known)
                self._say_built(store, wanted)
                return store, True
            too_large = too_large or self._too_large(plan)
        raise _Declined(too_large)

    # What fits

    def _codecs(self, wanted: str, plan: BuildPlan) -> Iterator[str]:
        """The wanted codec, then those that are smaller."""
        yield wanted
        row_bytes = make_codec(wanted, plan.layout).row_bytes
        for codec in _COARSER:
            smaller = make_codec(codec, plan.layout).row_bytes
            if smaller < row_bytes:
                row_bytes = smaller
                yield codec

    def _attempts(
        self, plan: BuildPlan, images: BuildPlan, current: FeatureStore | None
    ) -> Iterator[tuple[BuildPlan, FeatureStore | None]]:
        """The ways to build a plan that may fit: beside the current store, or after that one is removed."""
        needed = self._needed(plan)
        room = self._room()
        if room is None or needed <= room:
            yield replace(plan, limit=room), None
        if current is None or not self.holdings.has_built(current.path):
            return
        room = self._room(without=current)
        if room is not None and needed <= room:
            yield replace(images, limit=room), current

    def _room(self, without: FeatureStore | None = None) -> int | None:
        """Bytes for another store: of the budget, and of the free disk unless a store is wanted in any case."""
        room = self.holdings.room(None if without is None else without.path)
        if self.config.cache == "always":
            return room
        free = self.group.on_main(partial(disk_room, self.cache_dir))
        if without is not None:
            free += without.total_bytes
        return free if room is None else min(room, free)

    def _needed(self, plan: BuildPlan) -> int:
        return self.group.on_main(partial(estimate_bytes, plan, self.group.size))

    def _holds(self, total_bytes: int) -> bool:
        return self.holdings.budget is None or total_bytes <= self.holdings.budget

    def _too_large(self, plan: BuildPlan) -> str:
        place = "the budget" if self.holdings.budget is not None else f"the disk of {self.cache_dir}"
        room = megabytes(max(self._room() or 0, 0))
        return f"it needs {megabytes(self._needed(plan))} even as {plan.codec}, and {room} are left of {place}"

    # What pays

    def _check_worth(self, plan: BuildPlan, epochs_left: float) -> None:
        """Raises _Declined if a store of this plan is not wanted or would not pay."""
        if self.config.cutmix_alpha and plan.layout.grid is None:
            raise _Declined(f"cutmix pastes a box of positions, and features of shape {plan.layout.shape} have none")
        if self.config.cache == "always":
            return
        if epochs_left < 1:
            raise _Declined("less than one epoch remains")
        reason, row = self.group.on_main(lambda: self._prober.refuse(plan, epochs_left, plan.limit))
        if reason is not None:
            raise _Declined(reason)
        self._say(
            f"Cut {plan.cut}: {row.codec}, {megabytes(row.bytes)} (base {megabytes(row.base_bytes)}, views "
            f"{megabytes(row.view_bytes)}); a build takes about {row.build_seconds:.1f} s and saves "
            f"{row.seconds_saved_per_epoch:.1f} s in each of {epochs_left:.3g} epochs left: building."
        )

    # Building

    def _build(self, plan: BuildPlan, images: BuildPlan, epochs_left: float | None) -> FeatureStore:
        """Builds with the smallest kind of geometry that fits every view; whole views if none does.

        Args:
            plan: what to build.
            images: the same from images.
            epochs_left: epochs in which what turns out to be necessary must pay; None: it was decided before.

        Raises:
            OverLimit: if it does not fit.
            _Declined: if what turned out to be necessary is not wanted.
        """
        limit = plan.limit
        while True:
            try:
                return materialize(self.blueprints.settle(plan), self.group)
            except GeometryMisfit as misfit:
                if plan.views.geometry == PROJECTIVE and not misfit.for_all_kinds:
                    views = replace(images.views, geometry=DENSE)
                    how = "Geometry is kept for every position of a feature"
                else:
                    views = ViewSpec(plan.views.count)
                    how = "Views are kept whole, whatever sensitive_fraction and sensitive_budget say"
                plan = replace(images, views=views, notes={}, limit=limit)
                needed = self._needed(plan)
                self._say(f"{how} ({megabytes(needed)} in all), because {misfit}.")
                if limit is not None and needed > limit:
                    raise OverLimit(needed, limit) from misfit
            if epochs_left is not None:
                self._check_worth(plan, epochs_left)

    def _deepened(self, plan: BuildPlan, current: FeatureStore | None) -> BuildPlan:
        """The plan with the current store as its source, if that is wanted and possible."""
        if self.config.deepen != "cache" or current is None:
            return plan
        reason = self.group.on_main(partial(why_not_deepen, current, plan))
        if reason is not None:
            self._say(f"The store of cut {plan.cut} is built from images, not from the one before: {reason}.")
            return plan
        return deepened(
            plan, current, self.blueprints.counting(current.manifest.cut, plan.cut), self.blueprints.device
        )

    def _parent_cut(self, cut: int, known: Decision | None) -> int | None:
        """The cut whose store the one of `cut` is deepened from; None if it is built from images."""
        if known is not None:
            return known.parent
        decided = [earlier for earlier in self._decisions if earlier < cut]
        return max(decided, default=None) if self.config.deepen == "cache" else None

    def _parent(self, cut: int, current: FeatureStore | None) -> FeatureStore | None:
        """The store from which the one of a resumed training was deepened; built again if it is gone."""
        if current is not None and current.manifest.cut == cut:
            return current
        try:
            return self._find_or_build(cut, 0, None)[0]
        except _Declined as reason:
            self._say(f"The store of cut {cut} cannot be built again, the deeper one comes from images: {reason}.")
            return None

    # Keeping count

    def _take(self, store: FeatureStore, built: bool, known: Decision | None) -> None:
        self.holdings.add(store.path, store.total_bytes, built)
        if known is None:
            manifest = store.manifest
            before = self._current if DEEPENED_FROM in manifest.made_from else None
            self._decisions[manifest.cut] = Decision(manifest.codec, None if before is None else before.manifest.cut)

    def _remove(self, store: FeatureStore) -> None:
        """Removes a store that this training has built and needs no more; what others have built stays."""
        if self.holdings.has_built(store.path):
            self.group.on_main(partial(remove_store, store.path))
        self.holdings.drop(store.path)

    # Saying so

    def _say_what_is_random(self, plan: BuildPlan) -> None:
        found, views = self.blueprints.augmentation, self.config.views
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
            size = megabytes(self._needed(plan))
            self._say(
                f"Augmentation cannot be replayed from one base view, because {found.why_not}: {views + 1} whole "
                f"draws of every sample are stored ({size}), {views + 1} times the bytes of one, and replay epochs "
                "repeat them."
            )

    def _say_built(self, store: FeatureStore, wanted: str) -> None:
        manifest = store.manifest
        codec = manifest.codec if manifest.codec == wanted else f"{manifest.codec}, since {wanted} does not fit"
        source = "from the store before it, " if DEEPENED_FROM in manifest.made_from else ""
        self._say(
            f"Built the feature store {store.path} ({source}{megabytes(store.bytes)}, {codec}, {len(store)} "
            f"samples{_describe_views(store)}): {manifest.cut} of {len(self.chain)} blocks are not run any more in "
            "training."
        )

    def _say(self, message: str, level: int = logging.WARNING) -> None:
        """Logs on the main process. What writes to the disk or ends caching is said at the default log level."""
        if self.group.rank == 0:
            logger.log(level, message)


def _open_if_there(path: Path) -> FeatureStore | None:
    try:
        return FeatureStore.open(path)
    except StoreError:
        return None


def _describe_views(store: FeatureStore) -> str:
    spec, layout = store.views.spec, store.codec.layout
    if not spec.count:
        return ""
    views = f", {spec.count} augmented view{'s' if spec.count > 1 else ''} each"
    return f"{views}, whole" if spec.whole else f"{views}, {len(spec.channels)} of {layout.channels} channels of it"


def megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
