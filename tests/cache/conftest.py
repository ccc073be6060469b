"""A small model, a store of its features, and a copy of it that a test may damage."""

import shutil

import pytest
from support import zoo
from support.builds import build

from hf_freezecache import FeatureStore


@pytest.fixture(scope="module")
def model():
    return zoo.make("vit")


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    return build(model, tmp_path_factory.mktemp("stores"))


@pytest.fixture
def store(built, tmp_path):
    """A copy that a test may damage."""
    return FeatureStore.open(shutil.copytree(built.path, tmp_path / built.path.name))
