"""Finding or making the store of one cut: which codec fits, whether it pays, from samples or from the store before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..augment.geometry import DENSE, PROJECTIVE
from ..build.deepening import DEEPENED_FROM, why_not_deepen
from ..build.errors import BuildFailed, GeometryMisfit, OverLimit
from ..build.materialize import materialize
from ..build.partial import PartialStore
from ..build.spec_maker import WRITTEN, SpecMaker
from ..build.store_spec import StoreSpec
from ..cache.holdings import is_owned
from ..cache.shares import Share
from ..cache.store import FeatureStore, remove_store
from ..cache.view_columns import ViewSpec
from ..distributed import Announcer, describe_error
from ..estimate.pace import Pace
from ..units import show_bytes
from .announcements import (
    NO_VIEWS,
    OTHER_NODES,
    describe_built,
    describe_draws,
    describe_rows,
    describe_unshared,
    describe_views,
)
from .budget import StoreBudget
from .disks import Disks, owned_stores
from .store_requests import Attempt, Decision, Request
from .worth import Declined, StoreWorth

logger = logging.get_logger(__name__)


class StoreProvider:
    """Finds or makes stores.

    Args:
        spec_maker: describes them.

    Attributes:
        decisions: the choice at every cut so far.
        counts: rows of every node, where each stores its share; None until the training's loader is known.
    """

    counts: tuple[int, ...] | None = None

    def __init__(self, spec_maker: SpecMaker):
        self.spec_maker, context = spec_maker, spec_maker.context
        self.config, self.group, self.chain, self.source = context.config, context.group, context.chain, context.source
        self.cache_dir = context.cache_dir
        self.announcer = Announcer(self.group, logger)
        self.disks = Disks(self.group, context.disk)
        self.budget = StoreBudget(self.config, self.group, self.cache_dir, self.disks)
        self.holdings = self.budget.holdings
        if self.disks.are_many:
            self.holdings.owner = self.group.broadcast(self.holdings.owner)
        if context.remote is not None:
            context.remote.limit = self.budget.limit_of
        # Of this node's store, which is there, while other nodes have to build theirs.
        self._found: FeatureStore | None = None
        self.decisions: dict[int, Decision] = {}
        # Whether the running request has deleted the stores of earlier cuts: the budget does not hold both.
        self._parent_deleted = False
        self.worth = StoreWorth(spec_maker, self.announcer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training must know, as JSON values."""
        return {
            "decisions": {str(cut): asdict(decision) for cut, decision in self.decisions.items()},
            "channel_weights": {str(cut): weights.tolist() for cut, weights in self.spec_maker.weights.items()},
            "stores": self.holdings.state_dict(),
            "owner": self.holdings.owner,
            "unknown": self.spec_maker.unknown,
            "counts": self.counts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()`; stores that are gone do not count any more."""
        self.decisions = {int(cut): Decision(**fields) for cut, fields in state["decisions"].items()}
        self.spec_maker.weights = {int(cut): torch.tensor(values) for cut, values in state["channel_weights"].items()}
        self.spec_maker.unknown = state.get("unknown", self.spec_maker.unknown)
        counts = state.get("counts")
        if self.counts != (None if counts is None else tuple(counts)):
            self.announcer.warning(OTHER_NODES)
        owner = state.get("owner", self.holdings.owner)
        existing = self.disks.on_main(
            lambda: (
                owned_stores(self.cache_dir, owner)  # the checkpoint's main process knows those of its own disk only
                if self.disks.are_many
                else [entry for entry in state["stores"] if (self.cache_dir / entry["name"]).exists()]
            )
        )
        self.holdings.load_state_dict(existing, self.cache_dir)
        self.holdings.owner = owner

    def why_hopeless(self, cut: int, epochs_left: float, pace: Pace | None = None) -> str | None:
        """Why no store pays at a cut where nothing was decided yet; see `StoreWorth.why_hopeless`."""
        return None if cut in self.decisions else self.worth.why_hopeless(cut, epochs_left, pace)

    def build(self, request: Request) -> FeatureStore:
        """Opens the matching store or builds it.

        Raises:
            Declined: if no store pays or fits.
            BuildFailed: if it could not be written.
            ValueError: if the features cannot be stored (not finite, of several sizes).
        """
        self._parent_deleted = False
        return self._complete(Attempt(request, self.decisions.get(request.cut)))

    def begin(self, request: Request, decided: bool = False, accept_built: bool = True) -> PartialStore | FeatureStore:
        """Begins the directory that live epochs write to, or goes on with one that was begun.

        Where too few epochs are left for it, or no room for the directory and the store beside it, the store is built
        upfront, if that pays and fits.

        Args:
            request: what is asked.
            decided: whether a checkpoint has decided for it: some or all of the live epochs are over.
            accept_built: whether a store that a build has made does as well.

        Returns:
            The directory; or a store, if a complete one matches or was built upfront.

        Raises:
            Declined: if no store pays or fits.
            BuildFailed: if it could not be written.
            ValueError: if the features cannot be stored (not finite).
        """
        self._parent_deleted = False
        attempt = Attempt(request, self.decisions.get(request.cut), True, decided, accept_built)
        store = self._find_or_make(attempt)
        if isinstance(store, PartialStore):
            self.holdings.add(store.path, store.reserved, built=True, cut=request.cut)
            rounds = store.views.spec.count + 1
            self.announcer.warning(
                f"Cut {request.cut}: {rounds} live epoch{'s' if rounds > 1 else ''} write{'' if rounds > 1 else 's'} "
                f"the features to {store.path} ({show_bytes(store.bytes)}), then replay begins."
            )
        return store

    def finish(self, partial_store: PartialStore, request: Request) -> FeatureStore:
        """Completes a store that live epochs have written.

        Raises:
            BuildFailed: if some process could not write.
            GeometryMisfit: if a missing view's geometry cannot be stored as it was begun.
            ValueError: if a missing feature is not finite.
        """
        store = partial_store.finish()
        self.holdings.drop(partial_store.path)
        if partial_store.reopened:  # its rows are believed as little as those of a store of an earlier run
            proved = self.spec_maker.reuse.open(partial_store.spec)
            if proved is None or proved.path != store.path:
                self.group.on_main(partial(remove_store, store.path))
            if proved is None:
                raise BuildFailed("rows that an earlier run has written are not what the samples give now")
            store = proved
        self.spec_maker.reuse.upload(store)
        self._register(store)
        request.phase.set_store(store.bytes)
        self._announce_built(store)
        return store

    def lose(self, store: FeatureStore) -> None:
        """Forgets a store that cannot be read any more: another one is made if it is asked for."""
        self.spec_maker.reuse.refuse(store)
        self.holdings.drop(store.path)

    def remove_outdated(self, cut: int, in_use: Path | None = None, evaluations_only: bool = False) -> None:
        """Deletes the stores that no epoch reads any more and that this training has built; the others are forgotten.

        Args:
            cut: frozen blocks.
            in_use: directory of the store of this cut; None if there is none.
            evaluations_only: leave the stores of the training set.
        """
        self._remove(self.holdings.outdated(cut, () if in_use is None else (in_use,), evaluations_only))

    def _remove(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if self.holdings.has_built(path):
                try:
                    self.disks.on_main(partial(remove_store, path))
                except OSError as error:  # it still counts, and the next change of the cut tries again
                    self.announcer.failure("A feature store that is not needed any more could not be deleted", error)
                    continue
                self.announcer.info(f"Deleted the feature store {path}: no epoch will read it any more.")
            self.holdings.drop(path)

    # Finding and making

    def _complete(self, attempt: Attempt) -> FeatureStore:
        store = self._find_or_make(attempt)
        assert isinstance(store, FeatureStore), "only a request for writing returns a directory"
        return store

    def _find_or_make(self, attempt: Attempt) -> FeatureStore | PartialStore:
        cut = attempt.request.cut
        codec = self.config.codec_at(cut, len(self.chain)) if attempt.decision is None else attempt.decision.codec
        if attempt.is_open:
            self.worth.check_early(cut, attempt.request.epochs_left, attempt.request.pace)
        first = self.spec_maker.make(cut, codec)
        if self.disks.are_many:
            return self._find_or_make_like(self._share_of(first), codec, attempt)
        if self.config.share_store and attempt.request.is_first:
            why = self.group.on_main(self.spec_maker.why_not_of_whole)
            if why is not None:
                self.announcer.warning_once(describe_unshared(why))
            try:
                whole = self.spec_maker.of_whole(first)
                if whole is not None:
                    return self._find_or_make_like(whole, codec, attempt)
            except Exception as error:  # of rows that this training does not need: it does without them
                self.announcer.failure(
                    f"Cut {cut}: a store of all rows, which share_store asks for, cannot be made. This training "
                    "builds one of its own rows",
                    error,
                )
        return self._find_or_make_like(first, codec, attempt)

    def _share_of(self, spec: StoreSpec) -> StoreSpec:
        """The spec of the store of this process's node.

        Raises:
            Declined: if its rows have no common size.
        """
        if spec.layout.is_token or spec.layout.is_trimmed:
            raise Declined("cache_scope='node' stores rows of one size, and these samples have several")
        assert self.counts is not None  # the loader is made before the first epoch
        share = Share(self.counts, self.disks.node, self.source.seed, spec.cut)
        return self.spec_maker.of_share(spec, share)

    def _find_or_make_like(self, first: StoreSpec, codec: str, attempt: Attempt) -> FeatureStore | PartialStore:
        """A store of the rows of a spec, with a codec that fits."""
        cut, reason = attempt.request.cut, ""
        if self.config.cutmix_alpha and first.layout.grid is None:
            raise Declined(f"cutmix pastes a box of positions, and features of shape {first.layout.shape} have none")
        for candidate in [codec] if attempt.writing else self.budget.codecs(codec, first):
            images = first if candidate == codec else self.spec_maker.with_codec(first, candidate)
            store = self._find(images, attempt)
            if store is not None:
                return store
            rounds = images.views.count + 1
            if attempt.writing and self.spec_maker.is_of_whole(images):
                reason = "epochs write the rows of this training, not all that share_store stores"
                break
            if attempt.writing and (images.layout.is_token or images.layout.is_trimmed):
                reason = "epochs write rows of one size, and these samples have several"
                break
            if attempt.writing and not attempt.decided and attempt.request.epochs_left < rounds + 1:
                reason = f"writing it takes {rounds} epochs, and {attempt.request.epochs_left:g} remain"
                break
            try:
                return self._make_if_it_fits(images, attempt)
            except OverLimit as error:
                reason = self.budget.too_large(images, error.needed)
            except ValueError as error:
                if candidate == codec:
                    raise
                # A coarser codec than the configured one, e.g. beyond float16's range.
                reason = f"`{codec}` does not fit, and `{candidate}` fails: {describe_error(error)}"
        if attempt.writing and not attempt.decided:
            self.announcer.warning(f"Cut {cut}: a build makes the store, not live epochs, because {reason}.")
            return self._find_or_make(replace(attempt, writing=False))
        raise Declined(reason)

    def _find(self, images: StoreSpec, attempt: Attempt) -> FeatureStore | PartialStore | None:
        """A complete store, or one that was begun."""
        spec, decision, cut = images, attempt.decision, attempt.request.cut
        if attempt.writing:
            spec = self.spec_maker.written(images)
        elif decision is not None and decision.parent is not None:
            parent = self.decisions[decision.parent].store
            spec = images if parent is None else self.spec_maker.deepened_name(images, parent)
        else:
            spec = self._deepened(images, attempt)
        spec, images = self._owned(spec), self._owned(images)
        store = self.disks.on_all(lambda: self._open(spec))
        if store is None and (not attempt.writing or attempt.accept_built) and not self.disks.are_many:
            store = (self._open(images) if attempt.writing else None) or self._open_whole(images)
        store = store if store is not None and self.budget.holds(store) else None
        self._found = store if self.disks.are_many else None
        if self.disks.all(store is not None):
            assert store is not None
            self._announce_randomness(spec)
            self.announcer.warning(
                f"Reusing the feature store {store.path} ({show_bytes(store.bytes)}, {store.manifest.codec}, "
                f"{describe_rows(store)}{describe_views(store)}): training does not run {cut} of {len(self.chain)} "
                "blocks any more."
            )
            self._register(store)
            return store
        return PartialStore.reopen(self.spec_maker.reuse.current(spec), self.group) if attempt.writing else None

    def _owned(self, spec: StoreSpec) -> StoreSpec:
        """The spec as this training's; a store that others share is nobody's."""
        return spec if self.spec_maker.is_of_whole(spec) else replace(spec, owner=self.holdings.owner)

    def _open(self, spec: StoreSpec | None) -> FeatureStore | None:
        store = None if spec is None else self.spec_maker.reuse.open(spec)
        return None if store is None or spec is None else self.spec_maker.rows_of(store, spec)

    def _open_whole(self, images: StoreSpec) -> FeatureStore | None:
        """A store of all rows that the samples are selected from, as the rows of the samples."""
        try:  # to tell which store it is takes reading all rows
            is_there = self.group.on_main(self.worth.may_be_there)
            return self._open(self.spec_maker.of_whole(images)) if is_there else None
        except Exception as error:  # the user's data set may raise anything for rows that were left out
            Announcer.survived(logger, "The rows that the train data set leaves out cannot be read", error)
            return None

    def _make_if_it_fits(self, images: StoreSpec, attempt: Attempt) -> FeatureStore | PartialStore:
        """Makes a store, or begins it, in the first way that fits.

        Raises:
            OverLimit: if none does.
            Declined: if it would not pay.
        """
        spec = self.spec_maker.written(images) if attempt.writing else self._deepened(images, attempt)
        problem = None
        for limit, deletes_outdated in self.budget.attempts(spec, copies=2 if attempt.writing else 1):
            if attempt.is_open:
                self.worth.check(spec, attempt.request.epochs_left, limit, attempt.request.pace)
            self._announce_randomness(spec)
            if deletes_outdated:
                self.announcer.warning(
                    f"The feature stores of earlier cuts and trainings are deleted before the one of cut {spec.cut} "
                    "is built: the budget does not hold both."
                )
                self._remove(self.budget.outdated(spec))
                self._parent_deleted = True
                if self.disks.any(bool(self.budget.outdated(spec))):
                    continue  # one could not be deleted
                spec = self.spec_maker.written(images) if attempt.writing else images
            try:
                return self._make(replace(self._owned(spec), limit=limit), images, attempt)
            except OverLimit as error:
                problem = error
        raise problem or OverLimit(self.budget.needed(spec), self.budget.limit() or 0)

    def _make(self, spec: StoreSpec, images: StoreSpec, attempt: Attempt) -> FeatureStore | PartialStore:
        """Makes a store with the smallest kind of geometry that fits every view; with whole views if none does.

        Args:
            spec: what to make.
            images: the same from samples.
            attempt: how.

        Raises:
            OverLimit: if it does not fit.
            Declined: if what turned out to be necessary would not pay.
        """
        while True:
            try:
                settled = self.spec_maker.settle(self.spec_maker.reuse.current(spec))
                if attempt.writing:
                    partial_store = PartialStore.begin(settled, self.group)
                    self.decisions.setdefault(spec.cut, Decision(spec.codec, written=True))
                    return partial_store
                store = self._built(settled)
            except GeometryMisfit as misfit:
                spec = self._with_larger_geometry(spec if attempt.writing else images, spec, misfit)
            else:
                self._register(store)
                attempt.request.phase.set_store(store.bytes)
                self._announce_built(store)
                return store
            if attempt.decision is None:
                self.worth.check(spec, attempt.request.epochs_left, spec.limit, attempt.request.pace)

    def _built(self, spec: StoreSpec) -> FeatureStore:
        """Builds a store; where each node has its own, on those where none was found."""

        def build() -> FeatureStore:
            store = materialize(spec, self.disks.group)
            self.spec_maker.reuse.upload(store)
            return self.spec_maker.rows_of(store, spec)

        return self.disks.build(self._found, build, self.announcer)

    def _with_larger_geometry(self, base: StoreSpec, spec: StoreSpec, misfit: GeometryMisfit) -> StoreSpec:
        """The next larger way to store views.

        Args:
            base: the spec to change.
            spec: the one that did not fit.
            misfit: why.

        Raises:
            OverLimit: if the next larger way takes more bytes than `spec.limit`.
        """
        if spec.views.geometry == PROJECTIVE and not misfit.for_all_kinds:
            views = replace(base.views, geometry=DENSE)
            consequence = "The store holds the geometry of every position of a feature"
        else:
            views = ViewSpec(spec.views.count)
            consequence = "The store holds whole views, whatever sensitive_fraction and sensitive_budget are"
        spec = replace(base, views=views, notes={}, limit=spec.limit, owner=spec.owner)
        needed = self.budget.needed(spec)
        self.announcer.warning(f"{consequence} ({show_bytes(needed)} in all), because {misfit}.")
        if spec.limit is not None and needed > spec.limit:
            raise OverLimit(needed, spec.limit) from misfit
        return spec

    # Deepening

    def _deepened(self, images: StoreSpec, attempt: Attempt) -> StoreSpec:
        """The spec with the store before as its source, where that is configured and possible."""
        parent = self._open_parent(images, attempt)
        if parent is None:
            return images
        reason = self.group.on_main(partial(why_not_deepen, parent, images))
        if reason is not None:
            self.announcer.warning_once(
                f"Building the store for cut {images.cut} from samples; the store at cut {parent.manifest.cut} cannot "
                f"be extended because {reason}."
            )
            return images
        return self.spec_maker.deepened(images, parent)

    def _open_parent(self, images: StoreSpec, attempt: Attempt) -> FeatureStore | None:
        """The store from which a deeper one is made; built again if it is gone. None: the deeper one needs samples."""
        if self._parent_deleted:
            return None
        parent = attempt.request.parent
        cut: int | None
        store: FeatureStore | None
        if isinstance(parent, FeatureStore):
            cut, store = parent.manifest.cut, parent
        else:
            cut, store = parent, None
        if attempt.decision is not None:
            store = store if cut == attempt.decision.parent else None
            cut = attempt.decision.parent
        elif self.config.deepen != "cache":
            return None
        if cut is None or cut >= images.cut:
            return None
        if store is not None:
            return store
        request = Request(cut, 0, attempt.request.phase)
        try:
            return self._complete(Attempt(request, self.decisions.get(cut)))
        except Declined as reason:
            self.announcer.warning(
                f"The store of cut {cut} cannot be built again, so the deeper one is built from samples: {reason}."
            )
            return None

    # Records and messages

    def _register(self, store: FeatureStore) -> None:
        manifest, owner = store.manifest, self.holdings.owner
        built = self.disks.on_main(lambda: is_owned(store.path, owner))
        if self.disks.group.is_main:
            store.hold()
        self.holdings.add(store.path, store.total_bytes, built, manifest.cut)
        decision = self.decisions.get(manifest.cut)
        if decision is None or decision.store != store.path.name:
            origin = manifest.made_from.get(DEEPENED_FROM)
            parents = [cut for cut, other in self.decisions.items() if origin is not None and other.store == origin]
            parent = parents[0] if parents else None
            written = WRITTEN in manifest.made_from
            self.decisions[manifest.cut] = Decision(manifest.codec, store.path.name, parent, written)

    def _announce_randomness(self, spec: StoreSpec) -> None:
        augmentation, views = self.spec_maker.augmentation, self.config.views
        if hasattr(self.source.dataset, "set_epoch"):
            self.announcer.warning_once(
                "The train data set changes with the epoch: every replay epoch repeats its state at the time when the "
                "feature store is built."
            )
        if augmentation is None or not augmentation.random:
            return
        if not views:
            self.announcer.warning_once(NO_VIEWS)
        elif not augmentation.replayable:
            self.announcer.warning_once(describe_draws(augmentation.why_not, views + 1, self.budget.needed(spec)))

    def _announce_built(self, store: FeatureStore) -> None:
        manifest = store.manifest
        if not self.holdings.has_built(store.path) and not store.is_selection:
            self.announcer.warning(f"Using the feature store {store.path}, which another run has built meanwhile.")
            return
        configured = self.config.codec_at(manifest.cut, len(self.chain))
        self.announcer.warning(describe_built(store, configured, DEEPENED_FROM in manifest.made_from, len(self.chain)))
