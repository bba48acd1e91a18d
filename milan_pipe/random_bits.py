"""Random numbers that stay the same: raw bits of a counter-based generator, and numbers made of them by us.

The bits of Philox 4x64 are fixed by its definition. What numpy makes of them (`Generator.permutation`, `random`, ...)
may change with its version, and a run must go on under another one.

Source: Philox: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray


def seed_of(*parts: int | str) -> int:
    """64 bits that depend on all parts and their order."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def raw_bits(keys: Iterable[bytes], count: int, sequence: int = 0) -> NDArray[np.uint64]:
    """(keys, count) words of 64 bits.

    Args:
        keys: 16 bytes each, as from a hash.
        sequence: 0 to 2**64 - 1: another sequence of the same key; no two overlap.
    """
    # One generator, set anew for each key: building one takes longer, as numpy asks the system for entropy first.
    generator = np.random.Philox(key=0)
    fresh: Any = generator.state
    fresh["state"]["counter"] = np.array([0, 0, sequence, 0], np.uint64)
    rows = []
    for key in keys:
        fresh["state"]["key"] = np.frombuffer(key, "<u8").astype(np.uint64)
        generator.state = fresh
        rows.append(generator.random_raw(count))
    return np.stack(rows) if rows else np.empty((0, count), np.uint64)


def uniform(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Raw words to numbers in [0, 1), multiples of 2**-53."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_inside(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Raw words to numbers strictly between 0 and 1, so that logarithms of u and 1 - u are finite."""
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def permutation(count: int, *parts: int | str) -> NDArray[np.int64]:
    """The numbers below `count` in an order that depends on `parts` alone.

    Numbers are sorted by random bits, and each stands in the low bits of its own sort key: no two keys are equal, so
    any sort gives the same order, and only the keys are sorted. Eight million numbers leave 41 random bits; about 15
    pairs share theirs and keep their order, which is too few to matter.
    """
    (key_N,) = raw_bits([seed_of(*parts).to_bytes(16, "little")], count)
    low = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    key_N &= ~low
    key_N |= np.arange(count, dtype=np.uint64)
    key_N.sort()
    key_N &= low
    order_N: NDArray[np.int64] = key_N.view(np.int64)
    return order_N
