from __future__ import annotations

import time

import pytest
from huggingface_hub import get_token
from support.hub_server import WRITER, point_client_to, serving


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of this test, which the client of this process uses with an account that may write."""
    with serving() as hub:
        point_client_to(hub.url, tmp_path / "hub-cache", monkeypatch.setattr)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        assert get_token() == WRITER
        yield hub


@pytest.fixture
def no_waits(monkeypatch):
    """Tries again at once, and notes how long it would have waited."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited
