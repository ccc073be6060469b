"""Memory that is freed inside a build stays with the process, and is given back behind it."""

import resource
from unittest.mock import Mock

import pytest
import torch

from hf_freezecache.build import kept_memory
from hf_freezecache.build.kept_memory import memory_kept

MEGABYTES = 2**18  # float32 values

needs_glibc = pytest.mark.skipif(kept_memory._glibc() is None, reason="glibc alone has these thresholds")


@pytest.fixture(autouse=True)
def without_settings_of_the_user(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def pages_of_batches() -> int:
    """Pages that the system hands out while blocks of 100 MB are taken and given back eight times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.zeros(100 * MEGABYTES).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@needs_glibc
def test_blocks_are_used_again_inside_and_given_back_behind():
    outside = pages_of_batches()
    with memory_kept():
        pages_of_batches()
        inside, held = pages_of_batches(), resident()
    assert inside < outside / 4
    assert resident() < held - 50 * 2**20


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=131072")]
)
def test_thresholds_of_the_user_are_left_alone(name, value, monkeypatch):
    libc = Mock()
    monkeypatch.setattr(kept_memory, "_glibc", lambda: libc)
    with memory_kept():
        assert libc.mallopt.call_count == 2  # where the user has set nothing
    libc.reset_mock()
    monkeypatch.setenv(name, value)
    with memory_kept():
        pass
    assert not libc.method_calls


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(kept_memory, "_glibc", lambda: None)
    with memory_kept():
        assert torch.zeros(8).sum() == 0


@needs_glibc
def test_memory_is_given_back_after_an_error():
    with pytest.raises(ValueError, match="prefix"), memory_kept():
        pages_of_batches()
        held = resident()
        raise ValueError("the prefix failed")
    assert resident() < held - 50 * 2**20
