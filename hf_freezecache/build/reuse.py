"""Stores of earlier runs: one is used where rows all over it, computed again, are what it holds; else another is made.

A store that is refused keeps its name, since another training may read it: the new one is another *edition* of the
same fingerprint inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset
from transformers.utils import logging

from ..cache.fingerprint import digest
from ..cache.row_files import ROW_FILES, changed_rows, describe_files, files_of
from ..cache.rows import ChosenRows, RowSource
from ..cache.store import FeatureStore
from ..distributed import Announcer, describe_error
from ..rng import hash_key, preserve_rng
from .comparison import Difference, compare_rows, compare_settled
from .context import BuildContext
from .deepening import DEEPENED_FROM
from .errors import BuildFailed, GeometryMisfit, OverLimit
from .feature_sources import ImageFeatures
from .materialize import open_matching, run_views, spread
from .renewal import renew
from .row_columns import pick_rows
from .store_spec import StoreSpec

logger = logging.get_logger(__name__)

#: Entry of a fingerprint's inputs: number of the stores of the same inputs that were refused before.
EDITION = "edition"
#: Rows that are computed again: a number, or a share of the store if that is more.
_ROWS, _SHARE = 256, 0.01
#: The most classes of which a row each is computed again.
_MOST_CLASSES = 1000
#: Share of the rows that may have changed for the others to be copied instead of building a store.
_MOST_CHANGED = 0.5


@dataclass(frozen=True)
class Verdict:
    """What was found in a store of an earlier run.

    Args:
        difference: a row that is not what the sample gives now, though its files are the same.
        changed: rows whose files have changed.
    """

    difference: Difference | None = None
    changed: Sequence[int] = field(default_factory=tuple)

    @property
    def is_proved(self) -> bool:
        """Whether the store may be used."""
        return self.difference is None and not len(self.changed)


class StoreReuse:
    """Opens stores of earlier runs, proved; all processes agree.

    Args:
        context: the training.
        draws_once: whether the samples of a store, by its fingerprint's inputs, were drawn in a way that cannot be
            repeated: then what no draw changes is compared.
    """

    def __init__(
        self, context: BuildContext, draws_once: Callable[[Mapping[str, Any]], bool] = lambda made_from: False
    ):
        self.context, self.group, self._draws_once = context, context.group, draws_once
        self.announcer = Announcer(self.group, logger)
        self._editions: dict[str, int] = {}
        self._renewed: set[str] = set()
        self._refused: set[str] = set()

    def current(self, spec: StoreSpec) -> StoreSpec:
        """The spec under the name that a new store gets: that of the first edition that was not refused."""
        edition = self._editions.get(_key(spec), 0)
        made_from = {name: value for name, value in spec.made_from.items() if name != EDITION}
        return replace(spec, made_from={**made_from, EDITION: edition} if edition else made_from)

    def has_made(self, store: FeatureStore) -> bool:
        """Whether a store was made here, from one of which some rows had changed."""
        return store.path.name in self._renewed

    def refuse(self, store: FeatureStore) -> None:
        """Does not open a store again, if its directory still exists."""
        if store.path.exists():
            self._refused.add(store.path.name)

    def open(self, spec: StoreSpec) -> FeatureStore | None:
        """The store of a spec, proved; made from an earlier one where only the files of some rows have changed.

        Returns:
            None if there is none, or none that is right: `current` tells where to make it.

        Raises:
            BuildFailed: if files cannot be read, or not by every process.
        """
        outdated: tuple[FeatureStore, Sequence[int]] | None = None
        while True:
            current = self.current(spec)
            store = self._open_or_fetch(current)
            if store is None:
                return None if outdated is None else self._renew(current, *outdated)
            if not any(self.group.gather(store.path.name in self._refused)):
                verdict = self._judge(current, store)
                if verdict.is_proved:
                    return store
                self._announce(store, verdict)
                if verdict.difference is None and self._can_renew(store, verdict):
                    outdated = store, verdict.changed
            self._editions[_key(spec)] = self._editions.get(_key(spec), 0) + 1

    def upload(self, store: FeatureStore) -> None:
        """Uploads a store that was built, for other machines, where there is a place for that."""
        remote = self.context.remote
        if remote is not None:
            self.group.on_main(lambda: remote.upload(store.path))

    def _open_or_fetch(self, spec: StoreSpec) -> FeatureStore | None:
        store, remote = open_matching(spec, self.group), self.context.remote
        if store is not None or remote is None:
            return store
        self.group.on_main(lambda: remote.fetch(spec.path))
        return open_matching(spec, self.group)

    # Proof

    def _judge(self, spec: StoreSpec, store: FeatureStore) -> Verdict:
        try:
            with preserve_rng():
                changed = self.group.on_main(lambda: self._changed(spec, store))
                rows = self.group.on_main(lambda: self._rows(spec, store, changed))
                difference = self._prove(spec, store, rows, set(changed))
        except OSError as error:
            raise BuildFailed(str(error)) from error
        return Verdict(difference, changed)

    def _prove(
        self, spec: StoreSpec, store: FeatureStore, rows: Sequence[int], changed: set[int]
    ) -> Difference | None:
        """The first row that differs.

        Rows are computed in new company. Where one differs then, or their company cannot be collated, the ranges of a
        build decide; and so they do where random numbers depend on the range.
        """
        if "batch_size" not in spec.made_from:
            found = self.group.gather(self._compare_rows(spec, store, rows, changed))
            if all(outcome is None for outcome in found):
                return None
            if all(isinstance(outcome, Difference | None) for outcome in found):
                rows = [outcome.sample for outcome in found if outcome is not None]
        numbers = _ranges_of(rows, spec.source)[self.group.rank :: self.group.size]
        whole = self._from_images(spec, store, spec.source)
        found = self.group.gather(self.group.on_all(lambda: self._compare(whole, store, numbers, changed)))
        return next((difference for difference in found if difference is not None), None)

    def _changed(self, spec: StoreSpec, store: FeatureStore) -> list[int]:
        before = store.read_note(ROW_FILES)
        if before is None:
            return []
        files = files_of(spec.source.dataset)
        if files is None:
            return list(range(len(store)))
        return changed_rows(before, describe_files(files, content=self.context.config.reuse == "content"))

    def _rows(self, spec: StoreSpec, store: FeatureStore, changed: Sequence[int]) -> list[int]:
        """Rows to compute again, spread over the store, without those that are known to have changed."""
        total, generator = (
            len(store),
            np.random.default_rng(hash_key("reuse", store.manifest.fingerprint, spec.source.seed)),
        )
        wanted = max(_ROWS, int(_SHARE * total))
        rows = {0, total - 1, *_source_ends(spec.source.dataset)}
        rows |= {round(row) for row in np.linspace(0, total - 1, wanted // 2)}
        rows |= _one_of_each_class(store)
        rows -= set(changed)
        others = np.setdiff1d(np.arange(total), [*rows, *changed])
        drawn = generator.permutation(others)[: max(0, wanted - len(rows))]
        return sorted(rows | set(drawn.tolist()))

    def _compare_rows(
        self, spec: StoreSpec, store: FeatureStore, rows: Sequence[int], changed: set[int]
    ) -> Difference | Exception | None:
        """Compares this process's share of the rows, without the others of their ranges."""
        source = ChosenRows(spec.source, rows[self.group.rank :: self.group.size])
        chosen = self._from_images(spec, store, source)
        try:
            return self._compare(chosen, store, range(source.num_ranges), changed)
        except Exception as error:  # in the build's ranges it is raised again, if it is the rows' own
            Announcer.survived(logger, "Rows of several ranges could not be computed together", error)
            return RuntimeError(describe_error(error))

    def _compare(
        self, spec: StoreSpec, store: FeatureStore, numbers: Sequence[int], changed: set[int]
    ) -> Difference | None:
        drawn_once = self._draws_once(spec.made_from)
        runs = spec.feature_source.run(numbers, 1, own_features=False) if drawn_once else run_views(spec, numbers)
        for number, view_runs in runs:
            samples = spec.source.rows(number)
            places = np.array([place for place, row in enumerate(samples) if row not in changed], np.int64)
            if not len(places):
                continue
            unchanged = [samples[place] for place in places.tolist()]
            picked = [pick_rows(view_run, places) for view_run in view_runs]
            found = (compare_rows(store, unchanged, view, view_run) for view, view_run in enumerate(picked))
            if drawn_once:
                found = (compare_settled(store, unchanged, draws) for draws in [picked])
            difference = next((each for each in found if each is not None), None)
            if difference is not None:
                return difference
        return None

    def _from_images(
        self,
        spec: StoreSpec,
        store: FeatureStore,
        source: RowSource,
        count_run: Callable[..., None] | None = None,
    ) -> StoreSpec:
        """The spec for rows of a source as a build would compute them with the store's views."""
        features = ImageFeatures(spec.chain, spec.cut, source, spec.layout, self.context.model_inputs, count_run)
        return replace(spec, source=source, feature_source=features, views=store.views.spec)

    # Changed files

    def _can_renew(self, store: FeatureStore, verdict: Verdict) -> bool:
        return DEEPENED_FROM not in store.manifest.made_from and len(verdict.changed) <= _MOST_CHANGED * len(store)

    def _renew(self, spec: StoreSpec, store: FeatureStore, changed: Sequence[int]) -> FeatureStore | None:
        images = self._from_images(spec, store, spec.source, self.context.count_run)
        notes = self.group.on_main(lambda: file_notes(spec.source.dataset, self.context.config.reuse))
        try:
            renewed = renew(replace(images, notes=notes), store, changed, self.group)
        except (GeometryMisfit, OverLimit) as error:
            self.announcer.warning(f"The changed samples do not fit the feature store {store.path}: {error}.")
            return None
        self._renewed.add(renewed.path.name)
        self.upload(renewed)
        return renewed

    def _announce(self, store: FeatureStore, verdict: Verdict) -> None:
        if verdict.difference is not None:
            self.announcer.warning(
                f"The feature store {store.path} of an earlier run is not used: {verdict.difference}. Likely cause: "
                f"{verdict.difference.likely_cause}."
            )
        else:
            consequence = "only they are computed again" if self._can_renew(store, verdict) else "a new one is made"
            self.announcer.warning(
                f"{len(verdict.changed)} of {len(store)} samples, the first of them {verdict.changed[0]}, have other "
                f"files than when the feature store {store.path} was made: {consequence}."
            )


def _ranges_of(rows: Sequence[int], source: RowSource) -> list[int]:
    """Ranges of a build, spread as the rows are, that hold about as many rows."""
    numbers = sorted({row // source.batch_size for row in rows})
    count = min(len(numbers), max(2, -(-len(rows) // source.batch_size)))
    return [numbers[place] for place in spread(len(numbers), count)]


def file_notes(dataset: Any, reuse: str) -> dict[str, dict[str, torch.Tensor]]:
    """The note of a store that describes the files of its rows; empty if the data set names none.

    Args:
        dataset: map-style data set.
        reuse: the setting of that name.
    """
    files = files_of(dataset)
    return {} if files is None else {ROW_FILES: describe_files(files, content=reuse == "content")}


def _key(spec: StoreSpec) -> str:
    return digest({name: value for name, value in spec.made_from.items() if name != EDITION})


def _source_ends(dataset: Any) -> set[int]:
    """First and last row of each data set of a `ConcatDataset`."""
    if not isinstance(dataset, ConcatDataset):
        return set()
    ends = [0, *dataset.cumulative_sizes]
    return {row for end in ends for row in (end - 1, end) if 0 <= row < ends[-1]}


def _one_of_each_class(store: FeatureStore) -> set[int]:
    rows: set[int] = set()
    for name, column in store.manifest.inputs.items():
        if column.is_list or column.shape or column.dtype not in ("int64", "int32", "uint8", "bool"):
            continue
        values = store.read_input(name, column, np.arange(len(store))).numpy()
        _, first = np.unique(values, return_index=True)
        rows |= set(first.tolist()) if len(first) <= _MOST_CLASSES else set()
    return rows
