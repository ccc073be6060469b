"""Tensors on a shelf come back bit for bit, and nothing of a file stays."""

import os

import pytest
import torch

from hf_freezecache.cache.shelf import InFile, InMemory, TensorShelf


def values(dtype, shape=(4, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(10).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_what_does_not_fit_into_memory_is_read_from_the_file(dtype, tmp_path):
    shelf = TensorShelf(tmp_path, memory=12 * dtype.itemsize, room=lambda: 10_000)
    tensors = [values(dtype), values(dtype, (2, 40)).t(), values(dtype, (3, 5, 7)), values(dtype, (0, 3))]
    kept = [shelf.add(tensor) for tensor in tensors]
    assert [type(each) for each in kept] == [InMemory, InFile, InFile, InMemory]
    for each, tensor in reversed([*zip(kept, tensors, strict=True)]):
        assert torch.equal(each.read(), tensor) and each.read().dtype == dtype
    assert shelf.bytes_in_file == (80 + 105) * dtype.itemsize and shelf.why_full is None
    shelf.close()
    assert not os.listdir(tmp_path)


def test_the_room_is_kept(tmp_path):
    shelf = TensorShelf(tmp_path, memory=0, room=lambda: 100)
    kept = [shelf.add(values(torch.float32)) for _ in range(3)]
    assert [each is None for each in kept] == [False, False, True] and "100 B of the disk" in shelf.why_full
    shelf.close()


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("no directory")
    shelf = TensorShelf(tmp_path / "file" / "cache", memory=0, room=lambda: 100)
    assert shelf.add(values(torch.float32)) is None and "cannot be written" in shelf.why_full
    shelf.close()


def test_a_directory_that_was_missing_goes_again_unless_others_use_it(tmp_path):
    for others in (False, True):
        shelf = TensorShelf(tmp_path / "cache", memory=0, room=lambda: 100)
        shelf.add(values(torch.float32))
        assert (tmp_path / "cache").is_dir()
        if others:
            (tmp_path / "cache" / "store").mkdir()
        shelf.close()
        assert (tmp_path / "cache").is_dir() == others


def test_memory_alone_needs_no_file(tmp_path):
    shelf = TensorShelf(tmp_path / "cache", memory=1000, room=lambda: pytest.fail("nobody needs room"))
    assert isinstance(shelf.add(values(torch.float32)), InMemory) and not (tmp_path / "cache").exists()
    shelf.close()
