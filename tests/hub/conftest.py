from __future__ import annotations

import time

import pytest
import transformers.utils.hub
from huggingface_hub import constants, get_token
from support.hub_server import WRITER, serving


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of this test, which the client of this process uses with an account that may write."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        assert get_token() == WRITER
        yield hub


@pytest.fixture
def no_waits(monkeypatch):
    """Tries again at once, and notes how long it would have waited."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited
