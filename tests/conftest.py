"""Puts this folder on the path (`from support.helpers import ...`), keeps torch to one thread, and stops the clock."""

import gc
import sys
import time
from pathlib import Path

import pytest
import torch
from slow_tests import LONG, MANY_CASES

from hf_freezecache.distributed import Announcer

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
# What only a bug raises is never survived in tests: not under the default settings either.
Announcer.raises = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
)


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items):
    """Marks tests that are long, and cases of tests with many of them, as slow."""
    tests, seen = Path(__file__).parent, {}
    for item in items:
        path, name = item.path.relative_to(tests).as_posix(), getattr(item, "originalname", item.name)
        if name in MANY_CASES.get(path, ()):
            case = seen[path, name] = seen.get((path, name), -1) + 1
            if case % 8:
                item.add_marker(pytest.mark.slow)
        elif name in LONG.get(path, ()):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish(session):
    """Takes what was imported out of garbage collection: each training begins with one, a third of a second long."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()  # libraries report what is not collected when the interpreter ends


@pytest.fixture
def clock(monkeypatch):
    """Stops the clock that the package measures with; `clock(seconds)` moves it on."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance
