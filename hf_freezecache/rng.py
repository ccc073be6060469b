"""The global random generators: preserving their states, and seeding them for one draw."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


class RngState:
    """The states of the Python, NumPy and torch (CPU and accelerator) generators at the time when it is made."""

    def __init__(self):
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        # Not `is_available`: a loader process that was forked from a process with a GPU cannot read its generators.
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def is_current(self) -> bool:
        """Whether nothing was drawn since."""
        now = RngState()
        cuda, cuda_now = self._cuda or [], now._cuda or []
        return (
            self._python == now._python
            and all(map(np.array_equal, self._numpy, now._numpy))
            and torch.equal(self._torch, now._torch)
            and all(torch.equal(first, second) for first, second in zip(cuda, cuda_now, strict=False))
        )

    def restore(self) -> None:
        """Puts all generators back into these states."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Restores the states of the Python, NumPy and torch (CPU and accelerator) generators on leaving the context.

    Probing, planning, building and counting FLOPs run in it, so that a training gets the same random numbers whether a
    store is built, reused or declined.
    """
    state = RngState()
    try:
        yield
    finally:
        state.restore()


@contextlib.contextmanager
def seeded_rng(*key: int | str) -> Iterator[None]:
    """Seeds the global generators inside the context and restores them after it.

    Args:
        key: what the random numbers depend on; nothing else does.
    """
    with preserve_rng():
        seed_rng(*key)
        yield


def seed_rng(*key: int | str) -> None:
    """Seeds the global generators; for several draws inside one `preserve_rng`.

    Args:
        key: what the random numbers depend on; nothing else does.
    """
    seed = hash_key(*key) & 0xFFFFFFFF
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def hash_key(*key: int | str) -> int:
    """A 64-bit hash of the key: the same in every process and on every machine."""
    text = ",".join(part if isinstance(part, str) else str(int(part)) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
