"""A store keeper of a tiny model and tiny data, without a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hf_freezecache import BlockChain, FreezeCacheConfig
from hf_freezecache.build.context import BuildContext
from hf_freezecache.build.spec_maker import SpecMaker
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.distributed import Group
from hf_freezecache.model.inputs import ModelInputs
from hf_freezecache.training.accounting import Accounts
from hf_freezecache.training.store_keeper import StoreKeeper
from hf_freezecache.training.store_provider import StoreProvider

from .builds import Rows, collate
from .helpers import manual, tiny_vit


def make_context(
    cache_dir: Path, config: FreezeCacheConfig | None = None, model=None, dataset=None, group: Group | None = None
) -> BuildContext:
    """22 rows in ranges of 4."""
    source = RowSource(Rows() if dataset is None else dataset, collate, batch_size=4, seed=3)
    model = (tiny_vit() if model is None else model).eval()
    model_inputs = ModelInputs(model, dict, ["labels"])
    return BuildContext(
        chain=BlockChain.from_model(model, probe=model_inputs(source.probe())),
        source=source,
        config=manual("1:2") if config is None else config,
        cache_dir=cache_dir,
        group=Group() if group is None else group,
        model_inputs=model_inputs,
        precision="no",
        disable_tqdm=True,
    )


def make_keeper(
    cache_dir: Path, config: FreezeCacheConfig | None = None, explicit: bool = True, why_not=None, **settings
) -> StoreKeeper:
    context = make_context(cache_dir, config, **settings)
    accounts = Accounts(context.chain, context.model_inputs(context.source.probe()))
    provider = StoreProvider(SpecMaker(replace(context, count_run=accounts.meter.count_run)))
    return StoreKeeper(provider, accounts, explicit, why_not)


def freeze(keeper: StoreKeeper, cut: int) -> None:
    """As the session does before it asks for the source of an epoch at a deeper cut."""
    keeper.provider.chain.freeze(cut)
