"""Whether and how a frozen prefix's features get into a store: reuse, decide, build, say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
from .cache.partial import PartialStore
from .cache.planner import disk_room
from .cache.sizing import estimate_bytes
from .cache.store import FeatureStore, StoreError, remove_store
from .cache.views import ViewSpec
from .config import parse_bytes
from .distributed import Group
from .geometry import DENSE, PROJECTIVE
from .probing import Prober
from .replay.deepening import DEEPENED_FROM, deepened, why_not_deepen

logger = logging.get_logger(__name__)

#: Codecs that are taken, in this order, where the wanted one does not fit: none that is known to cost accuracy.
_COARSER = ("fp16", "int8", "int4", "int3")

#: Entry of a fingerprint's inputs that says that live epochs have written the store.
WRITTEN = "materialize"


@dataclass(frozen=True)
class Decision:
    """What was decided for a cut, to be decided so again after a resume.

    Args:
        codec: of its store.
        parent: cut of the store from which it was deepened; None if it was built from images.
    """

    codec: str
    parent: int | None = None


@dataclass(frozen=True)
class _Way:
    """How features get into a store.

    Args:
        make: from a settled plan.
        writing: whether live epochs write them, and `make` only begins.
        decided: whether a checkpoint has decided for it.
        upfront: whether a store that was built in one go does as well.
    """

    make: Callable[[BuildPlan, Group], FeatureStore | PartialStore]
    writing: bool = False
    decided: bool = False
    upfront: bool = True


_BUILDING = _Way(materialize)


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
        store, built = self._guarded(cut, lambda: self._find_or_make(cut, epochs_left, self._current, _BUILDING))
        self._replace_current(store)
        return store, built

    def begin_writing(
        self, cut: int, epochs_left: float, decided: bool = False, upfront: bool = True
    ) -> PartialStore | FeatureStore | None:
        """Settles what live epochs write through, as for a build, and begins the directory they write to.

        Args:
            cut: frozen blocks.
            epochs_left: epochs of training that remain at this cut.
            decided: whether a checkpoint has decided for it: some or all of the live epochs lie behind.
            upfront: whether a store that a build has made does as well.

        Returns:
            The directory; the store, if a complete one matches; None if training goes on live.

        Raises:
            ValueError: under explicit settings, if the features cannot be kept (not finite).
        """
        way = _Way(PartialStore.begin, writing=True, decided=decided, upfront=upfront)
        found, _ = self._guarded(cut, lambda: self._find_or_make(cut, epochs_left, self._current, way))
        if not isinstance(found, PartialStore):
            self._replace_current(found)
            return found
        # Reserved: what is written now, and the store that will be made of it.
        self.holdings.add(found.path, found.bytes + self._needed(found.plan), built=True)
        rounds = found.views.spec.count + 1
        self.say(
            f"Cut {cut}: the features of {rounds} live epoch{'s' if rounds > 1 else ''} are written to {found.path} "
            f"({megabytes(found.bytes)}), then replay begins.",
            logging.INFO,
        )
        return found

    def written(self, writing: PartialStore, store: FeatureStore) -> None:
        """Takes the store in that live epochs have written."""
        self.forget(writing.path)
        self.holdings.add(store.path, store.total_bytes, built=True)
        self._replace_current(store)
        self._say_built(store)

    def forget(self, path: Path) -> None:
        """What was begun there is gone."""
        self.holdings.drop(path)

    def _guarded(self, cut: int, find: Callable[[], tuple[Any, bool]]) -> tuple[Any, bool]:
        """What `find` returns, or no store: said once, and nothing that a training could not survive."""
        survivable = BuildFailed if self.explicit else Exception
        try:
            return find()
        except _Declined as reason:
            self.say(f"No feature store for cut {cut}, training goes on frozen, from images: {reason}.")
        except survivable as error:
            self.say(f"The feature store could not be built, training goes on frozen, from images: {error}")
        return None, False

    def _find_or_make(self, cut: int, epochs_left: float, current: FeatureStore | None, way: _Way) -> tuple[Any, bool]:
        """A matching store, or what `way` makes; and whether it was made now.

        Raises:
            _Declined: if none is wanted, pays or fits.
        """
        known = self._decisions.get(cut)
        wanted = self.config.codec_at(cut, len(self.chain)) if known is None else known.codec
        first = self.blueprints.plan(cut, wanted)
        parent = None if way.writing else self._parent_cut(cut, known)
        if parent is not None:
            current = self._parent(parent, current)
        too_large = None
        for codec in self._codecs(wanted, first):
            images = first if codec == wanted else self.blueprints.with_codec(first, codec)
            if way.writing:
                plan = replace(images, made_from={**images.made_from, WRITTEN: "write_through"})
            else:
                plan = self._deepened(images, current)
            found = self._find(plan, images, way)
            if found is not None:
                if isinstance(found, FeatureStore):
                    self._take(found, False, known)
                return found, False
            if way.writing and not way.decided and epochs_left < plan.views.count + 2:
                raise _Declined(f"writing it takes {plan.views.count + 1} epochs, and {epochs_left:g} remain")
            for attempt, goes_first in self._attempts(plan, images, current, way):
                if known is None and not way.decided:
                    self._check_worth(attempt, epochs_left)
                self._say_what_is_random(attempt)
                if goes_first is not None:
                    self.say(
                        f"The feature store of cut {goes_first.manifest.cut} is removed before the one of cut {cut} "
                        "is built: the budget does not hold both."
                    )
                    self._remove(goes_first)
                try:
                    made = self._make(attempt, images, None if known or way.decided else epochs_left, way)
                except OverLimit as error:
                    too_large = error
                    continue
                if way.writing:
                    self._decisions.setdefault(cut, Decision(codec))
                else:
                    self._take(made, True, known)
                    self._say_built(made)
                return made, True
            too_large = too_large or self._too_large(plan)
        raise _Declined(too_large)

    def _find(self, plan: BuildPlan, images: BuildPlan, way: _Way) -> FeatureStore | PartialStore | None:
        """A finished store, or one that was begun."""
        store = open_matching(plan, self.group)
        if store is None and way.writing and way.upfront:
            store = open_matching(images, self.group)
        if store is not None and self._holds(store.total_bytes):
            self._say_what_is_random(plan)
            self.say(f"Reusing the feature store {store.path} ({megabytes(store.bytes)}).", logging.INFO)
            return store
        return PartialStore.reopen(plan, self.group) if way.writing else None

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
        self, plan: BuildPlan, images: BuildPlan, current: FeatureStore | None, way: _Way
    ) -> Iterator[tuple[BuildPlan, FeatureStore | None]]:
        """The ways to build a plan that may fit: beside the current store, or after that one is removed."""
        # What is written through lies there twice in the end: as it was written, and as the store made of it.
        needed = self._needed(plan) * (2 if way.writing else 1)
        room = self._room()
        if room is None or needed <= room:
            yield replace(plan, limit=room), None
        if current is None or not self.holdings.has_built(current.path):
            return
        room = self._room(without=current)
        if room is not None and needed <= room:
            yield replace(plan if way.writing else images, limit=room), current

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
        self.say(
            f"Cut {plan.cut}: {row.codec}, {megabytes(row.bytes)} (base {megabytes(row.base_bytes)}, views "
            f"{megabytes(row.view_bytes)}); a build takes about {row.build_seconds:.1f} s and saves "
            f"{row.seconds_saved_per_epoch:.1f} s in each of {epochs_left:.3g} epochs left: building."
        )

    # Building

    def _make(
        self, plan: BuildPlan, images: BuildPlan, epochs_left: float | None, way: _Way
    ) -> FeatureStore | PartialStore:
        """Builds with the smallest kind of geometry that fits every view; whole views if none does.

        Args:
            plan: what to build.
            images: the same from images.
            epochs_left: epochs in which what turns out to be necessary must pay; None: it was decided before.
            way: how.

        Raises:
            OverLimit: if it does not fit.
            _Declined: if what turned out to be necessary is not wanted.
        """
        limit = plan.limit
        while True:
            try:
                return way.make(self.blueprints.settle(plan), self.group)
            except GeometryMisfit as misfit:
                if plan.views.geometry == PROJECTIVE and not misfit.for_all_kinds:
                    views = replace(images.views, geometry=DENSE)
                    how = "Geometry is kept for every position of a feature"
                else:
                    views = ViewSpec(plan.views.count)
                    how = "Views are kept whole, whatever sensitive_fraction and sensitive_budget say"
                plan = replace(plan if way.writing else images, views=views, notes={}, limit=limit)
                needed = self._needed(plan)
                self.say(f"{how} ({megabytes(needed)} in all), because {misfit}.")
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
            self.say(f"The store of cut {plan.cut} is built from images, not from the one before: {reason}.")
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
            self.say(f"The store of cut {cut} cannot be built again, the deeper one comes from images: {reason}.")
            return None

    # Keeping count

    def _take(self, store: FeatureStore, built: bool, known: Decision | None) -> None:
        self.holdings.add(store.path, store.total_bytes, built)
        if known is None:
            manifest = store.manifest
            before = self._current if DEEPENED_FROM in manifest.made_from else None
            self._decisions[manifest.cut] = Decision(manifest.codec, None if before is None else before.manifest.cut)

    def _replace_current(self, store: FeatureStore | None) -> None:
        """A store takes the place of the one of the cut before, or none does."""
        if self._current is not None and (store is None or store.path != self._current.path):
            self._remove(self._current)
        self._current = store

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
            self.say(
                "The train data set changes with the epoch: what it is when the feature store is built is repeated in "
                "every replay epoch."
            )
        if not found.random:
            return
        if not views:
            self.say(
                "The train data set is random (transform or collator): what is drawn when the feature store is built "
                "is repeated in every replay epoch (views=0); augmentation ends at the freeze point."
            )
        elif not found.replayable:
            size = megabytes(self._needed(plan))
            self.say(
                f"Augmentation cannot be replayed from one base view, because {found.why_not}: {views + 1} whole "
                f"draws of every sample are stored ({size}), {views + 1} times the bytes of one, and replay epochs "
                "repeat them."
            )

    def _say_built(self, store: FeatureStore) -> None:
        manifest = store.manifest
        wanted = self.config.codec_at(manifest.cut, len(self.chain))
        codec = manifest.codec if manifest.codec == wanted else f"{manifest.codec}, since {wanted} does not fit"
        source = "from the store before it, " if DEEPENED_FROM in manifest.made_from else ""
        self.say(
            f"Built the feature store {store.path} ({source}{megabytes(store.bytes)}, {codec}, {len(store)} "
            f"samples{_describe_views(store)}): {manifest.cut} of {len(self.chain)} blocks are not run any more in "
            "training."
        )

    def say(self, message: str, level: int = logging.WARNING) -> None:
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
