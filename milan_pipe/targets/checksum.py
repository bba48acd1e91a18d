"""crc32c, and uncompressed inner chunks of zarr-shards, each with its crc32c checked.

Chunks by hand, because `zarrs` does not check a crc32c where a read takes part of a zarr-shard. A zarr-shard is its
inner chunks and, behind them, an index: offset and length of each as little-endian uint64, and its own crc32c.

Source: Zarr version 3 specification, codecs sharding_indexed and crc32c.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from awscrt import checksums
from numpy.typing import NDArray

CRC_BYTES, ENTRY_BYTES = 4, 16
_ABSENT = 2**64 - 1


def crc32c(data: bytes | memoryview | NDArray[np.uint8], before: int = 0) -> int:
    """crc32c (Castagnoli) of bytes, at the speed of memory; `before` is that of the bytes in front of them."""
    return int(checksums.crc32c(data, before))


def parse_index(end: bytes, chunks: int) -> NDArray[np.uint64]:
    """Offset and length, (chunks, 2), of the inner chunks of a file that ends with these bytes.

    Raises:
        ValueError: the index is damaged.
    """
    index = memoryview(end)[-chunks * ENTRY_BYTES - CRC_BYTES :]
    if len(index) != chunks * ENTRY_BYTES + CRC_BYTES:
        raise ValueError(f"the index needs {chunks * ENTRY_BYTES + CRC_BYTES} bytes, found {len(index)}")
    return np.frombuffer(_checked(index, "the index"), "<u8").reshape(chunks, 2)


def read_chunks(
    read: Callable[[int, int, Callable[[memoryview], None]], memoryview],
    index: NDArray[np.uint64],
    first: int,
    last: int,
    chunk_bytes: int,
    file_bytes: int,
) -> NDArray[np.uint8]:
    """Chunks `first` to `last` - 1 of one file, (last - first, chunk_bytes); one that was not written is zeros.

    Chunks that lie one behind the other, as they are written, are not copied.

    Args:
        file_bytes: size of the file.
        read: gives the bytes of the file from one offset to another, as `Location.read_memory`.

    Raises:
        ValueError: a checksum does not fit, or the index leads elsewhere.
    """
    stride, entries = chunk_bytes + CRC_BYTES, index[first:last]
    rows = np.flatnonzero(entries[:, 0] != _ABSENT)
    if not len(rows):
        return np.zeros((last - first, chunk_bytes), np.uint8)
    if (entries[rows, 1] != stride).any():
        raise ValueError(f"a chunk has {entries[rows, 1].min()} to {entries[rows, 1].max()} bytes, expected {stride}")
    offsets = entries[rows, 0].tolist()
    begin, end = min(offsets), max(offsets) + stride
    if end > file_bytes:
        raise ValueError(f"the index leads to byte {end}, the file ends at {file_bytes}")
    left = deque(sorted(zip(offsets, rows.tolist(), strict=True)))

    def check(so_far: memoryview) -> None:
        while left and left[0][0] - begin + stride <= len(so_far):
            offset, row = left.popleft()
            _checked(so_far[offset - begin : offset - begin + stride], f"chunk {first + row}")

    data = read(begin, end, check)
    if left:
        raise ValueError(f"the index leads to byte {end}, the file ends at {begin + len(data)}")
    if offsets == list(range(begin, begin + (last - first) * stride, stride)):
        return np.frombuffer(data, np.uint8).reshape(last - first, stride)[:, :-CRC_BYTES]
    values = np.zeros((last - first, chunk_bytes), np.uint8)
    for row, offset in zip(rows.tolist(), offsets, strict=True):
        values[row] = np.frombuffer(data, np.uint8, chunk_bytes, offset - begin)
    return values


def _checked(data: memoryview, what: str) -> memoryview:
    if crc32c(data[:-CRC_BYTES]) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise ValueError(f"the checksum of {what} does not fit")
    return data[:-CRC_BYTES]
