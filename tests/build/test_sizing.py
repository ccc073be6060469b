"""Bytes that are told before a store is written are the bytes of its files."""

import pytest
from support.images import picture_dataset, replayable
from support.view_trainings import train

from hf_freezecache.build.sizing import estimate_bytes


@pytest.mark.parametrize(
    "settings", [{}, dict(views=2), dict(sensitive_fraction=1.0), dict(views=0), dict(codec="fp32")]
)
def test_estimated_bytes_are_those_of_the_files(settings, tmp_path):
    trainer, store = train(picture_dataset(100).with_transform(replayable()), tmp_path, **settings)
    spec_maker = trainer._session.spec_maker
    assert store.bytes == estimate_bytes(spec_maker.make(2, spec_maker.config.codec))
