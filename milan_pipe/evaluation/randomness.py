"""Libraries that draw from global generators, as a function of seed and position."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from milan_pipe.random_bits import seed_of


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
