"""Rows of a local zarr array, straight from the mapped file: every chunk is checked, and copied only where it must be.

A zarr-shard is its inner chunks and, behind them, an index: offset and length of each chunk as little-endian uint64,
then the crc32c of the index. A chunk here is its values, shrunk by zstd or not, and the crc32c of that.

This reads what `milan_pipe.targets.zarr_store` writes, and leaves all else to zarr: a store's arrays are opened by the
thousand, and what zarr spends on one is more than these take to be read.

Source: Zarr version 3 specification, codecs sharding_indexed, zstd, crc32c and vlen-utf8.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from milan_pipe.targets.checksum import crc32c

_CRC_BYTES = 4
_ABSENT = 2**64 - 1
_ZSTD = Zstd()
_INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclass(frozen=True)
class _Shard:
    """A mapped zarr-shard: all its bytes, and offset and length of its chunks, (chunks, 2)."""

    data: NDArray[np.uint8]
    table: NDArray[np.uint64]


class MappedArray:
    """An array (K, n, ...) whose inner chunks are whole in all axes but the second, or an array (n,)."""

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        outer: tuple[int, ...],
        inner: tuple[int, ...],
        compressed: bool,
    ) -> None:
        """See `of`."""
        self._folder = folder
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
    def of(folder: Path, metadata: Mapping[str, Any]) -> MappedArray | None:
        """The array in a folder, or None where it is of a kind that zarr must read."""
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
        return MappedArray(folder, shape, dtype, outer, inner, compressed="zstd" in names)

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
        for first in range(start - start % self._rows, stop, self._rows):
            payload = self._payload(view, first)
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
        chunks: dict[int, NDArray[np.uint8]] = {}

        def chunk(first: int) -> NDArray[np.uint8]:
            # Each is checked once, however many runs it holds.
            if first not in chunks:
                payload = self._payload(0, first)
                chunks[first] = np.zeros(self._rows, np.uint8) if payload is None else payload
                if chunks[first].size != self._rows:
                    raise ValueError(f"a chunk holds {chunks[first].size} bytes, expected {self._rows}")
            return chunks[first]

        found = []
        for start, size in zip(starts, sizes, strict=True):
            stop = start + size
            parts = [
                chunk(first)[max(start - first, 0) : stop - first].data
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
        path = self._folder.joinpath("c", *map(str, parts))
        try:
            with path.open("rb") as file:
                data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except FileNotFoundError:
            return None  # chunks of zeros are not written
        chunks = self._outer_views * (self._outer_rows // self._rows)
        end = len(data) - _CRC_BYTES
        if end < chunks * 16:
            raise ValueError(f"{path.name} has {len(data)} bytes, its index alone needs {chunks * 16 + _CRC_BYTES}")
        index = data[end - chunks * 16 : end]
        _require_checksum(index, data[end:], "the index")
        return _Shard(data, index.view("<u8").reshape(chunks, 2))

    def _payload(self, view: int, row: int) -> NDArray[np.uint8] | None:
        """The bytes of the chunk that begins with a row, without their checksum; None where it is all zeros."""
        shard, number = self._locate(view, row)
        if shard is None or int(shard.table[number, 0]) == _ABSENT:
            return None
        offset, size = int(shard.table[number, 0]), int(shard.table[number, 1])
        return _checked(shard.data[offset : offset + size], f"chunk {number}")

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
        for row in range(len(table)):
            _checked(shard.data[first + row * stride : first + (row + 1) * stride], f"chunk {number + row}")
        flat = np.lib.stride_tricks.as_strided(
            shard.data[first:], (len(table), self._row_bytes), (stride, 1), writeable=False
        )
        return flat.view(self._dtype).reshape(len(table), *self._tail)


def read_column(folder: Path, metadata: Mapping[str, Any]) -> NDArray[Any]:
    """All values of an array (n,) that is one chunk without sharding: numbers, or strings as objects.

    Raises:
        ValueError, RuntimeError, OSError: it cannot be read, or a checksum does not fit.
    """
    path = folder / "c" / "0"
    if not path.exists():  # a chunk of zeros is not written
        strings = metadata["data_type"] == "string"
        return np.full(metadata["shape"], "" if strings else 0, object if strings else metadata["data_type"])
    data = np.fromfile(path, np.uint8)
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
