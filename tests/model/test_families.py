"""Models whose blocks are declared."""

import pytest
from support import zoo

from hf_freezecache import BlockChain
from hf_freezecache.model.tracing import ChainError


def test_unknown_model_names_known_types_and_the_way_out():
    with pytest.raises(ChainError, match=r"ConvNet.*not declared.*vit.*blocks="):
        BlockChain.from_model(zoo.ConvNet())
