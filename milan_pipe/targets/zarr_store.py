"""One shard of a target store on zarr v3: view-major arrays, sharded, checksums on every chunk.

zarr reads a missing chunk as zeros without a word, so whoever opens a shard checks first that all its files are there.
Nor does a checksum tell a chunk from one of another view or shard that is whole and of the same length. Hence a file is
known again before its first use: a small one by its digest, a large one by the crc32c of its end, which covers its
index and the checksum of its last inner chunk (`ShardRecord.blocks`).
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, ObjectStore, StorePath

from milan_pipe.digests import sha256_of
from milan_pipe.errors import DataError, MilanError, StoreError, resource_hint
from milan_pipe.storage import Location
from milan_pipe.targets.checksum import crc32c
from milan_pipe.targets.codec import Codec, codec_of
from milan_pipe.targets.mapped_array import ChunkFile, MappedArray, decode_column, local_file
from milan_pipe.targets.schema import BLOCK_SAMPLES, FileRecord, ShardRecord, StoreHeader, TargetBlock, ViewRun

HEADER_FILE = "zarr.json"
_FEATURE_CHUNK_BYTES = 64 * 1024
# One block of zstd, which has statistics of its own.
_COEFFICIENTS_PER_CHUNK, _COEFFICIENT_CHUNK_BYTES = 32, 128 * 1024
_VIEW_CHUNK_BYTES = 64 * 1024
_VIEW_SHARD_BYTES = 8 * 1024 * 1024
# The checksum inside of zstd's frame is not one too many: where a read takes a part of a chunk, `zarrs` cuts the crc32c
# off unread. Zstandard can only be decoded whole, and so is always checked.
_CRC32C = Crc32cCodec()
_COMPRESSORS = (ZstdCodec(level=1, checksum=True), _CRC32C)
_SHARD_COLUMNS = ("scale", "attention", "crop", "flip", "view_offset", "view_length")
_PARALLEL_READS = 8
_WHOLE_BYTES = 1024 * 1024
_LARGE = ("features", "view_bytes", "attention", "scale")
_FAST_PIPELINE = "zarrs.ZarrsCodecPipeline"
_INDEX_ENTRY_BYTES, _CRC32C_BYTES = 16, 4
_creating = threading.Lock()


def use_fast_pipeline() -> bool:
    """Let zarr run its codecs in the `zarrs` pipeline; warn and keep zarr's own where it is missing."""
    try:
        import zarrs  # noqa: F401
    except ImportError:
        warnings.warn("the zarrs codec pipeline is not installed: reading will be slower", RuntimeWarning, stacklevel=2)
        return False
    if zarr.config.get("codec_pipeline.path") != _FAST_PIPELINE:
        # `zarrs` opens a store in an object store anew, and reports it each time.
        warnings.filterwarnings("ignore", message="Successfully reconstructed a store", category=RuntimeWarning)
        zarr.config.set({"codec_pipeline.path": _FAST_PIPELINE})
    return True


def _blocks_of(samples: int) -> int:
    return -(-samples // BLOCK_SAMPLES)


def _create(group: zarr.Group, name: str, **layout: Any) -> zarr.Array[Any]:
    # An array keeps the setting that it was made with. `zarrs` on several threads lays the inner chunks of a shard down
    # as they get ready: other bytes each time. The setting is the process's: a shard that is begun while another one is
    # closed must not take it back too early.
    with _creating, zarr.config.set({"threading.max_workers": 1}):
        return group.create_array(name, **{"filters": None, "compressors": _COMPRESSORS, **layout})


def _put(array: zarr.Array[Any], selection: Any, values: NDArray[Any]) -> None:
    try:
        array[selection] = values
    # `zarrs` reports a full disk in this way.
    except RuntimeError as error:
        raise OSError(" ".join(str(error).split())) from error


def _most_samples(sample_bytes: int, chunk_bytes: int) -> int:
    """Samples of one inner chunk: a power of two, so that it divides the block; one at least."""
    samples = 1
    while samples < BLOCK_SAMPLES and 2 * samples * sample_bytes <= chunk_bytes:
        samples *= 2
    return samples


def _features_layout(codec: Codec, tokens: int, width: int) -> dict[str, Any]:
    """Inner chunk and codecs of the features."""
    level, item = codec.info.zstd_level, codec.dtype.itemsize
    # Coefficients that are sorted by strength shrink best beside their like, so neighbours share a chunk.
    coefficients = min(_COEFFICIENTS_PER_CHUNK, width) if codec.coefficient_major else width
    if level == 0:
        # Without zstd the crc32c stands alone, and is checked where whole chunks are read: one sample each.
        samples, compressors = 1, list[Any]([_CRC32C])
        coefficients = width
    else:
        most = _COEFFICIENT_CHUNK_BYTES if codec.coefficient_major else _FEATURE_CHUNK_BYTES
        samples = _most_samples(tokens * coefficients * item, most)
        compressors = [ZstdCodec(level=level, checksum=True), _CRC32C]
    return {
        "dtype": codec.dtype,
        "chunks": (1, samples, tokens, coefficients),
        "shards": (1, BLOCK_SAMPLES, tokens, -(-width // coefficients) * coefficients),
        "compressors": compressors,
    }


def _end_of(file: Path, array: zarr.Array[Any]) -> tuple[int, int]:
    """Where a zarr-shard's index begins, with the checksum of the inner chunk before it; crc32c from there on."""
    inner = math.prod(shard // chunk for shard, chunk in zip(array.shards or (), array.chunks, strict=True))
    with file.open("rb") as opened:
        offset = max(0, opened.seek(0, os.SEEK_END) - inner * _INDEX_ENTRY_BYTES - 2 * _CRC32C_BYTES)
        opened.seek(offset)
        return offset, crc32c(opened.read())


@dataclass
class _Columns:
    """Small arrays of a shard, kept until its number of samples is known."""

    keys: list[str] = field(default_factory=list)
    label: list[NDArray[Any]] = field(default_factory=list)
    scale: list[NDArray[Any]] = field(default_factory=list)
    attention: list[NDArray[Any]] = field(default_factory=list)
    crop: list[NDArray[Any]] = field(default_factory=list)
    flip: list[NDArray[Any]] = field(default_factory=list)
    view_offset: list[NDArray[Any]] = field(default_factory=list)
    view_length: list[NDArray[Any]] = field(default_factory=list)


def _own_folder(folder: Path) -> LocalStore:
    """A folder that nobody else writes: zarr makes sure of that by hard links, which not all file systems have."""
    store = LocalStore(folder)

    async def set_if_not_exists(key: str, value: Buffer) -> None:
        if not await store.exists(key):
            await store.set(key, value)

    # On the object: `zarrs` takes no other class.
    store.set_if_not_exists = set_if_not_exists  # type: ignore[method-assign]
    return store


class ZarrShardFiles:
    """Targets of one shard in the making: memory holds one block, 8 MB of views, and what is small."""

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        use_fast_pipeline()
        self._where = folder
        self._samples = 0
        self._written_views = 0
        self._pending_views = bytearray()
        self._columns = _Columns()
        self._group = zarr.open_group(_own_folder(folder), mode="a", zarr_format=3)
        codec = codec_of(header.codec)
        tokens, width = header.tokens, header.teacher.width
        self._features = _create(
            self._group,
            "features",
            shape=(header.views.count, 0, tokens, width),
            **_features_layout(codec, tokens, width),
        )
        self._view_bytes = _create(
            self._group,
            "view_bytes",
            shape=(0,),
            dtype=np.uint8,
            chunks=(_VIEW_CHUNK_BYTES,),
            # JPEGs do not shrink. The crc32c alone is checked where whole chunks are read, as readers here do.
            compressors=[_CRC32C],
            shards=(_VIEW_SHARD_BYTES,),
        )

    def append(self, block: TargetBlock) -> None:
        """Write the next samples."""
        count = len(block.keys)
        if self._samples % BLOCK_SAMPLES or not 0 < count <= BLOCK_SAMPLES:
            raise StoreError(f"{self._where}: a block of {count} samples cannot follow {self._samples} samples")
        start, stop = self._samples, self._samples + count
        self._features.resize((self._features.shape[0], stop, *self._features.shape[2:]))
        _put(self._features, (slice(None), slice(start, stop)), block.code_KNST)
        columns = self._columns
        columns.keys += block.keys
        columns.label.append(block.label_N)
        if block.scale_KNS is not None:
            columns.scale.append(block.scale_KNS)
        columns.attention.append(block.attention_KNL)
        columns.crop.append(block.crop_KN4)
        columns.flip.append(block.flip_KN)
        lengths = np.array([[len(jpeg) for jpeg in row] for row in block.jpegs], np.int64)
        ends = np.cumsum(lengths.ravel()).reshape(lengths.shape)
        columns.view_offset.append(ends - lengths + self._written_views + len(self._pending_views))
        columns.view_length.append(lengths.astype(np.int32))
        for row in block.jpegs:
            for jpeg in row:
                self._pending_views += jpeg
        while len(self._pending_views) >= _VIEW_SHARD_BYTES:
            self._flush_views(_VIEW_SHARD_BYTES)
        self._samples = stop

    def _flush_views(self, count: int) -> None:
        self._view_bytes.resize((self._written_views + count,))
        rows = slice(self._written_views, self._written_views + count)
        _put(self._view_bytes, rows, np.frombuffer(bytes(self._pending_views[:count]), np.uint8))
        del self._pending_views[:count]
        self._written_views += count

    def _write_column(self, name: str, values: NDArray[Any]) -> None:
        views, samples, *tail = values.shape
        array = _create(
            self._group,
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(1, BLOCK_SAMPLES, *tail),
            shards=(views, _blocks_of(samples) * BLOCK_SAMPLES, *tail),
        )
        _put(array, ..., values)

    def close(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """Write what was kept. Per file of the large arrays, offset and crc32c of its end.

        Raises:
            OSError: it cannot be written.
        """
        if self._pending_views:
            # Whole chunks only: of one that reaches over the array's end, zarr reads a part and checks nothing.
            self._pending_views += bytes(-len(self._pending_views) % _VIEW_CHUNK_BYTES)
            self._flush_views(len(self._pending_views))
        columns = self._columns
        for name in _SHARD_COLUMNS:
            parts = getattr(columns, name)
            if parts:
                self._write_column(name, np.concatenate(parts, axis=1))
        whole = {"shape": (self._samples,), "chunks": (self._samples,)}
        label = _create(self._group, "label", dtype=np.int64, **whole)
        _put(label, ..., np.concatenate(columns.label))
        key = _create(self._group, "key", dtype=str, **whole)
        _put(key, ..., np.array(columns.keys, dtype=object))
        arrays = {name: self._group[name] for name in _LARGE if name in self._group}
        return {
            path.relative_to(self._where).as_posix(): [_end_of(path, cast("zarr.Array[Any]", array))]
            for name, array in arrays.items()
            for path in sorted((self._where / name / "c").rglob("*"))
            if path.is_file()
        }


class _Rows(Protocol):
    """An array of a shard, read by rows of one view."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, n, ...), or (n,)."""

    def rows(self, view: int, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of a view; of an array (n,), of the only one."""


class _ZarrRows:
    """An array read through zarr, where `MappedArray` does not serve: chunks that hold a part of a row, under zstd."""

    def __init__(self, where: StorePath, metadata: dict[str, Any]) -> None:
        self._array: zarr.Array[Any] = zarr.Array.from_dict(where, metadata)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    def rows(self, view: int, start: int, stop: int) -> NDArray[Any]:
        # `zarrs` fails on an index beside a slice where one row of a chunk is read, hence a slice of one view.
        return np.asarray(self._array[view : view + 1, start:stop]).squeeze(0)


class _FetchedFile:
    """A file in an object store. Small ones are fetched whole; of others the end, which has the index, is kept."""

    def __init__(self, location: Location, path: str, size: int, end: tuple[int, bytes]) -> None:
        self.size = size
        self._location, self._path = location, path
        self._kept_from, self._kept = end if size > _WHOLE_BYTES else (0, location.read(path))

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        if start >= self._kept_from:
            data = self._kept[start - self._kept_from : stop - self._kept_from]
        else:
            data = self._location.read_range(self._path, start, stop)
        if len(data) != stop - start:
            raise ValueError(f"{self._path} ends at byte {start + len(data)}, expected {stop} and more")
        return np.frombuffer(data, np.uint8)


def _local_of(array: Path, path: str) -> ChunkFile | None:
    return local_file(array / path)


def _fetched_of(
    location: Location, name: str, files: Mapping[str, FileRecord], ends: dict[str, tuple[int, bytes]], path: str
) -> ChunkFile | None:
    path = f"{name}/{path}"
    file = files.get(path)
    if file is None:
        return None
    return _FetchedFile(location, path, file.bytes, ends.pop(path, (file.bytes, b"")))


_DAMAGE = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, OSError)


@contextmanager
def _reads_of(location: Location) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` for small reads: side by side where each is a request, one after another on a disk."""
    if location.local is not None:
        yield map
        return
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        yield pool.map


class ZarrShard:
    """Arrays of one shard; keys and labels are in memory."""

    def __init__(
        self, location: Location, header: StoreHeader, record: ShardRecord, fail: Callable[[str], DataError]
    ) -> None:
        """Open the shard in the folder `location`, whose files are all there.

        Args:
            fail: makes the error of what is found damaged.
        """
        use_fast_pipeline()
        self._location = location
        self._record = record
        self._fail = fail
        self._known: set[str] = set()
        self._ends: dict[str, tuple[int, bytes]] = {}
        has_scale = codec_of(header.codec).has_scale
        names = ["features", *_SHARD_COLUMNS, "view_bytes", "label", "key"]
        names = [name for name in names if name != "scale" or has_scale]
        with _reads_of(location) as together:
            metadata = dict(zip(names, together(self._metadata, names), strict=True))
            with self._damage("zarr.json"):
                grids = {n: values["chunk_grid"]["configuration"]["chunk_shape"] for n, values in metadata.items()}
                self._outer = {name: tuple(grid[:2]) for name, grid in grids.items()}
                self._tails = {name: len(grid[2:]) for name, grid in grids.items()}
                self._require_shapes(metadata, header, record.source.samples)
            columns: Iterable[NDArray[Any]] = together(
                lambda name: self._column(name, metadata[name]), ("label", "key")
            )
            self._label, self._key = columns
            self._arrays = {name: self._open(name, metadata[name]) for name in names[:-3]}
            views = self._mapped("view_bytes", metadata["view_bytes"])
            if any(len(blocks) != 1 for blocks in record.blocks.values()):
                raise self._fail("its record does not name one end of each large file")
            if views is None:
                raise self._fail("array 'view_bytes' has a layout that this version does not read")
            self._views = views

    def _metadata(self, name: str) -> dict[str, Any]:
        data = self._whole_file(f"{name}/zarr.json")
        with self._damage(name):
            values: dict[str, Any] = json.loads(data)
        return values

    def _whole_file(self, path: str) -> bytes:
        file, data = self._record.files.get(path), self._location.read(path)
        if file is None or sha256_of(data) != file.sha256:
            raise self._fail(f"array {path.partition('/')[0]!r}: {path} does not fit its digest")
        return data

    def _require_own(self, path: str) -> None:
        """Whether a file is the one that was written here; looked at once."""
        if path in self._known:
            return
        file = self._record.files.get(path)
        if file is None:
            # A file of zeros alone was not written; zarr would read any that is there all the same.
            if self._location.present([path]):
                raise self._fail(f"array {path.partition('/')[0]!r}: {path} is not part of the shard")
        elif path in self._record.blocks:
            offset, crc = self._record.blocks[path][0]
            end = self._location.read_range(path, offset, file.bytes)
            if crc32c(end) != crc:
                raise self._fail(f"array {path.partition('/')[0]!r}: {path} is damaged, or belongs elsewhere")
            if self._location.local is None:
                self._ends[path] = (offset, end)
        else:
            self._whole_file(path)
        self._known.add(path)

    def _require_own_files(self, name: str, view: int, start: int, stop: int) -> None:
        *outer_views, outer_rows = self._outer[name]
        before = [view // outer_views[0]] if outer_views else []
        tail = self._tails[name] * ["0"]
        for row in range(start // outer_rows, -(-stop // outer_rows)):
            self._require_own("/".join([name, "c", *map(str, [*before, row]), *tail]))

    def _require_shapes(self, metadata: Mapping[str, dict[str, Any]], header: StoreHeader, samples: int) -> None:
        tails = {
            "features": (header.tokens, header.teacher.width),
            "scale": (header.tokens,),
            "attention": (header.patches,),
            "crop": (4,),
        }
        for name, values in metadata.items():
            if name == "view_bytes":
                continue
            flat = name in ("label", "key")
            expected = (samples,) if flat else (header.views.count, samples, *tails.get(name, ()))
            if tuple(values["shape"]) != expected:
                raise self._fail(f"array {name!r} has shape {tuple(values['shape'])}, expected {expected}")

    def _open(self, name: str, metadata: dict[str, Any]) -> _Rows:
        mapped = self._mapped(name, metadata)
        if mapped is not None:
            return mapped
        with self._damage(name):
            return _ZarrRows(self._where(name), metadata)

    def _mapped(self, name: str, metadata: dict[str, Any]) -> MappedArray | None:
        # Neither function knows this object: arrays that led back to it would keep their files until the garbage
        # collector comes, long after the shard was put away.
        local = self._location.local
        if local is not None:
            return MappedArray.of(partial(_local_of, local / name), metadata)
        return MappedArray.of(partial(_fetched_of, self._location, name, self._record.files, self._ends), metadata)

    def _where(self, name: str) -> StorePath:
        local = self._location.local
        if local is not None:
            return StorePath(LocalStore(local, read_only=True), name)
        store, folder = cast(Any, self._location).bucket
        return StorePath(ObjectStore(store, read_only=True), f"{folder}/{name}")

    def _column(self, name: str, metadata: dict[str, Any]) -> NDArray[Any]:
        path = f"{name}/c/0"
        there = path in self._record.files
        if not there:
            self._require_own(path)
        with self._damage(name):
            return decode_column(self._whole_file(path) if there else None, metadata)

    @contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except MilanError:
            raise
        except _DAMAGE as error:
            hint = resource_hint(error)
            if hint is not None or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError)):
                raise StoreError(f"{self._location}, array {name!r} cannot be read: {hint or error}") from error
            raise self._fail(f"array {name!r} is damaged ({' '.join(str(error).split())[:200]})") from error

    def _rows(self, name: str, view: int, start: int, stop: int) -> NDArray[Any]:
        self._require_own_files(name, view, start, stop)
        array: _Rows = self._arrays[name]
        with self._damage(name):
            return array.rows(view, start, stop)

    def keys(self) -> Sequence[str]:
        """Keys of all samples, in order."""
        return [str(key) for key in self._key]

    def read(self, view: int, start: int, stop: int) -> ViewRun:
        """Samples `start` to `stop` of one view."""
        offset, length = self._rows("view_offset", view, start, stop), self._rows("view_length", view, start, stop)
        first, last = int(offset.min()), int((offset + length).max())
        if first < 0 or length.min() < 0 or last > self._views.shape[0]:
            raise self._fail(f"array 'view_offset' leads to bytes {first} to {last} of 'view_bytes'")
        self._require_own_files("view_bytes", 0, first, max(last, first + 1))
        with self._damage("view_bytes"):
            jpegs = self._views.pieces(offset.tolist(), length.tolist())
        return ViewRun(
            keys=[str(key) for key in self._key[start:stop]],
            label_N=self._label[start:stop],
            code_NST=self._rows("features", view, start, stop),
            scale_NS=self._rows("scale", view, start, stop) if "scale" in self._arrays else None,
            attention_NL=self._rows("attention", view, start, stop),
            crop_N4=self._rows("crop", view, start, stop),
            flip_N=self._rows("flip", view, start, stop),
            jpegs=jpegs,
        )
