"""What a trainer's running or last training is made of."""

from __future__ import annotations

from hf_freezecache.build.spec_maker import SpecMaker
from hf_freezecache.cache.rows import RowSource
from hf_freezecache.model.chain import BlockChain
from hf_freezecache.training.session import FreezeSession


def session_of(trainer) -> FreezeSession:
    assert trainer._session is not None, "nothing was trained"
    return trainer._session


def chain_of(trainer) -> BlockChain:
    return session_of(trainer).chain


def rows_of(trainer) -> RowSource:
    return session_of(trainer).context.source


def spec_maker_of(trainer) -> SpecMaker:
    return session_of(trainer).keeper.provider.spec_maker
