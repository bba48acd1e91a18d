"""crc32c, at the speed of memory: every byte that a reader hands out goes through it."""

from __future__ import annotations

import numpy as np
from awscrt import checksums
from numpy.typing import NDArray


def crc32c(data: bytes | memoryview | NDArray[np.uint8], before: int = 0) -> int:
    """crc32c (Castagnoli) of bytes; `before` is that of the bytes in front of them."""
    return int(checksums.crc32c(data, before))
