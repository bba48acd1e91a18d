"""Randomness that depends on seed and position alone, also in libraries that draw from global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray


def seed_of(*parts: int | str) -> int:
    """64 bits that depend on all parts and their order."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Python's, numpy's and torch's global CPU generators as a function of `parts`; afterwards as they were."""
    seed = seed_of(*parts)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def permutation(count: int, *parts: int | str) -> NDArray[np.int64]:
    """The numbers below `count` in an order that depends on `parts` alone, whatever the version of numpy."""
    raw = np.random.Philox(key=seed_of(*parts)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64)
