"""Rows of a zarr array straight from its files, local or remote: all that is handed out was checked.

A zarr-shard is its inner chunks and, behind them, an index: offset and length of each chunk as little-endian uint64,
then the crc32c of the index. A chunk here is its values, shrunk by zstd or not, and the crc32c of that.

This reads what `milan_pipe.targets.zarr_store` writes, and leaves all else to zarr: a store's arrays are opened by the
thousand, and what zarr spends on one is more than these take to be read. Nor may the checksum be left to the `zarrs`
pipeline where it is the only one: it cuts it off unread where a part of an array is read.

Source: Zarr version 3 specification, codecs sharding_indexed, zstd, crc32c and vlen-utf8.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from milan_pipe.targets.checksum import crc32c

_CRC_BYTES = 4
_ABSENT = 2**64 - 1
_ZSTD = Zstd()
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


class ChunkFile(Protocol):
    """A file of an array."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes `start` to `stop`; not to be written to."""


class _LocalFile:
    """A local file, opened for each read.

    Not mapped: a mapping keeps a descriptor, a file that is cut meanwhile ends the process, and what was checked could
    change before it is used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = path.stat().st_size

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        data = np.empty(max(0, min(stop, self.size) - start), np.uint8)
        handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(data):
                count = os.preadv(handle, [data.data[done:]], start + done)
                if not count:
                    raise ValueError(f"{self._path.name} ends at byte {start + done}, expected {stop} and more")
                done += count
        finally:
            os.close(handle)
        data.flags.writeable = False
        return data


def local_file(path: Path) -> ChunkFile | None:
    """A local file; None where there is none."""
    try:
        return _LocalFile(path)
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class _Shard:
    """A zarr-shard: its file, and offset and length of its chunks, (chunks, 2)."""

    file: ChunkFile
    table: NDArray[np.uint64]

    def window(self, first: int, last: int) -> Callable[[int], NDArray[np.uint8] | None]:
        """Read chunks `first` to `last` - 1 at once; gives the checked content of each by number, None for zeros."""
        offsets, sizes = (self.table[first:last, column].astype(object) for column in (0, 1))
        there = offsets != _ABSENT
        begin = min(offsets[there], default=0)
        end = max(offsets[there] + sizes[there], default=0)
        if not 0 <= begin <= end <= self.file.size:
            raise ValueError(f"its index leads to bytes {begin} to {end} of {self.file.size}")
        data = self.file.read(begin, end)

        def chunk(number: int) -> NDArray[np.uint8] | None:
            offset = offsets[number - first]
            if offset == _ABSENT:
                return None
            return _checked(data[offset - begin : offset - begin + sizes[number - first]], f"chunk {number}")

        return chunk


class MappedArray:
    """An array (K, n, ...) whose inner chunks are whole in all axes but the second, or an array (n,)."""

    def __init__(
        self,
        open_file: Callable[[str], ChunkFile | None],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        outer: tuple[int, ...],
        inner: tuple[int, ...],
        compressed: bool,
    ) -> None:
        """See `of`."""
        self._open_file = open_file
        self._flat = len(shape) == 1
        self.shape = shape
        self._dtype = dtype
        self._tail = shape[2:]
        self._outer_views, self._outer_rows = (1, outer[0]) if self._flat else outer[:2]
        self._rows = inner[0] if self._flat else inner[1]
        self._row_bytes = int(np.prod(self._tail, dtype=np.int64)) * dtype.itemsize
        self._compressed = compressed
        self._shards: dict[tuple[int, int], _Shard | None] = {}

    @staticmethod
    def of(open_file: Callable[[str], ChunkFile | None], metadata: Mapping[str, Any]) -> MappedArray | None:
        """An array by its metadata, or None where it is of a kind that zarr must read.

        Args:
            open_file: opens a file by its path in the array's folder; None: not there, which means zeros.
        """
        try:
            shape = tuple(metadata["shape"])
            outer = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
            (sharding,) = metadata["codecs"]
            layout = sharding["configuration"]
            inner = tuple(layout["chunk_shape"])
            names = [codec["name"] for codec in layout["codecs"]]
            dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
            known = (
                sharding["name"] == "sharding_indexed"
                and layout.get("index_location", "end") == "end"
                and layout["index_codecs"] == _INDEX_CODECS
                and names in (["bytes", "crc32c"], ["bytes", "zstd", "crc32c"])
                and layout["codecs"][0].get("configuration", {}).get("endian", "little") == "little"
                and not metadata["fill_value"]
                and metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
            )
        except (KeyError, ValueError, TypeError):
            return None
        tail = shape[2:]
        whole = len(shape) == 1 or (inner[0] == 1 and inner[2:] == tail and outer[2:] == tail)
        if not known or not whole:
            return None
        return MappedArray(open_file, shape, dtype, outer, inner, compressed="zstd" in names)

    def rows(self, view: int, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of a view (0 for an array without views).

        Returns:
            (stop - start, ...); not to be written to: it may lie in the file.

        Raises:
            ValueError, RuntimeError: a checksum does not fit.
            OSError: a file cannot be read.
        """
        in_place = self._in_place(view, start, stop)
        if in_place is not None:
            return in_place
        out = np.zeros((stop - start, *self._tail), self._dtype)
        out_bytes = out.reshape(stop - start, -1).view(np.uint8) if out.size else out
        for first, payload in self._payloads(view, start, stop):
            if payload is None:
                continue
            begin, end = max(start, first), min(stop, first + self._rows)
            whole = begin == first and end == first + self._rows
            if whole and self._compressed:
                _ZSTD.decode(payload, out_bytes[begin - start : end - start])
                continue
            values = np.frombuffer(_ZSTD.decode(payload), np.uint8) if self._compressed else payload
            if values.size != self._rows * self._row_bytes:
                raise ValueError(f"a chunk holds {values.size} bytes, expected {self._rows * self._row_bytes}")
            out_bytes[begin - start : end - start] = values.reshape(self._rows, -1)[begin - first : end - first]
        return out

    def pieces(self, starts: Sequence[int], sizes: Sequence[int]) -> list[memoryview]:
        """Runs of an array (n,) of bytes that is not shrunk; what lies within one chunk is not copied.

        Raises:
            ValueError, RuntimeError, OSError: as `rows`.
        """
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        chunks: dict[int, NDArray[np.uint8]] = {}
        # Each chunk is checked once, however many runs it holds.
        for first, payload in self._payloads(0, min(starts), max(ends)):
            chunks[first] = np.zeros(self._rows, np.uint8) if payload is None else payload
            if chunks[first].size != self._rows:
                raise ValueError(f"a chunk holds {chunks[first].size} bytes, expected {self._rows}")
        found = []
        for start, stop in zip(starts, ends, strict=True):
            parts = [
                chunks[first][max(start - first, 0) : stop - first].data
                for first in range(start - start % self._rows, stop, self._rows)
            ]
            found.append(parts[0] if len(parts) == 1 else memoryview(b"".join(parts)))
        return found

    def _locate(self, view: int, row: int) -> tuple[_Shard | None, int]:
        """The zarr-shard that holds a row, and the number of its chunk there."""
        key = (view // self._outer_views, row // self._outer_rows)
        if key not in self._shards:
            self._shards[key] = self._map(key)
        per_view = self._outer_rows // self._rows
        return self._shards[key], view % self._outer_views * per_view + row % self._outer_rows // self._rows

    def _map(self, key: tuple[int, int]) -> _Shard | None:
        parts = [key[1]] if self._flat else [*key, *(0 for _ in self._tail)]
        path = "/".join(["c", *map(str, parts)])
        file = self._open_file(path)
        if file is None:
            return None  # chunks of zeros are not written
        chunks = self._outer_views * (self._outer_rows // self._rows)
        end = file.size - _CRC_BYTES
        if end < chunks * 16:
            raise ValueError(f"{path} has {file.size} bytes, its index alone needs {chunks * 16 + _CRC_BYTES}")
        index = file.read(end - chunks * 16, file.size)
        _require_checksum(index[:-_CRC_BYTES], index[-_CRC_BYTES:], "the index")
        return _Shard(file, index[:-_CRC_BYTES].view("<u8").reshape(chunks, 2))

    def _payloads(self, view: int, start: int, stop: int) -> Iterator[tuple[int, NDArray[np.uint8] | None]]:
        """First row and checked bytes of each chunk that rows `start` to `stop` lie in; None where it is all zeros."""
        row = start - start % self._rows
        while row < stop:
            shard, number = self._locate(view, row)
            end = min(stop, row - row % self._outer_rows + self._outer_rows)
            last = number + -(-(end - row) // self._rows)
            chunk = shard.window(number, last) if shard is not None else None
            for position in range(number, last):
                yield row, chunk(position) if chunk is not None else None
                row += self._rows

    def _in_place(self, view: int, start: int, stop: int) -> NDArray[Any] | None:
        """Uncompressed chunks of one row each that lie one behind the other, as they lie."""
        if self._compressed or self._rows != 1 or start // self._outer_rows != (stop - 1) // self._outer_rows:
            return None
        shard, number = self._locate(view, start)
        if shard is None:
            return None
        table = shard.table[number : number + stop - start]
        stride, first = self._row_bytes + _CRC_BYTES, int(table[0, 0])
        steps = first + stride * np.arange(len(table), dtype=np.uint64)
        if not ((table[:, 1] == stride).all() and (table[:, 0] == steps).all()):
            return None
        data = shard.file.read(first, first + stride * len(table))
        if len(data) != stride * len(table):
            raise ValueError(f"its index leads to byte {first + stride * len(table)} of {shard.file.size}")
        for row in range(len(table)):
            _checked(data[row * stride : (row + 1) * stride], f"chunk {number + row}")
        flat = np.lib.stride_tricks.as_strided(data, (len(table), self._row_bytes), (stride, 1), writeable=False)
        return flat.view(self._dtype).reshape(len(table), *self._tail)


def decode_column(chunk: bytes | None, metadata: Mapping[str, Any]) -> NDArray[Any]:
    """All values of an array (n,) that is one chunk without sharding: numbers, or strings as objects.

    Args:
        chunk: the file; None where there is none, which means zeros.

    Raises:
        ValueError, RuntimeError: a checksum does not fit.
    """
    if chunk is None:
        strings = metadata["data_type"] == "string"
        return np.full(metadata["shape"], "" if strings else 0, object if strings else metadata["data_type"])
    data = np.frombuffer(chunk, np.uint8)
    values = np.frombuffer(_ZSTD.decode(_checked(data, "the chunk")), np.uint8)
    if metadata["data_type"] != "string":
        return values.view(np.dtype(metadata["data_type"]).newbyteorder("<"))
    text = values.tobytes()
    count, position = int.from_bytes(text[:4], "little"), 4
    strings = np.empty(count, object)
    for row in range(count):
        size = int.from_bytes(text[position : position + 4], "little")
        strings[row] = text[position + 4 : position + 4 + size].decode()
        position += 4 + size
    return strings


def _checked(chunk: NDArray[np.uint8], what: str) -> NDArray[np.uint8]:
    values = chunk[:-_CRC_BYTES]
    _require_checksum(values, chunk[-_CRC_BYTES:], what)
    return values


def _require_checksum(values: NDArray[np.uint8], stored: NDArray[np.uint8], what: str) -> None:
    if crc32c(values) != int.from_bytes(stored.tobytes(), "little"):
        raise ValueError(f"the checksum of {what} does not fit")
