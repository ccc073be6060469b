"""Whether and how a frozen prefix's features get into a store: reuse, decide, build, say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..augment.geometry import DENSE, PROJECTIVE
from ..build.deepening import DEEPENED_FROM, deepened, why_not_deepen
from ..build.materialize import BuildFailed, GeometryMisfit, OverLimit, materialize, open_matching
from ..build.partial import PartialStore
from ..build.spec_maker import SpecMaker
from ..build.store_spec import StoreSpec
from ..cache.store import FeatureStore, StoreError, remove_store
from ..cache.view_columns import ViewSpec
from ..distributed import Group
from ..estimate.probing import Prober
from ..units import show_bytes
from .budget import StoreBudget

logger = logging.get_logger(__name__)

#: Entry of a fingerprint's inputs that says that live epochs have written the store.
WRITTEN = "materialize"


@dataclass(frozen=True)
class Decision:
    """What was decided for a cut, to be decided so again after a resume.

    Args:
        codec: of its store.
        store: name of the store; None while live epochs write it.
        parent: cut of the store from which it was deepened; None if it was made from images.
    """

    codec: str
    store: str | None = None
    parent: int | None = None


@dataclass(frozen=True)
class _Way:
    """How features get into a store.

    Args:
        make: from a settled spec.
        writing: whether live epochs write them, and `make` only begins.
        decided: whether a checkpoint has decided for it.
        upfront: whether a store that was built in one go does as well.
    """

    make: Callable[[StoreSpec, Group], FeatureStore | PartialStore]
    writing: bool = False
    decided: bool = False
    upfront: bool = True


_BUILDING = _Way(materialize)


class _Declined(Exception):
    """No store is built, and why."""


class StoreKeeper:
    """Gets the store for a cut.

    Args:
        spec_maker: what would be built.
        explicit: whether the user gave the settings; the defaults never cost a training.
    """

    def __init__(self, spec_maker: SpecMaker, explicit: bool):
        self.spec_maker, self.explicit = spec_maker, explicit
        self.config, self.group, self.chain = spec_maker.config, spec_maker.group, spec_maker.chain
        self.source, self.cache_dir = spec_maker.source, spec_maker.cache_dir
        self.budget = StoreBudget(self.config, self.group, self.cache_dir)
        self.holdings = self.budget.holdings
        self._prober = Prober(
            self.chain, self.source, spec_maker.model_inputs, config=self.config, processes=self.group.size
        )
        self._decisions: dict[int, Decision] = {}
        self._current: FeatureStore | None = None
        # Cut of a store that the checkpoint had and the disk has not.
        self._lost_cut: int | None = None
        self._said: set[str] = set()

    def state(self) -> dict[str, Any]:
        """What a resumed training must know, as JSON values."""
        current = self._current
        return {
            "decisions": {str(cut): [made.codec, made.store, made.parent] for cut, made in self._decisions.items()},
            "channel_weights": {str(cut): weights.tolist() for cut, weights in self.spec_maker.weights.items()},
            "stores": self.holdings.state_dict(),
            "current": None if current is None else [current.path.name, current.manifest.cut],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`."""
        if not state:
            return
        self._decisions = {int(cut): Decision(*made) for cut, made in state["decisions"].items()}
        self.spec_maker.weights = {int(cut): torch.tensor(values) for cut, values in state["channel_weights"].items()}

        def look() -> tuple[list[dict[str, Any]], bool]:
            there = [entry for entry in state["stores"] if (self.cache_dir / entry["name"]).exists()]
            return there, state["current"] is not None and self._is_sound(self.cache_dir / state["current"][0])

        there, sound = self.group.on_main(look)
        self.holdings.load_state_dict(there, self.cache_dir)
        if sound:
            self._current = self.group.on_all(lambda: FeatureStore.open(self.cache_dir / state["current"][0]))
        elif state["current"] is not None:
            self._lost_cut = state["current"][1]

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
        self._drop_evaluations(cut)
        store, built = self._guarded(cut, lambda: self._find_or_make(cut, epochs_left, _BUILDING))
        self._replace_current(store)
        return store, built

    def begin_writing(
        self, cut: int, epochs_left: float, decided: bool = False, upfront: bool = True
    ) -> tuple[PartialStore | FeatureStore | None, bool]:
        """Settles what live epochs write through, as for a build, and begins the directory they write to.

        Where there are too few epochs for it, or no room for the directory and the store beside it, the store is
        built upfront, if that pays and fits.

        Args:
            cut: frozen blocks.
            epochs_left: epochs of training that remain at this cut.
            decided: whether a checkpoint has decided for it: some or all of the live epochs lie behind.
            upfront: whether a store that a build has made does as well.

        Returns:
            The directory; a store, if a complete one matches or was built; None if training goes on live. And whether
            a store was built now.

        Raises:
            ValueError: under explicit settings, if the features cannot be kept (not finite).
        """
        self._drop_evaluations(cut)
        way = _Way(PartialStore.begin, writing=True, decided=decided, upfront=upfront)
        found, made = self._guarded(cut, lambda: self._find_or_make(cut, epochs_left, way))
        if not isinstance(found, PartialStore):
            self._replace_current(found)
            return found, made
        self.holdings.add(found.path, found.reserved, built=True)
        rounds = found.views.spec.count + 1
        self.say(
            f"Cut {cut}: the features of {rounds} live epoch{'s' if rounds > 1 else ''} are written to {found.path} "
            f"({show_bytes(found.bytes)}), then replay begins.",
            logging.INFO,
        )
        return found, False

    def written(self, writing: PartialStore, store: FeatureStore) -> None:
        """Takes the store in that live epochs have written."""
        self.holdings.drop(writing.path)
        self._take(store, True)
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

    def _find_or_make(self, cut: int, epochs_left: float, way: _Way) -> tuple[Any, bool]:
        """A matching store, or what `way` makes; and whether it was made now.

        Raises:
            _Declined: if none is wanted, pays or fits.
        """
        known = self._decisions.get(cut)
        wanted = self.config.codec_at(cut, len(self.chain)) if known is None else known.codec
        first, reason = self.spec_maker.make(cut, wanted), None
        if self.config.cutmix_alpha and first.layout.grid is None:
            raise _Declined(f"cutmix pastes a box of positions, and features of shape {first.layout.shape} have none")
        for codec in [wanted] if way.writing else self.budget.codecs(wanted, first):
            images = first if codec == wanted else self.spec_maker.with_codec(first, codec)
            found = self._find(images, known, way)
            if found is not None:
                return found, False
            rounds = images.views.count + 1
            if way.writing and not way.decided and epochs_left < rounds + 1:
                reason = f"writing it takes {rounds} epochs, and {epochs_left:g} remain"
                break
            try:
                return self._make_if_it_fits(images, epochs_left, known, way), True
            except OverLimit as error:
                reason = self.budget.too_large(images, error.needed)
            except ValueError as error:
                if codec == wanted:
                    raise
                # A coarser codec than was asked for, e.g. beyond float16's range.
                reason = f"{wanted} does not fit, and {codec} fails: {error}"
        if way.writing and not way.decided:
            self.say(f"Cut {cut}: the store is built upfront, not written by training epochs: {reason}.")
            return self._find_or_make(cut, epochs_left, _BUILDING)
        raise _Declined(reason)

    def _find(self, images: StoreSpec, known: Decision | None, way: _Way) -> FeatureStore | PartialStore | None:
        """A finished store, or one that was begun."""
        spec = images
        if way.writing:
            spec = _written(images)
        elif known is not None and known.parent is not None:
            # A store is named by what it was made from.
            parent = self._decisions[known.parent].store
            spec = replace(images, made_from={**images.made_from, DEEPENED_FROM: parent})
        elif self._source_store(images, known) is not None:
            spec = self._deepened(images, self._source_store(images, known))
        store = open_matching(spec, self.group)
        if store is None and way.writing and way.upfront:
            store = open_matching(images, self.group)
        if store is not None and self.budget.holds(store, self._current):
            self._say_what_is_random(spec)
            self.say(f"Reusing the feature store {store.path} ({show_bytes(store.bytes)}).", logging.INFO)
            self._take(store, False)
            return store
        return PartialStore.reopen(spec, self.group) if way.writing else None

    def _make_if_it_fits(
        self, images: StoreSpec, epochs_left: float, known: Decision | None, way: _Way
    ) -> FeatureStore | PartialStore:
        """Makes a store, or begins it, in the first way that fits.

        Raises:
            OverLimit: if none does.
            _Declined: if it is not wanted or would not pay.
        """
        source = None if way.writing else self._source_store(images, known)
        spec = _written(images) if way.writing else images if source is None else self._deepened(images, source)
        problem = None
        for limit, replaces in self.budget.attempts(spec, self._current, copies=2 if way.writing else 1):
            if known is None and not way.decided:
                self._check_worth(spec, epochs_left, limit)
            self._say_what_is_random(spec)
            if replaces:
                self.say(
                    f"The feature store of cut {self._current.manifest.cut} goes before the one of cut {spec.cut} is "
                    "built: the budget does not hold both."
                )
                self._replace_current(None)
                if self._current is not None:
                    continue  # it could not be removed
                spec = _written(images) if way.writing else images
            try:
                made = self._make(replace(spec, limit=limit), images, None if known else epochs_left, way)
            except OverLimit as error:
                problem = error
                continue
            if way.writing:
                self._decisions.setdefault(spec.cut, Decision(spec.codec))
            else:
                self._take(made, True)
                self._say_built(made)
            return made
        raise problem or OverLimit(self.budget.needed(spec), self.budget.room() or 0)

    # What pays

    def _check_worth(self, spec: StoreSpec, epochs_left: float, room: int | None) -> None:
        """Raises _Declined if a store of this spec would not pay."""
        if self.config.cache == "always":
            return
        if epochs_left < 1:
            raise _Declined("less than one epoch remains")

        def measure() -> tuple[str | None, Any]:
            try:
                return self._prober.refuse(spec, epochs_left, room)
            except (RuntimeError, OSError) as error:  # out of memory is not worth a training; what is wrong is said
                return f"what it would save could not be measured: {error}", None

        reason, row = self.group.on_main(measure)
        if reason is not None:
            raise _Declined(reason)
        self._say_once(
            f"Cut {spec.cut}: {row.codec}, {show_bytes(row.bytes)} (base {show_bytes(row.base_bytes)}, views "
            f"{show_bytes(row.view_bytes)}); a build takes about {row.build_seconds:.1f} s and saves "
            f"{row.seconds_saved_per_epoch:.1f} s in each of {epochs_left:.3g} epochs left: it pays."
        )

    # Building

    def _make(
        self, spec: StoreSpec, images: StoreSpec, epochs_left: float | None, way: _Way
    ) -> FeatureStore | PartialStore:
        """Builds with the smallest kind of geometry that fits every view; whole views if none does.

        Args:
            spec: what to build.
            images: the same from images.
            epochs_left: epochs in which what turns out to be necessary must pay; None: it was decided before.
            way: how.

        Raises:
            OverLimit: if it does not fit.
            _Declined: if what turned out to be necessary is not wanted.
        """
        limit = spec.limit
        while True:
            try:
                return way.make(self.spec_maker.settle(spec), self.group)
            except GeometryMisfit as misfit:
                if spec.views.geometry == PROJECTIVE and not misfit.for_all_kinds:
                    views = replace(images.views, geometry=DENSE)
                    how = "Geometry is kept for every position of a feature"
                else:
                    views = ViewSpec(spec.views.count)
                    how = "Views are kept whole, whatever sensitive_fraction and sensitive_budget say"
                spec = replace(spec if way.writing else images, views=views, notes={}, limit=limit)
                needed = self.budget.needed(spec)
                self.say(f"{how} ({show_bytes(needed)} in all), because {misfit}.")
                if limit is not None and needed > limit:
                    raise OverLimit(needed, limit) from misfit
            if epochs_left is not None:
                self._check_worth(spec, epochs_left, limit)

    def _deepened(self, images: StoreSpec, source: FeatureStore) -> StoreSpec:
        """The spec with a store as its source, if that is possible."""
        reason = self.group.on_main(partial(why_not_deepen, source, images))
        if reason is not None:
            self._say_once(f"The store of cut {images.cut} is built from images, not from the one before: {reason}.")
            return images
        return deepened(
            images, source, self.spec_maker.counting(source.manifest.cut, images.cut), self.spec_maker.device
        )

    def _source_store(self, images: StoreSpec, known: Decision | None) -> FeatureStore | None:
        """The store from which a deeper one is made; built again if it is gone. None: it is made from images."""
        if known is not None:
            cut = known.parent
        else:
            cut = self._lost_cut if self._current is None else self._current.manifest.cut
            cut = cut if self.config.deepen == "cache" else None
        if cut is None or cut >= images.cut:
            return None
        if self._current is None or self._current.manifest.cut != cut:
            try:
                self._current, self._lost_cut = self._find_or_make(cut, 0, _BUILDING)[0], None
            except _Declined as reason:
                self.say(f"The store of cut {cut} cannot be built again, the deeper one comes from images: {reason}.")
                return None
        return self._current

    # Keeping count

    def _is_sound(self, path: Path) -> bool:
        """Whether a store is there; checked to the last byte if another one may be made from it."""
        try:
            store = FeatureStore.open(path)
            return self.config.deepen != "cache" or store.verify()
        except (StoreError, OSError):
            return False

    def _take(self, store: FeatureStore, built: bool) -> None:
        manifest = store.manifest
        self.holdings.add(store.path, store.total_bytes, built)
        known = self._decisions.get(manifest.cut)
        if known is None or known.store is None:
            before = self._current if DEEPENED_FROM in manifest.made_from else None
            parent = None if before is None else before.manifest.cut
            self._decisions[manifest.cut] = Decision(manifest.codec, store.path.name, parent)

    def _replace_current(self, store: FeatureStore | None) -> None:
        """A store takes the place of the one of the cut before, or none does."""
        old, self._current = self._current, store
        if old is None or (store is not None and store.path == old.path):
            return
        if not self._remove(old.path) and store is None:
            self._current = old

    def _drop_evaluations(self, cut: int) -> None:
        for path in self.holdings.evaluations_before(cut):
            self._remove(path)

    def _remove(self, path: Path) -> bool:
        """Removes a store that this training has built and needs no more; what others have built stays.

        Returns:
            Whether it does not count any more.
        """
        if self.holdings.has_built(path):
            try:
                self.group.on_main(partial(remove_store, path))
            except OSError as error:
                self.say(f"A feature store that is not needed any more could not be removed: {error}")
                return False
            self.say(f"Removed the feature store {path}: no epoch will read it any more.", logging.INFO)
        self.holdings.drop(path)
        return True

    # Saying so

    def _say_what_is_random(self, spec: StoreSpec) -> None:
        found, views = self.spec_maker.augmentation, self.config.views
        if hasattr(self.source.dataset, "set_epoch"):
            self._say_once(
                "The train data set changes with the epoch: what it is when the feature store is built is repeated in "
                "every replay epoch."
            )
        if not found.random:
            return
        if not views:
            self._say_once(
                "The train data set is random (transform or collator): what is drawn when the feature store is built "
                "is repeated in every replay epoch (views=0); augmentation ends at the freeze point."
            )
        elif not found.replayable:
            size = show_bytes(self.budget.needed(spec))
            self._say_once(
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
            f"Built the feature store {store.path} ({source}{show_bytes(store.bytes)}, {codec}, {len(store)} "
            f"samples{_describe_views(store)}): {manifest.cut} of {len(self.chain)} blocks are not run any more in "
            "training."
        )

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            self.say(message)

    def say(self, message: str, level: int = logging.WARNING) -> None:
        """Logs on the main process. What writes to the disk or ends caching is said at the default log level."""
        if self.group.rank == 0:
            logger.log(level, message)


def _written(images: StoreSpec) -> StoreSpec:
    """The spec of a store that live epochs write."""
    return replace(images, made_from={**images.made_from, WRITTEN: "write_through"})


def _describe_views(store: FeatureStore) -> str:
    spec, layout = store.views.spec, store.codec.layout
    if not spec.count:
        return ""
    views = f", {spec.count} augmented view{'s' if spec.count > 1 else ''} each"
    return f"{views}, whole" if spec.whole else f"{views}, {len(spec.channels)} of {layout.channels} channels of it"
