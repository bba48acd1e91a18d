"""One shard of a target store on zarr v3: view-major arrays, sharded, a checksum on every chunk.

zarr reads a missing chunk as zeros, so whoever opens a shard checks first that all its files exist. Nor does a checksum
tell a chunk from one of another view or shard that is whole and of the same length. Hence each file is identified
before its first use: a small one by its digest, a large one by the crc32c of its end, which covers its index and the
checksum of its last inner chunk (`ShardRecord.blocks`).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.vlen import VLenUTF8
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core import sync as zarr_sync
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from milan_pipe.digests import sha256_of
from milan_pipe.errors import DataError, StoreError, one_line, resource_hint
from milan_pipe.storage import Location
from milan_pipe.targets.checksum import ABSENT, CRC_BYTES, ENTRY_BYTES, WHOLE, crc32c, parse_index, read_chunks
from milan_pipe.targets.codec import Codec, codec_of
from milan_pipe.targets.schema import BLOCK_SAMPLES, ShardRecord, StoreHeader, TargetBlock, ViewRun
from milan_pipe.targets.zstd import MOST_RATIO, unpack, unpacked

GROUP_FILE = "zarr.json"
_FEATURE_CHUNK_BYTES = 64 * 1024
# One block of zstd, which has statistics of its own.
_COEFFICIENTS_PER_CHUNK, _COEFFICIENT_CHUNK_BYTES = 32, 128 * 1024
VIEW_CHUNK_BYTES = 64 * 1024
VIEW_SHARD_BYTES = 8 * 1024 * 1024
# The checksum inside of zstd's frame is not one too many: where a read takes a part of a chunk, `zarrs` cuts the crc32c
# off unread. Zstandard can only be decoded whole, and so is always checked.
_CRC32C = Crc32cCodec()
_COMPRESSORS = (ZstdCodec(level=1, checksum=True), _CRC32C)
_LARGE = ("features", "view_bytes", "attention", "scale")
# Read whole when a shard is opened: 30 bytes a view.
_SMALL = ("crop", "flip", "view_offset", "view_length", "label", "key")
# By the names that xarray gives to axes.
_OF_VIEW, _OF_IMAGE = ("view", "image"), ("image",)
_DIMENSIONS = {
    "features": (*_OF_VIEW, "token", "channel"),
    "scale": (*_OF_VIEW, "token"),
    "attention": (*_OF_VIEW, "patch"),
    "crop": (*_OF_VIEW, "side"),
    **dict.fromkeys(("flip", "view_offset", "view_length"), _OF_VIEW),
    **dict.fromkeys(("label", "key"), _OF_IMAGE),
    "view_bytes": ("byte",),
}
# By numpy's letters; features have those of their codec.
_KINDS = {
    "attention": "f",
    "scale": "f",
    "flip": "b",
    "key": "O",
    "view_bytes": "u",
    **dict.fromkeys(("crop", "view_offset", "view_length", "label"), "i"),
}
_PARALLEL_READS = 8
_MOST_INDEX_BYTES = 64 * 1024
_USUAL_CHUNKS = 4096
_LITTLE, _CHECKSUM = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
# What the metadata of an array says of how values become bytes, of the index of a zarr-shard, and of names of files.
_FIRST = (_LITTLE, {"name": "bytes"}, {"name": "vlen-utf8", "configuration": {}})
_INDEX = {"index_codecs": [_LITTLE, _CHECKSUM], "index_location": "end"}
_CHUNK_KEYS = {"name": "default", "configuration": {"separator": "/"}}
_FAST_PIPELINE = "zarrs.ZarrsCodecPipeline"
_creating, _waiting = threading.Lock(), threading.Lock()


def use_fast_pipeline() -> bool:
    """Let zarr run its codecs in the `zarrs` pipeline; warn and keep zarr's own where it is missing."""
    try:
        import zarrs  # noqa: F401
    except ImportError:
        warnings.warn("the zarrs codec pipeline is not installed: writing will be slower", RuntimeWarning, stacklevel=2)
        return False
    if zarr.config.get("codec_pipeline.path") != _FAST_PIPELINE:
        zarr.config.set({"codec_pipeline.path": _FAST_PIPELINE})
    return True


def _features_layout(codec: Codec, tokens: int, width: int) -> dict[str, Any]:
    level, item = codec.info.zstd_level, codec.dtype.itemsize
    if level == 0:
        # Without zstd the crc32c stands alone, and is checked where whole chunks are read: one sample each.
        samples, coefficients, zstd = 1, width, []
    else:
        # Coefficients that are sorted by strength shrink best beside their like, so neighbours share a chunk.
        coefficients = min(_COEFFICIENTS_PER_CHUNK, width) if codec.coefficient_major else width
        most = _COEFFICIENT_CHUNK_BYTES if codec.coefficient_major else _FEATURE_CHUNK_BYTES
        # A power of two, so that it divides the block.
        samples = min(BLOCK_SAMPLES, 1 << max(0, (most // (tokens * coefficients * item)).bit_length() - 1))
        zstd = [ZstdCodec(level=level, checksum=True)]
    return {
        "dtype": codec.dtype,
        "chunks": (1, samples, tokens, coefficients),
        "shards": (1, BLOCK_SAMPLES, tokens, -(-width // coefficients) * coefficients),
        "compressors": [*zstd, _CRC32C],
    }


def stored_rows(samples: int) -> int:
    """Rows that a view takes of an array that is stored as it is: whole blocks, beyond the first."""
    return samples if samples <= BLOCK_SAMPLES else -(-samples // BLOCK_SAMPLES) * BLOCK_SAMPLES


def _end_of(file: Path, array: zarr.Array[Any]) -> tuple[int, int]:
    """Where a zarr-shard's index begins, with the checksum of the inner chunk before it; crc32c from there on."""
    inner = math.prod(shard // chunk for shard, chunk in zip(array.shards or (), array.chunks, strict=True))
    with file.open("rb") as opened:
        offset = max(0, opened.seek(0, os.SEEK_END) - inner * ENTRY_BYTES - 2 * CRC_BYTES)
        opened.seek(offset)
        return offset, crc32c(opened.read())


def own_folder(folder: Path) -> LocalStore:
    """A folder that nobody else writes: zarr makes sure of that by hard links, which not all file systems have."""
    _start_zarr()
    store = LocalStore(folder)

    async def set_if_not_exists(key: str, value: Buffer) -> None:
        if not await store.exists(key):
            await store.set(key, value)

    # On the object: `zarrs` takes no other class.
    store.set_if_not_exists = set_if_not_exists  # type: ignore[method-assign]
    return store


def _start_zarr() -> None:
    """Start zarr's thread. Where the machine has no room for it, zarr's next call would wait for it for ever."""
    with _creating:
        try:
            zarr_sync._get_loop()
        except BaseException:
            zarr_sync.reset_resources_after_fork()
            raise


def wait_for_writes() -> None:
    """Wait until all that zarr was doing in this process, for any shard, is done or has failed."""
    if zarr_sync.loop[0] is None:
        return

    async def others() -> None:
        if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(tasks)

    # One at a time: two would wait for each other.
    with _waiting:
        zarr_sync.sync(others())


class ZarrShardFiles:
    """Targets of one shard in the making: memory holds one block, 8 MB of views, and the small arrays."""

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        use_fast_pipeline()
        self._folder = folder
        self._samples = 0
        self._written_views = 0
        self._pending_views = bytearray()
        # By name of the array, its part of each block; their number of samples is not known before the end.
        self._columns: defaultdict[str, list[NDArray[Any]]] = defaultdict(list)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._group = zarr.open_group(own_folder(folder), mode="a", zarr_format=3)
        tokens, width = header.tokens, header.teacher.width
        layout = _features_layout(codec_of(header.codec), tokens, width)
        self._create("features", shape=(header.views.count, 0, tokens, width), **layout)
        self._create(
            "view_bytes",
            shape=(0,),
            dtype=np.uint8,
            chunks=(VIEW_CHUNK_BYTES,),
            # JPEGs do not shrink. The crc32c alone is checked where whole chunks are read, as readers here do.
            compressors=[_CRC32C],
            shards=(VIEW_SHARD_BYTES,),
        )

    def _create(self, name: str, **layout: Any) -> None:
        # An array keeps the setting that it was made with. `zarrs` on several threads writes the inner chunks of a
        # shard in the order in which they are ready: other bytes each time. The setting is the process's: a shard that
        # is begun while another one is closed must not reset it too early.
        with _creating, zarr.config.set({"threading.max_workers": 1}):
            layout = {"filters": None, "compressors": _COMPRESSORS, "dimension_names": _DIMENSIONS[name], **layout}
            self._arrays[name] = self._group.create_array(name, **layout)

    def _put(self, name: str, selection: Any, values: NDArray[Any]) -> None:
        try:
            self._arrays[name][selection] = values
        # `zarrs` reports a full disk in this way.
        except RuntimeError as error:
            raise OSError(" ".join(str(error).split())) from error

    def append(self, block: TargetBlock) -> None:
        """Write the next samples."""
        start, stop = self._samples, self._samples + len(block.keys)
        features = self._arrays["features"]
        features.resize((features.shape[0], stop, *features.shape[2:]))
        self._put("features", (slice(None), slice(start, stop)), block.code_KNST)
        lengths = np.array([[len(jpeg) for jpeg in row] for row in block.jpegs], np.int64)
        ends = np.cumsum(lengths.ravel()).reshape(lengths.shape)
        columns = {
            "key": np.array(block.keys, dtype=object),
            "label": block.label_N,
            "scale": block.scale_KNS,
            "attention": block.attention_KNL,
            "crop": block.crop_KN4,
            "flip": block.flip_KN,
            "view_offset": ends - lengths + self._written_views + len(self._pending_views),
            "view_length": lengths.astype(np.int32),
        }
        for name, values in columns.items():
            if values is not None:
                self._columns[name].append(values)
        self._pending_views += b"".join(jpeg for row in block.jpegs for jpeg in row)
        while len(self._pending_views) >= VIEW_SHARD_BYTES:
            self._flush_views(VIEW_SHARD_BYTES)
        self._samples = stop

    def _flush_views(self, count: int) -> None:
        rows = slice(self._written_views, self._written_views + count)
        self._arrays["view_bytes"].resize((rows.stop,))
        self._put("view_bytes", rows, np.frombuffer(bytes(self._pending_views[:count]), np.uint8))
        del self._pending_views[:count]
        self._written_views += count

    def close(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """Write what was kept. Per file of the large arrays, offset and crc32c of its end."""
        if self._pending_views:
            # Whole chunks only: of one that reaches over the array's end, zarr reads a part and checks nothing.
            self._pending_views += bytes(-len(self._pending_views) % VIEW_CHUNK_BYTES)
            self._flush_views(len(self._pending_views))
        for name, parts in self._columns.items():
            values = np.concatenate(parts, axis=min(1, parts[0].ndim - 1))
            layout: dict[str, Any] = {"chunks": values.shape}
            if values.ndim > 1:
                views, samples, *tail = values.shape
                chunk = (1, min(BLOCK_SAMPLES, samples), *tail)
                layout = {"chunks": chunk, "shards": (views, stored_rows(samples), *tail)}
            if name in _LARGE:
                # Half precision does not shrink much, and every sample is read of these.
                layout["compressors"] = [_CRC32C]
            self._create(name, shape=values.shape, dtype=str if name == "key" else values.dtype, **layout)
            self._put(name, ..., values)
        self._consolidate()
        return {
            path.relative_to(self._folder).as_posix(): [_end_of(path, self._arrays[name])]
            for name in _LARGE
            if name in self._arrays
            for path in sorted((self._folder / name / "c").rglob("*"))
            if path.is_file()
        }

    def _consolidate(self) -> None:
        """Describe all arrays in the group's own file, so that others open the shard with one read.

        By hand: zarr's function warns with each shard that this part of the format is not in its specification yet.
        """
        arrays = {name: json.loads((self._folder / name / GROUP_FILE).read_bytes()) for name in sorted(self._arrays)}
        consolidated = {"kind": "inline", "must_understand": False, "metadata": arrays}
        group = json.loads((self._folder / GROUP_FILE).read_bytes()) | {"consolidated_metadata": consolidated}
        (self._folder / GROUP_FILE).write_text(json.dumps(group), encoding="utf-8")


@contextmanager
def _reads_of(location: Location) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` for small reads: side by side where each is a request, one after another on a disk."""
    if location.local is not None:
        yield map
        return
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        yield pool.map


class _Array:
    """An array and its layout, from its own metadata: zarr takes a millisecond for each, and anew with each question.

    Attributes:
        file_shape: rows along each axis that lie in one file.
        chunks: the same of a chunk with checksums of its own.
        plain: chunks have a crc32c alone, which must be checked here; others are under zstd.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """Raises ValueError, LookupError or TypeError for a layout that this version does not read."""
        self.metadata, self.shape, codecs = metadata, tuple(metadata["shape"]), metadata["codecs"]
        self.chunks = self.file_shape = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        known = metadata["chunk_key_encoding"] == _CHUNK_KEYS
        self.sharded = codecs[0]["name"] == "sharding_indexed"
        if self.sharded:
            inner = codecs[0]["configuration"]
            self.chunks, codecs = tuple(inner["chunk_shape"]), inner["codecs"]
            whole = not any(file % chunk for file, chunk in zip(self.file_shape, self.chunks, strict=True))
            known = known and whole and {key: inner[key] for key in _INDEX} == _INDEX
        first, *rest = (codec["name"] for codec in codecs)
        self.is_text, self.plain = first == "vlen-utf8", rest == ["crc32c"] and self.sharded
        self.dtype = np.dtype(object) if self.is_text else np.dtype(metadata["data_type"])
        known = known and (self.plain or rest == ["zstd", "crc32c"]) and codecs[0] in _FIRST
        if not known or not self._sizes_are_possible():
            raise ValueError("a layout that this version does not read")

    def _sizes_are_possible(self) -> bool:
        if not len(self.shape) == len(self.file_shape) == len(self.chunks):
            return False
        if not all(type(n) is int and n >= 0 for n in (*self.shape, *self.file_shape, *self.chunks)):
            return False
        if min((*self.file_shape, *self.chunks)) < 1:
            return False
        # Who believes in more runs out of memory, and the process ends.
        count = math.prod(file // chunk for file, chunk in zip(self.file_shape, self.chunks, strict=True))
        if len(self.shape) == 1:
            return bool(self.file_shape[0] <= self.shape[0] + VIEW_SHARD_BYTES and count <= _USUAL_CHUNKS)
        views, samples, *tail = self.shape
        features, blocks = len(tail) == 2, -(-samples // BLOCK_SAMPLES)
        # Rows of a file: a block of features, all blocks of what is small. Schema 2 filled up the only block, too.
        rows = BLOCK_SAMPLES * (1 if features else views * blocks)
        spare = _COEFFICIENTS_PER_CHUNK - 1 if features else 0
        fits = (n <= of + spare for n, of in zip(self.file_shape[2:], tail, strict=True))
        return all(
            (math.prod(self.file_shape[:2]) <= rows, math.prod(self.chunks[:2]) <= BLOCK_SAMPLES, *fits)
        ) and count <= max(_USUAL_CHUNKS, views * blocks)

    def key(self, *position: int) -> str:
        """Name of a file by its place in the grid of files, of which leading numbers are given."""
        return "/".join(map(str, ("c", *position, *(0,) * (len(self.shape) - len(position)))))

    def files(self, start: int, stop: int, view: int | None) -> Iterator[tuple[str, int, int]]:
        """Keys of the files that hold rows `start` to `stop`, and where in each they begin and end."""
        position = [] if view is None else [view // self.file_shape[0]]
        size = self.file_shape[len(position)]
        for row in range(start // size, -(-stop // size)):
            yield self.key(*position, row), max(start - row * size, 0), min(stop - row * size, size)


def _unpack_chunk(
    frame: memoryview, place: Sequence[int], chunk: Sequence[int], into: NDArray[Any], first: int
) -> None:
    """Unpack a chunk, by its place among all chunks, into rows of which `first` is the first.

    It may begin before these rows, and reach beyond what there is of them and of their values.
    """
    begin, *others = (n * of for n, of in zip(place, chunk, strict=True))
    skipped = max(0, first - begin)
    begins, sizes = (begin + skipped - first, *others), (chunk[0] - skipped, *chunk[1:])
    room = into[tuple(slice(n, n + of) for n, of in zip(begins, sizes, strict=True))]
    if room.shape == (*chunk,) and room.flags.c_contiguous:
        unpack(frame, room)
    else:
        values = np.empty(chunk, into.dtype)
        unpack(frame, values)
        room[:] = values[skipped:][tuple(map(slice, room.shape))]


class ZarrShard:
    """Arrays of one shard; the small ones are in memory."""

    def __init__(
        self, location: Location, header: StoreHeader, record: ShardRecord, fail: Callable[[str], DataError]
    ) -> None:
        """Open the shard in the folder `location`, all files of which exist; `fail` makes the error for damage."""
        self._location = location
        self._record = record
        self._fail = fail
        self._ends: dict[str, bytes] = {}
        codec = codec_of(header.codec)
        self._has_scale = codec.has_scale
        if any(len(blocks) != 1 for blocks in record.blocks.values()):
            raise self._fail("its record does not name one end of each large file")
        views, samples = header.views.count, record.source.samples
        shapes: dict[str, tuple[int, ...]] = {
            "features": (views, samples, header.tokens, header.teacher.width),
            "attention": (views, samples, header.patches),
            "crop": (views, samples, 4),
            **dict.fromkeys(("flip", "view_offset", "view_length"), (views, samples)),
            **dict.fromkeys(("label", "key"), (samples,)),
        }
        if self._has_scale:
            shapes["scale"] = (views, samples, header.tokens)
        names = [*shapes, "view_bytes"]
        with _reads_of(location) as together:
            self._arrays = dict(zip(names, together(self._open, names), strict=True))
            for name, expected in shapes.items():
                if self._arrays[name].shape != expected:
                    raise self._fail(f"array {name!r} has shape {self._arrays[name].shape}, expected {expected}")
            kinds = {**_KINDS, "features": codec.dtype.kind}
            for name, array in self._arrays.items():
                if array.dtype.kind != kinds[name]:
                    raise self._fail(f"array {name!r} is of {array.dtype}, expected kind {kinds[name]!r}")
            stored = sum(file.bytes for path, file in record.files.items() if path.startswith("view_bytes/c/"))
            if self._arrays["view_bytes"].shape[0] > stored:
                raise self._fail(f"array 'view_bytes' has {self._arrays['view_bytes'].shape[0]} bytes, {stored} stored")
            # Arrays of zeros have no file and are made whole: only the bytes of views bound how many there are.
            if views * samples > self._arrays["view_bytes"].shape[0]:
                raise self._fail(f"array 'view_bytes' has fewer bytes than the shard has views, {views * samples}")
            self._small: dict[str, NDArray[Any]] = dict(zip(_SMALL, together(self._whole, _SMALL), strict=True))
        self._keys = [str(key) for key in self._small["key"]]

    def _open(self, name: str) -> _Array:
        metadata = self._checked_file(f"{name}/{GROUP_FILE}")
        with self._reading(name):
            return _Array(json.loads(metadata))

    def _checked_file(self, path: str) -> bytes:
        file, data = self._record.files.get(path), self._location.read(path)
        if file is None or sha256_of(data) != file.sha256:
            raise self._fail(f"array {path.partition('/')[0]!r}: {path} does not fit its digest")
        return data

    def _identify(self, path: str) -> bytes:
        """Check, once, that a file is the one that was written here. Returns its end, with the index."""
        if path in self._ends:
            return self._ends[path]
        name, file, end = path.partition("/")[0], self._record.files.get(path), b""
        if file is None:
            # A file of zeros alone was not written; zarr would read one that exists all the same.
            if self._location.present([path]):
                raise self._fail(f"array {name!r}: {path} is not part of the shard")
        elif path in self._record.blocks:
            offset, crc = self._record.blocks[path][0]
            end = self._location.read_range(path, offset, file.bytes)
            if crc32c(end) != crc:
                raise self._fail(f"array {name!r}: {path} is damaged, or belongs elsewhere")
        else:
            end = self._checked_file(path)[-_MOST_INDEX_BYTES:]
        self._ends[path] = end
        return end

    @contextmanager
    def _reading(self, name: str, paths: Sequence[str] = ()) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, OSError) as error:
            # Damage, or what a system or bucket refuses: the digests tell them apart.
            for path in set(paths) & self._record.files.keys():
                self._checked_file(path)
            hint, what = resource_hint(error), one_line(error)
            if hint is not None or (paths and self._location.local is None):
                raise StoreError(f"{self._location}, array {name!r} cannot be read: {hint or what}") from error
            raise self._fail(f"array {name!r} is damaged ({what})") from error

    def _whole(self, name: str) -> NDArray[Any]:
        """An array of one small file, whose digest is checked, under zstd."""
        array = self._arrays[name]
        path, chunk = f"{name}/{array.key()}", math.prod(array.chunks)
        if path not in self._record.files:
            self._identify(path)
            self._require_keys()
            with self._reading(name):
                return np.full(array.shape, array.metadata["fill_value"], array.dtype)
        data = self._checked_file(path)
        with self._reading(name, [path]):
            count = math.prod(array.file_shape) // chunk
            index = parse_index(data, count).tolist() if array.sharded else [(0, len(data))]
            most = None if array.is_text else chunk * array.dtype.itemsize
            zeros = np.zeros(most or 0, np.uint8)
            parts = [
                zeros if offset == ABSENT else unpacked(data[offset : offset + length - CRC_BYTES], most)
                for offset, length in index
            ]
            if array.is_text:
                # The decoder makes room for as many as the bytes say.
                if (found_keys := int.from_bytes(parts[0][:4].tobytes(), "little")) != array.shape[0]:
                    raise ValueError(f"{found_keys} texts, expected {array.shape[0]}")
                return np.asarray(VLenUTF8().decode(parts[0]), object).reshape(array.shape)
            # Chunks are rows of one view, one view behind the other.
            rows = np.concatenate(parts).view(array.dtype).reshape(array.file_shape)
            found: NDArray[Any] = rows[tuple(map(slice, array.shape))]
            return found

    def _require_keys(self) -> None:
        """Where values have no file, nothing but the keys' file bounds how many there are."""
        file = self._record.files.get(f"key/{self._arrays['key'].key()}")
        most = MOST_RATIO * file.bytes if file is not None else 0
        if self._record.source.samples > most:
            raise self._fail(f"its record names {self._record.source.samples} samples, and its keys are at most {most}")

    def _rows(self, name: str, start: int, stop: int, view: int) -> NDArray[Any]:
        """Rows `start` to `stop` of a view."""
        array = self._arrays[name]
        if not array.plain:
            return self._unpacked_rows(name, start, stop, view)
        bytes_of_chunks = self._checked_chunks(name, start, stop, view)[:, :-CRC_BYTES]
        with self._reading(name):
            chunks: NDArray[Any] = bytes_of_chunks.view(array.dtype)
        return chunks.reshape(-1, *array.shape[2:])[start % array.chunks[1] :][: stop - start]

    def _unpacked_rows(self, name: str, start: int, stop: int, view: int) -> NDArray[Any]:
        """The same of an array under zstd, whose chunks may be a part of each row."""
        array = self._arrays[name]
        one, *chunk = array.chunks
        if one != 1 or not array.sharded:
            raise self._fail(f"array {name!r} has a layout that this version does not read")
        rows, done = np.zeros((stop - start, *array.shape[2:]), array.dtype), 0
        for key, first, last in array.files(start, stop, view):
            path = f"{name}/{key}"
            end = self._identify(path)
            into, done = rows[done : done + last - first], done + last - first
            if not end:
                continue
            with self._reading(name, [path]):
                for place, frame in self._frames(array, path, end, view, first // chunk[0], -(-last // chunk[0])):
                    _unpack_chunk(frame, place, chunk, into, first)
        return rows

    def _frames(
        self, array: _Array, path: str, end: bytes, view: int, first: int, last: int
    ) -> Iterator[tuple[tuple[int, ...], memoryview]]:
        """zstd frames of a file, of the chunks `first` to `last` - 1 of each row, with their places in a view."""
        grid = [of // n for of, n in zip(array.file_shape, array.chunks, strict=True)]
        index = parse_index(end, math.prod(grid)).reshape(*grid, 2)[view % array.file_shape[0], first:last]
        places, entries = np.ndindex(index.shape[:-1]), index.reshape(-1, 2).tolist()
        spans = [(place, at, at + count) for place, (at, count) in zip(places, entries, strict=True) if at != ABSENT]
        if not spans:
            return
        begin, end_of_last = min(start for _, start, _ in spans), max(stop for _, _, stop in spans)
        if end_of_last > (size := self._record.files[path].bytes):
            raise ValueError(f"the index leads to byte {end_of_last}, the file ends at {size}")
        data = memoryview(self._location.read_range(path, begin, end_of_last))
        for (row, *others), start, stop in spans:
            frame = data[start - begin : stop - begin]
            if crc32c(frame) != WHOLE:
                raise ValueError(f"the checksum of chunk {(first + row, *others)} does not fit")
            yield (first + row, *others), frame[:-CRC_BYTES]

    def _checked_chunks(self, name: str, start: int, stop: int, view: int | None) -> NDArray[np.uint8]:
        """Bytes of the chunks with rows `start` to `stop`, each with the crc32c, its only checksum, behind it.

        Each is of some rows of one view, or of an array (n,).
        """
        array = self._arrays[name]
        axis = 0 if view is None else 1
        size, chunk, tail = array.chunks[axis], array.chunks, array.shape[axis + 1 :]
        if not array.plain or chunk != (*(1,) * axis, size, *tail):
            raise self._fail(f"array {name!r} has a layout that this version does not read")
        chunk_bytes = math.prod(chunk) * array.dtype.itemsize
        # Of numpy, which asks for large pages: fresh small ones cost several times the reading.
        chunks, done = np.empty((-(-stop // size) - start // size, chunk_bytes + CRC_BYTES), np.uint8), 0
        # Of a file that holds several views, the chunks before this one's.
        per_view = array.file_shape[axis] // size
        before = 0 if view is None else view % array.file_shape[0] * per_view
        for key, first, last in array.files(start, stop, view):
            path = f"{name}/{key}"
            end = self._identify(path)
            first, last = before + first // size, before - (-last // size)
            into = chunks[done : done + last - first]
            done += last - first
            if not end:
                into[:] = 0
                continue
            with self._reading(name, [path]):
                index = parse_index(end, per_view * math.prod(array.file_shape[:axis]))
                read = partial(self._location.read_into, path)
                read_chunks(read, index, first, last, into, self._record.files[path].bytes)
        return chunks

    def keys(self) -> Sequence[str]:
        """Keys of all samples, in order."""
        return self._keys

    def _jpegs(self, view: int, start: int, stop: int) -> list[memoryview]:
        views = self._arrays["view_bytes"]
        offset, length = (self._small[name][view, start:stop] for name in ("view_offset", "view_length"))
        ends = offset + length
        first, last = int(offset[0]), int(ends[-1])
        if first < 0 or last > views.shape[0]:
            raise self._fail(f"array 'view_offset' leads to bytes {first} to {last} of 'view_bytes'")
        # A sum that is too large for its type is negative, and ends before it begins.
        if (ends < offset).any() or (offset[1:] < ends[:-1]).any():
            raise self._fail("array 'view_offset' has views that overlap, or are not in the order of the samples")
        # Whole chunks, whose checksums are checked.
        size = views.chunks[0]
        first -= first % size
        chunks = self._checked_chunks("view_bytes", first, -(-last // size) * size, None)
        memory, stride = chunks.reshape(-1).data, size + CRC_BYTES
        # A JPEG goes on from chunk to chunk: close the gaps that the checksums leave.
        for row in range(1, len(chunks)):
            memory[row * size : (row + 1) * size] = memory[row * stride : row * stride + size]
        places = zip((offset - first).tolist(), length.tolist(), strict=True)
        return [memory[begin : begin + count] for begin, count in places]

    def read(self, view: int, start: int, stop: int, *, with_views: bool = True, with_features: bool = True) -> ViewRun:
        """Samples `start` to `stop` of one view."""
        names = ["features", "attention", *(["scale"] if self._has_scale else [])] if with_features else []
        reads: list[Callable[[], Any]] = [partial(self._rows, name, start, stop, view) for name in names]
        with _reads_of(self._location) as together:
            jpegs, *found = together(
                lambda read: read(), [partial(self._jpegs, view, start, stop) if with_views else list, *reads]
            )
        if not with_features:
            arrays = (self._arrays[name] for name in ("features", "attention"))
            found = [np.empty((0, *array.shape[2:]), array.dtype) for array in arrays]
        code_NST, attention_NL, *scales = found
        return ViewRun(
            keys=self._keys[start:stop],
            label_N=self._small["label"][start:stop],
            code_NST=code_NST,
            scale_NS=scales[0] if scales else None,
            attention_NL=attention_NL,
            crop_N4=self._small["crop"][view, start:stop],
            flip_N=self._small["flip"][view, start:stop],
            jpegs=jpegs,
        )
