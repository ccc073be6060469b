"""Where a model in shards cannot be made whole, nothing is cached, and the user is told why."""

import re

import pytest
from support.helpers import tiny_vit

from hf_freezecache.distributed import Group
from hf_freezecache.model.chain import BlockChain
from hf_freezecache.model.stand_ins import FrozenOutputError
from hf_freezecache.training import shards
from hf_freezecache.training.proof import MismatchError
from hf_freezecache.training.shards import Shards


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("free_memory", lambda device: 1000, r"whole weights, .* kB on every process, and one has less memory free"),
        ("sharded_modules", lambda model: [model], "gathers weights in a way that is not known"),
    ],
)
def test_why_weights_are_not_made_whole_is_told(name, value, words, monkeypatch):
    monkeypatch.setattr(shards, name, value)
    told = []
    found = Shards(BlockChain.from_model(tiny_vit()), True, Group(), told.append)
    with found.whole():
        pass
    assert len(told) == 1 and re.search(words, told[0])


def test_a_model_that_is_not_split_is_left_alone(monkeypatch):
    monkeypatch.setattr(shards, "free_memory", lambda device: 0)
    found = Shards(BlockChain.from_model(tiny_vit()), False, Group(), pytest.fail)
    with found.whole(), found.leaving_out(2):
        pass
    found.check_repeatable(FrozenOutputError("reads samples."))
    with pytest.raises(MismatchError, match="reads samples. This step cannot be run again"):
        Shards(BlockChain.from_model(tiny_vit()), True, Group(), pytest.fail).check_repeatable(
            FrozenOutputError("reads samples.")
        )
