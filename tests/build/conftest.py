"""A small model to build from."""

import pytest
from support import zoo


@pytest.fixture(scope="module")
def model():
    return zoo.make("vit")
