"""A store made from another one of which the files of some rows have changed: the other rows are copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cache.directories import discard_aside
from ..cache.manifest import Shard, StoreError
from ..cache.names import shard_name
from ..cache.rows import BatchSplit
from ..cache.shards import ShardWriter, input_columns
from ..cache.store import FeatureStore
from ..distributed import Group
from ..rng import preserve_rng
from .errors import BuildFailed, NotWritable
from .materialize import claim, complete_store, encode_range, open_everywhere, run_views
from .store_spec import StoreSpec


def renew(spec: StoreSpec, store: FeatureStore, changed: Sequence[int], group: Group) -> FeatureStore:
    """Writes a store whose changed rows are computed from samples and whose other rows are those of another store.

    The ranges of the build that hold changed rows run as a whole, so that the bits are those of a build; only the
    changed rows of them are taken. Codec and views are the other store's.

    Args:
        spec: of the new store; its views are those of the other store, and its features come from samples.
        store: the other store.
        changed: row numbers.
        group: the processes.

    Raises:
        NotWritable: on every process, if nothing can be written to the directory.
        BuildFailed: if some process could not write or read; nothing is left behind.
        GeometryMisfit: on every process, if a changed view's geometry cannot be stored as the other store's are.
        ValueError: if a feature is not finite or a batch cannot be stored per row.
    """
    try:
        with preserve_rng():
            probe = spec.split(spec.source.probe())
            aside = claim(spec, group)
            if isinstance(aside, FeatureStore):
                return aside
            try:
                shards = group.gather(
                    group.on_all(lambda: _write_shard(spec, store, set(changed), aside, probe, group))
                )
                group.on_main(lambda: complete_store(spec, aside, store.codec, probe, shards))
            except BaseException:
                if group.is_main:
                    discard_aside(aside)
                raise
            return open_everywhere(spec, group)
    except NotWritable:
        raise
    except (OSError, StoreError) as error:
        raise BuildFailed(str(error)) from error


def _write_shard(
    spec: StoreSpec, store: FeatureStore, changed: set[int], aside: Path, probe: BatchSplit, group: Group
) -> Shard:
    source, mine = spec.source, group.my_ranges(spec.source.num_ranges)
    fresh = run_views(spec, [number for number in mine if changed.intersection(source.rows(number))])
    path = aside / shard_name(group.rank, group.size)
    names = [*store.codec.columns, *store.views.columns]
    columns = input_columns(store.manifest.inputs, store.views.spec)
    with ShardWriter(path, store.codec, store.views, probe.describe(), spec.lossless) as writer:
        for number in mine:
            rows = list(source.rows(number))
            codes: dict[str, Any] = store.read_codes(names, rows)
            inputs = {name: store.read_input(name, column, rows) for name, column in columns.items()}
            places = [place for place, row in enumerate(rows) if row in changed]
            if places:
                new_codes, new_inputs = encode_range(spec, store.codec, store.views, probe, next(fresh)[1], rows)
                for old, new in ((codes, new_codes), (inputs, new_inputs)):
                    for name in new:
                        for place in places:
                            old[name][place] = new[name][place]
            writer.write(rows[0], codes, inputs)
    return writer.shard()
