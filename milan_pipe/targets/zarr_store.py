"""Target store on zarr v3: one group per source shard, view-major, checksums on every chunk.

A shard is written into a hidden folder beside its place and renamed when it is whole, so a reader never sees half of
one. zarr reads a missing chunk as zeros without a word, so the reader checks first that the files are there.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from milan_pipe.errors import DataError, MismatchError, MissingError, StoreError
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.schema import (
    BLOCK_SAMPLES,
    SCHEMA_VERSION,
    SourceShard,
    StoreHeader,
    TargetBlock,
    ViewRun,
    require_same_header,
)

_HEADER = "milan_pipe"
_PARTIAL = ".partial-"
BAD_SAMPLES = "bad_samples.jsonl"
_FEATURE_CHUNK_BYTES = 64 * 1024
_VIEW_CHUNK_BYTES = 256 * 1024
_VIEW_SHARD_BYTES = 8 * 1024 * 1024
# Blocks are read in random order over the shards: one open shard would be opened anew for nearly every block.
_OPEN_SHARDS = 32
# The checksum inside of zstd's frame is not one too many: where a read takes a part of a chunk, `zarrs` cuts the crc32c
# off unread. Zstandard can only be decoded whole, and so is always checked. Hence also for JPEGs, which do not shrink.
_COMPRESSORS = (ZstdCodec(level=1, checksum=True), Crc32cCodec())
# `zarrs` on several threads lays the inner chunks of a shard down as they get ready: other bytes each time.
_LARGE = {"threading.max_workers": 1}
# `zarrs` leaves a chunk of zeros out; zarr's own pipeline writes it when told to, and what is small need not be fast.
_SMALL = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}


def use_fast_pipeline() -> bool:
    """Let zarr run its codecs in the `zarrs` pipeline; warn and keep zarr's own where it is missing."""
    try:
        import zarrs  # noqa: F401
    except ImportError:
        warnings.warn("the zarrs codec pipeline is not installed: reading will be slower", RuntimeWarning, stacklevel=2)
        return False
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    return True


def _blocks(samples: int) -> int:
    return -(-samples // BLOCK_SAMPLES)


def _create(group: zarr.Group, name: str, pipeline: dict[str, Any], **layout: Any) -> zarr.Array[Any]:
    # An array keeps the pipeline that it was made with.
    with zarr.config.set(pipeline):
        return group.create_array(
            name,
            filters=None,
            compressors=_COMPRESSORS,
            # A chunk of zeros is written as well: then a chunk that is absent is a chunk that was lost.
            config={"write_empty_chunks": True},
            **layout,
        )


def _put(array: zarr.Array[Any], selection: Any, values: NDArray[Any]) -> None:
    try:
        array[selection] = values
    # `zarrs` tells of a full disk in this way.
    except RuntimeError as error:
        raise OSError(" ".join(str(error).split())) from error


def _features_per_chunk(sample_bytes: int) -> int:
    """Samples of one inner chunk: a power of two, so that it divides the block; near 64 KB, one at least."""
    samples = 1
    while samples < BLOCK_SAMPLES and 2 * samples * sample_bytes <= _FEATURE_CHUNK_BYTES:
        samples *= 2
    return samples


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


class ZarrShardWriter:
    """Targets of one shard in the making: memory holds one block, 8 MB of views, and what is small."""

    def __init__(self, root: Path, name: str, header: StoreHeader) -> None:
        self._final = root / name
        self._partial = root / f"{_PARTIAL}{name}"
        self._samples = 0
        self._written_views = 0
        self._pending_views = bytearray()
        self._columns = _Columns()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._group = zarr.open_group(self._partial, mode="w-", zarr_format=3)
        codec = codec_of(header.codec)
        views, tokens, width = header.views.count, header.tokens, header.teacher.width
        per_chunk = _features_per_chunk(tokens * width * codec.dtype.itemsize)
        self._features = _create(
            self._group,
            "features",
            _LARGE,
            shape=(views, 0, tokens, width),
            dtype=codec.dtype,
            chunks=(1, per_chunk, tokens, width),
            shards=(1, BLOCK_SAMPLES, tokens, width),
        )
        self._view_bytes = _create(
            self._group,
            "view_bytes",
            _LARGE,
            shape=(0,),
            dtype=np.uint8,
            chunks=(_VIEW_CHUNK_BYTES,),
            shards=(_VIEW_SHARD_BYTES,),
        )

    def append(self, block: TargetBlock) -> None:
        count = len(block.keys)
        if self._samples % BLOCK_SAMPLES or not 0 < count <= BLOCK_SAMPLES:
            raise StoreError(f"{self._partial}: a block of {count} samples cannot follow {self._samples} samples")
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
            _SMALL,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(1, BLOCK_SAMPLES, *tail),
            shards=(views, _blocks(samples) * BLOCK_SAMPLES, *tail),
        )
        _put(array, ..., values)

    def commit(self, source: SourceShard) -> None:
        if not self._samples or source.samples != self._samples:
            raise StoreError(f"{self._final}: {self._samples} samples written, {source.samples} announced")
        if self._pending_views:
            self._flush_views(len(self._pending_views))
        columns = self._columns
        for name in ("scale", "attention", "crop", "flip", "view_offset", "view_length"):
            parts = getattr(columns, name)
            if parts:
                self._write_column(name, np.concatenate(parts, axis=1))
        whole = {"shape": (self._samples,), "chunks": (self._samples,)}
        label = _create(self._group, "label", _SMALL, dtype=np.int64, **whole)
        _put(label, ..., np.concatenate(columns.label))
        key = _create(self._group, "key", _SMALL, dtype=str, **whole)
        _put(key, ..., np.array(columns.keys, dtype=object))
        self._group.update_attributes(
            {
                "source": source.name,
                "source_bytes": source.bytes,
                "samples": source.samples,
                "bad": [list(entry) for entry in source.bad],
            }
        )
        self._partial.rename(self._final)

    def discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


def _read_header(root: Path) -> StoreHeader:
    if not root.is_dir():
        raise MissingError(f"{root} is not there; write targets with `milan-pipe extract-targets IMAGES {root}`")
    try:
        found = json.loads((root / "zarr.json").read_text())["attributes"][_HEADER]
    except FileNotFoundError:
        raise DataError(
            f"{root} is not a target store: it has no zarr.json. Write targets with "
            f"`milan-pipe extract-targets IMAGES {root}`"
        ) from None
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{root}/zarr.json is not the header of a target store; extract into another folder")
    version = found.get("schema_version")
    if version != SCHEMA_VERSION:
        raise MismatchError(
            f"{root} has schema version {version}, this version of milan-pipe reads {SCHEMA_VERSION}; "
            f"extract the targets again, or use the version that wrote them ({found.get('package_version')})"
        )
    header: StoreHeader = StoreHeader.parse(found, f"{root}/zarr.json")
    return header


def _read_source(root: Path, name: str) -> SourceShard:
    try:
        attributes = json.loads((root / name / "zarr.json").read_text())["attributes"]
        return SourceShard(
            name=attributes["source"],
            bytes=attributes["source_bytes"],
            samples=attributes["samples"],
            bad=tuple((key, reason) for key, reason in attributes["bad"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{root / name}: the shard's zarr.json cannot be read ({type(error).__name__}); remove this folder and "
            "run extract-targets again"
        ) from error


def _shard_names(root: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))


class ZarrTargetWriter:
    """A store that shards are added to; opens the one that is there if its configuration is the same."""

    def __init__(self, root: Path, header: StoreHeader) -> None:
        """Open or begin a store.

        Raises:
            MismatchError: the store that is there has another configuration.
            DataError: the folder holds something else.
            StoreError: the folder cannot be written.
        """
        use_fast_pipeline()
        self.root = root
        self.header = header
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{root} cannot be made: {error.strerror or error}; choose another folder") from error
        # zarr writes the header beside its place; a run that was killed just then leaves this and nothing else.
        for left_over in root.glob("zarr.*.partial"):
            left_over.unlink(missing_ok=True)
        # A store whose header was not written yet holds nothing; what else is in a folder is somebody's.
        if (root / "zarr.json").exists() or any(root.iterdir()):
            require_same_header(_read_header(root), header, root)
        else:
            try:
                zarr.create_group(root, zarr_format=3, attributes={_HEADER: header.model_dump(mode="json")})
            except OSError as error:
                raise StoreError(f"{root} cannot be written: {error.strerror or error}") from error
        for left_over in root.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def committed(self) -> dict[str, SourceShard]:
        return {name: _read_source(self.root, name) for name in _shard_names(self.root)}

    def open_shard(self, name: str) -> ZarrShardWriter:
        return ZarrShardWriter(self.root, name, self.header)

    def finish(self) -> None:
        lines = [
            json.dumps({"shard": name, "source": shard.name, "key": key, "reason": reason}, ensure_ascii=False) + "\n"
            for name, shard in self.committed().items()
            for key, reason in shard.bad
        ]
        temporary = self.root / f"{_PARTIAL}{BAD_SAMPLES}"
        try:
            temporary.write_text("".join(lines), encoding="utf-8")
            temporary.replace(self.root / BAD_SAMPLES)
        except OSError as error:
            raise StoreError(
                f"{self.root / BAD_SAMPLES} cannot be written: {error.strerror or error}. All shards are whole; the "
                "same command goes on from there"
            ) from error


class _OpenShard:
    """Arrays of one shard, the small ones in memory."""

    def __init__(self, root: Path, name: str, header: StoreHeader) -> None:
        self.where = root / name
        self.source = _read_source(root, name)
        self._header = header
        codec = codec_of(header.codec)
        small = ["attention", "crop", "flip", "view_offset", "view_length", "label", "key"]
        small += ["scale"] if codec.has_scale else []
        n, views = self.source.samples, header.views.count
        self._require_files("features", [f"{view}/{block}/0/0" for view in range(views) for block in range(_blocks(n))])
        self.features = self._array("features", (views, n, header.tokens, header.teacher.width))
        self.view_bytes = self._array("view_bytes", None)
        self._require_files("view_bytes", [str(i) for i in range(-(-self.view_bytes.shape[0] // _VIEW_SHARD_BYTES))])
        self.small: dict[str, NDArray[Any]] = {}
        for column in small:
            tail = {"attention": (header.patches,), "scale": (header.tokens,), "crop": (4,)}.get(column, ())
            flat = column in ("label", "key")
            array = self._array(column, (n,) if flat else (views, n, *tail))
            self._require_files(column, ["/".join("0" * array.ndim)])
            self.small[column] = np.asarray(self.checked(column, array, ...))
        end = int((self.small["view_offset"] + self.small["view_length"]).max())
        if self.view_bytes.shape != (end,):
            raise self._damaged("view_bytes", f"its shape is {self.view_bytes.shape}, expected {(end,)}")

    def _array(self, name: str, shape: tuple[int, ...] | None) -> zarr.Array[Any]:
        try:
            array = zarr.open_array(self.where / name, mode="r", zarr_format=3)
        # zarr lets ZeroDivisionError and others through when its metadata is damaged.
        except Exception as error:
            raise self._damaged(name, f"its metadata cannot be read ({type(error).__name__})") from error
        if shape is not None and array.shape != shape:
            raise self._damaged(name, f"its shape is {array.shape}, expected {shape}")
        return array

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(
            f"{self.where}: array {name!r} is damaged: {what}. Remove this folder and run extract-targets again"
        )

    def _require_files(self, name: str, chunks: list[str]) -> None:
        files = [self.where / name / "c" / chunk for chunk in chunks]
        # An empty file reads as zeros, like one that is not there.
        lost = [c for c, file in zip(chunks, files, strict=True) if not file.is_file() or not file.stat().st_size]
        if lost:
            raise self._damaged(
                name, f"{len(lost)} of {len(chunks)} chunks are missing or empty, the first is c/{lost[0]}"
            )

    def checked(self, name: str, array: zarr.Array[Any], selection: Any) -> NDArray[Any]:
        try:
            return np.asarray(array[selection])
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, OSError) as error:
            raise self._damaged(name, " ".join(str(error).split())) from error


class ZarrTargetReader:
    """Reads a store; checks its header first."""

    def __init__(self, root: str | Path) -> None:
        """Open a store.

        Raises:
            MissingError: no such folder.
            DataError: not a store, no shard committed, or damaged.
            MismatchError: another schema version.
        """
        use_fast_pipeline()
        self.root = Path(root)
        self.header = _read_header(self.root)
        self.shards = _shard_names(self.root)
        if not self.shards:
            raise DataError(f"{self.root} has no committed shard; run extract-targets again to finish it")
        self._sources = {name: _read_source(self.root, name) for name in self.shards}
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()

    def samples(self, shard: str) -> int:
        return self._sources[shard].samples

    def _shard(self, name: str) -> _OpenShard:
        if name not in self._open:
            self._open[name] = _OpenShard(self.root, name, self.header)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def read(self, shard: str, view: int, start: int, stop: int) -> ViewRun:
        opened = self._shard(shard)
        rows = slice(start, stop)
        small = opened.small
        offset, length = small["view_offset"][view, rows], small["view_length"][view, rows]
        first, last = int(offset.min()), int((offset + length).max())
        blob = opened.checked("view_bytes", opened.view_bytes, slice(first, last)).tobytes()
        return ViewRun(
            keys=[str(key) for key in small["key"][rows]],
            label_N=small["label"][rows],
            # `zarrs` fails on an index beside a slice where one row of a chunk is read, hence a slice of one view.
            code_NST=opened.checked("features", opened.features, (slice(view, view + 1), rows))[0],
            scale_NS=small["scale"][view, rows] if "scale" in small else None,
            attention_NL=small["attention"][view, rows],
            crop_N4=small["crop"][view, rows],
            flip_N=small["flip"][view, rows],
            jpegs=[blob[o - first : o - first + n] for o, n in zip(offset.tolist(), length.tolist(), strict=True)],
        )

    def bytes_on_disk(self) -> int:
        """Size of all files of the store."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
