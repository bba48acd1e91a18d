"""crc32c, and uncompressed inner chunks of zarr-shards, each with its crc32c checked.

Chunks by hand, because `zarrs` does not check a crc32c where a read takes part of a zarr-shard, and makes whatever room
a compressed chunk asks for. A zarr-shard is its inner chunks and, behind them, an index: offset and length of each as
little-endian uint64, and its own crc32c.

Source: Zarr version 3 specification, codecs sharding_indexed and crc32c.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import numpy as np
from awscrt import checksums
from numpy.typing import NDArray

CRC_BYTES, ENTRY_BYTES = 4, 16
ABSENT = 2**64 - 1


def crc32c(data: bytes | memoryview | NDArray[np.uint8], before: int = 0) -> int:
    """crc32c (Castagnoli) of bytes, at the speed of memory; `before` is that of the bytes in front of them."""
    return int(checksums.crc32c(data, before))


# What comes of any bytes with their own crc32c behind them.
WHOLE = crc32c(bytes(CRC_BYTES))


def parse_index(end: bytes, chunks: int) -> NDArray[np.uint64]:
    """Offset and length, (chunks, 2), of the inner chunks of a file that ends with these bytes.

    Raises:
        ValueError: the index is damaged.
    """
    index = memoryview(end)[-chunks * ENTRY_BYTES - CRC_BYTES :]
    if len(index) != chunks * ENTRY_BYTES + CRC_BYTES:
        raise ValueError(f"the index needs {chunks * ENTRY_BYTES + CRC_BYTES} bytes, found {len(index)}")
    if crc32c(index) != WHOLE:
        raise ValueError("the checksum of the index does not fit")
    return np.frombuffer(index[:-CRC_BYTES], "<u8").reshape(chunks, 2)


def read_chunks(
    read: Callable[[int, memoryview, Callable[[int], None]], int],
    index: NDArray[np.uint64],
    first: int,
    last: int,
    into: NDArray[np.uint8],
    file_bytes: int,
) -> None:
    """Chunks `first` to `last` - 1 of one file, each with its checksum behind it; one that was not written is zeros.

    Chunks that lie one behind the other, as they are written, are not copied.

    Args:
        read: fills memory with the bytes of the file from an offset on, as `Location.read_into`.
        into: where to put them, (last - first, bytes of a chunk and its checksum).
        file_bytes: size of the file.

    Raises:
        ValueError: a checksum does not fit, or the index leads elsewhere.
    """
    stride, entries = into.shape[1], index[first:last]
    rows = np.flatnonzero(entries[:, 0] != ABSENT)
    if not len(rows):
        into[:] = 0
        return
    offsets, lengths = entries[rows].T.tolist()
    if {*lengths} != {stride}:
        raise ValueError(f"a chunk has {min(lengths)} to {max(lengths)} bytes, expected {stride}")
    begin, end = min(offsets), max(offsets) + stride
    if end > file_bytes:
        raise ValueError(f"the index leads to byte {end}, the file ends at {file_bytes}")
    in_order = offsets == list(range(begin, begin + len(into) * stride, stride))
    memory = (into.reshape(-1) if in_order else np.empty(end - begin, np.uint8)).data
    places, checked = sorted(offset - begin for offset in offsets), 0

    def check(count: int) -> None:
        nonlocal checked
        start, checked = checked, bisect_right(places, count - stride)
        for at in places[start:checked]:
            if crc32c(memory[at : at + stride]) != WHOLE:
                raise ValueError(f"the checksum of chunk {first + int(rows[offsets.index(begin + at)])} does not fit")

    count = read(begin, memory, check)
    if checked < len(places):
        raise ValueError(f"the index leads to byte {end}, the file ends at {begin + count}")
    if not in_order:
        into[:] = 0
        for row, offset in zip(rows.tolist(), offsets, strict=True):
            into[row] = np.frombuffer(memory, np.uint8, stride, offset - begin)
