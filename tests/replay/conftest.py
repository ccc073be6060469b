"""A store to replay from."""

import pytest
from support import zoo
from support.builds import build


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build(zoo.make("vit"), tmp_path_factory.mktemp("stores"))
