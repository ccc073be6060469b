"""Random generators: leaving them untouched, and seeding them for one draw."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Puts the Python, NumPy and torch (CPU and accelerator) generators back as they were on entry.

    Probing, planning, building and counting FLOPs run inside, so that a training sees the same random numbers whether
    a store is built, reused or declined.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Not `is_available`: in a loader process forked from one that uses the GPU, its generators cannot be asked.
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextlib.contextmanager
def seeded_rng(*key: int | str) -> Iterator[None]:
    """Seeds the global generators from `key` inside and puts them back after: a draw that depends on the key alone."""
    with preserve_rng():
        seed_rng(*key)
        yield


def seed_rng(*key: int | str) -> None:
    """Seeds the global generators from `key`; for several draws inside one `preserve_rng`."""
    seed = hash_key(*key) & 0xFFFFFFFF
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def hash_key(*key: int | str) -> int:
    """A 64-bit number that depends on the key alone: the same in every process, on every machine."""
    text = ",".join(part if isinstance(part, str) else str(int(part)) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
