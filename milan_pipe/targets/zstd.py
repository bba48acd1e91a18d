"""zstd frames that come from outside: no more room is made than what a reader expects."""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs.zstd import decompress
from numpy.typing import NDArray

# Keys are the most alike of all that is stored: paths of 4,000 characters and a number come to 1,400; a frame may say
# 30,000.
MOST_RATIO = 4000
_ROOM_BYTES = 2**16


def unpacked(frame: bytes | memoryview, most: int | None = None) -> NDArray[np.uint8]:
    """What a frame holds, at most `most` bytes, by default `MOST_RATIO` times the frame.

    Raises:
        ValueError, RuntimeError: it is damaged, holds more, or does not say how much it holds.
    """
    size, most = _content_size(frame), MOST_RATIO * len(frame) + _ROOM_BYTES if most is None else most
    if size > most:
        raise ValueError(f"a frame of {size} bytes, expected at most {most}")
    room: Any = np.empty(size, np.uint8)
    if size:
        unpack(frame, room)
    return np.asarray(room)


def unpack(frame: bytes | memoryview, into: NDArray[Any]) -> None:
    """Unpack a frame into memory without gaps; raises as `unpacked`, also where the frame holds less."""
    if (size := _content_size(frame)) != into.nbytes:
        raise ValueError(f"a frame of {size} bytes, expected {into.nbytes}")
    decompress(frame, into.reshape(-1).view(np.uint8))


def _content_size(frame: bytes | memoryview) -> int:
    """By hand, as numcodecs does not tell it. Source: RFC 8878, section 3.1.1.1."""
    flags = int.from_bytes(frame[4:5], "little")
    single_segment, length = flags >> 5 & 1, (0, 2, 4, 8)[flags >> 6]
    start = 6 - single_segment + (0, 1, 2, 4)[flags & 3]
    length = length or single_segment
    found = bytes(frame[start : start + length])
    if not length or len(found) < length:
        raise ValueError("a frame that does not say how much it holds")
    return int.from_bytes(found, "little") + (256 if length == 2 else 0)
