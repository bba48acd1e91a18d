"""One shard of a target store as webdataset tars, `view-0.tar` and on: one per view, each complete in itself.

Members of a sample: KEY.jpg, KEY.json, KEY.features.npy, KEY.scale.npy where the codec needs it, and KEY.attention.npy;
webdataset decodes them unaided. Codes that a coder shrinks are KEY.features. Their bytes, and those of schema 2, are
described in `docs/store.md`.

By hand, not by webdataset's TarWriter: that keeps a file open for each view, and knows of no blocks and checksums.

The tars are sequential and carry no index. The shard's record does: where each block of 128 samples begins, and the
crc32c of all its bytes. A block is fetched with one read, checked, and only then taken apart.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numcodecs.shuffle import Shuffle
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from milan_pipe.errors import DataError, MilanError, one_line
from milan_pipe.storage import Location
from milan_pipe.targets.checksum import crc32c
from milan_pipe.targets.codec import Codec, codec_of
from milan_pipe.targets.schema import BLOCK_SAMPLES, ShardRecord, StoreHeader, TargetBlock, ViewRun
from milan_pipe.targets.zstd import unpacked

HEADER_FILE = "header.json"


class Member:
    """One array of every sample as bytes, all of one type and shape."""

    def __init__(self, suffix: str, dtype: np.dtype[Any], shape: tuple[int, ...], *, npy: bool) -> None:
        self.suffix = f"{suffix}.npy" if npy else suffix
        self._dtype, self._shape = dtype.newbyteorder("<"), shape
        self._head = _npy_head(self._dtype, shape) if npy else b""

    def pack(self, values: NDArray[Any]) -> bytes:
        """Bytes of one sample."""
        return self._head + np.ascontiguousarray(values, self._dtype).tobytes()

    def unpack(self, data: bytes | memoryview, into: NDArray[Any]) -> None:
        """Write the values of one sample into an array.

        Raises:
            ValueError: the bytes are not what `pack` gives.
        """
        if data[: len(self._head)] != self._head:
            raise ValueError(f"a member .{self.suffix} is not of {self._dtype} and shape {self._shape}")
        into[...] = np.frombuffer(data, self._dtype, offset=len(self._head)).reshape(self._shape)


def _npy_head(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    # By hand: numpy's own is padded as its version likes, and a tar is the same with every version.
    text = repr({"descr": dtype.str, "fortran_order": False, "shape": shape})
    begin = b"\x93NUMPY\x01\x00"
    length = -(-(len(begin) + 2 + len(text) + 1) // 64) * 64 - len(begin) - 2
    return begin + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"


class PackedCodes:
    """Codes of one sample (S, T) to bytes and back: order of axes, byte shuffle, zstd."""

    suffix = "features"

    def __init__(self, codec: Codec, tokens: int, width: int) -> None:
        self._dtype = codec.dtype.newbyteorder("<")
        self._shape = (width, tokens) if codec.coefficient_major else (tokens, width)
        self._transposed = codec.coefficient_major
        item, level = codec.dtype.itemsize, codec.info.zstd_level
        self._filters: list[Any] = [Shuffle(elementsize=item)] if item > 1 else []
        if level:
            self._filters.append(Zstd(level=level, checksum=True))

    def pack(self, code_ST: NDArray[Any]) -> bytes:
        """Bytes of one sample."""
        data: Any = np.ascontiguousarray(code_ST.T if self._transposed else code_ST, dtype=self._dtype)
        for each in self._filters:
            data = each.encode(data)
        return memoryview(data).cast("B").tobytes()

    def unpack(self, data: bytes | memoryview, into_ST: NDArray[Any]) -> None:
        """Write the codes of one sample into an array.

        Raises:
            ValueError, RuntimeError: the bytes are not what `pack` gives.
        """
        raw: Any = data
        for each in reversed(self._filters):
            raw = unpacked(raw, into_ST.nbytes) if isinstance(each, Zstd) else each.decode(raw)
        code = np.frombuffer(memoryview(raw).cast("B"), self._dtype).reshape(self._shape)
        into_ST[...] = code.T if self._transposed else code


class _Arrays:
    """How a store's header has the arrays of a sample written."""

    def __init__(self, header: StoreHeader) -> None:
        codec, sizes, npy = codec_of(header.codec), (header.tokens, header.teacher.width), header.schema_version > 2
        half = np.dtype(np.float16)
        plain = npy and not codec.info.zstd_level and not codec.coefficient_major
        self.codes = Member("features", codec.dtype, sizes, npy=True) if plain else PackedCodes(codec, *sizes)
        self.scale = Member("scale", half, (header.tokens,), npy=npy) if codec.has_scale else None
        self.attention = Member("attention", half, (header.patches,), npy=npy)


class TarShardFiles:
    """Tars of one shard in the making, each open only while a block is written."""

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        self._folder = folder
        self._arrays = _Arrays(header)
        # By name of the tar, offset and crc32c of each block, and where the last one ends.
        self._blocks: dict[str, list[tuple[int, int]]] = {_tar_name(view): [] for view in range(header.views.count)}
        self._ends = dict.fromkeys(self._blocks, 0)

    def append(self, block: TargetBlock) -> None:
        """Write the next samples."""
        for view, name in enumerate(self._blocks):
            begin, crc = self._ends[name], 0
            with self._open(name) as file:
                for member, data in self._members(block, view):
                    info = tarfile.TarInfo(member)
                    info.size, info.mode = len(data), 0o644
                    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
                    for part in (header, data, bytes(-len(data) % tarfile.BLOCKSIZE)):
                        file.write(part)
                        crc = crc32c(part, crc)
                self._ends[name] = file.tell()
            self._blocks[name].append((begin, crc))

    def _open(self, name: str) -> BinaryIO:
        # A file that has vanished must not be begun anew behind its first blocks.
        file = (self._folder / name).open("r+b" if self._ends[name] else "xb")
        file.seek(self._ends[name])
        return file

    def _members(self, block: TargetBlock, view: int) -> Iterator[tuple[str, bytes]]:
        for row, key in enumerate(block.keys):
            record = {
                "key": key,
                "label": int(block.label_N[row]),
                "view": view,
                "crop": block.crop_KN4[view, row].tolist(),
                "flip": bool(block.flip_KN[view, row]),
            }
            yield f"{key}.jpg", bytes(block.jpegs[view][row])
            yield f"{key}.json", json.dumps(record, ensure_ascii=False).encode()
            for member, values in (
                (self._arrays.codes, block.code_KNST),
                (self._arrays.scale, block.scale_KNS),
                (self._arrays.attention, block.attention_KNL),
            ):
                if member is not None and values is not None:
                    yield f"{key}.{member.suffix}", member.pack(values[view, row])

    def close(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """End the tars. Per tar, offset and crc32c of each block, then the end of the last block with a 0."""
        for name, end in self._ends.items():
            with self._open(name) as file:
                file.write(bytes(-(end + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE))
            self._blocks[name].append((end, 0))
        return self._blocks


def _tar_name(view: int) -> str:
    return f"view-{view}.tar"


def _members(block: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Suffix and data of the members of a checked block: regular files, and GNU's names of more than 100 bytes."""
    position, long_name = 0, None
    while position < len(block):
        header = bytes(block[position : position + tarfile.BLOCKSIZE])
        size = int(header[124:135], 8)
        if size < 0:
            raise ValueError(f"a member of {size} bytes")
        position += tarfile.BLOCKSIZE
        data = block[position : position + size]
        position += size + -size % tarfile.BLOCKSIZE
        if header[156:157] == b"L":
            long_name = bytes(data).rstrip(b"\0")
            continue
        name = long_name or header[:100].rstrip(b"\0")
        long_name = None
        yield name.rpartition(b"/")[2].partition(b".")[2].decode(), data


class TarShard:
    """Tars of one shard."""

    def __init__(
        self, location: Location, header: StoreHeader, record: ShardRecord, fail: Callable[[str], DataError]
    ) -> None:
        """Open the shard in the folder `location`, all files of which exist; `fail` makes the error for damage."""
        self._location = location
        self._fail = fail
        self._header = header
        self._record = record
        self._arrays = _Arrays(header)
        blocks = -(-record.source.samples // BLOCK_SAMPLES)
        for name in map(_tar_name, range(header.views.count)):
            found = len(record.blocks.get(name, ())) - 1
            if found != blocks:
                raise fail(f"{name}: its record names {max(found, 0)} blocks, expected {blocks}")

    def keys(self) -> Sequence[str]:
        """Keys of all samples, in order."""
        blocks = range(len(self._record.blocks[_tar_name(0)]) - 1)
        with self._parsing(0):
            return [json.loads(bytes(s["json"]))["key"] for block in blocks for s in self._samples(0, block)]

    def read(self, view: int, start: int, stop: int, *, with_views: bool = True, with_features: bool = True) -> ViewRun:
        """Samples `start` to `stop` of one view."""
        first, last = start // BLOCK_SAMPLES, (stop - 1) // BLOCK_SAMPLES + 1
        samples = [sample for block in range(first, last) for sample in self._samples(view, block)]
        chosen = samples[start - first * BLOCK_SAMPLES : stop - first * BLOCK_SAMPLES]
        if len(chosen) != stop - start:
            raise self._fail(f"{_tar_name(view)} holds {len(chosen)} of samples {start} to {stop}")
        with self._parsing(view):
            return self._run(chosen, with_views, with_features)

    @contextmanager
    def _parsing(self, view: int) -> Iterator[None]:
        try:
            yield
        except MilanError:
            raise
        except (ValueError, LookupError, TypeError, RuntimeError, ArithmeticError) as error:
            raise self._fail(f"{_tar_name(view)}: {one_line(error)}") from error

    def _samples(self, view: int, block: int) -> list[dict[str, memoryview]]:
        name = _tar_name(view)
        table = self._record.blocks[name]
        (start, crc), (stop, _) = table[block], table[block + 1]
        # Of numpy, which asks for large pages: fresh small ones cost several times the reading.
        data = np.empty(max(0, stop - start), np.uint8).data
        if self._location.read_into(name, start, data) != stop - start or crc32c(data) != crc:
            raise self._fail(f"{name} is damaged: bytes {start} to {stop} do not fit their crc32c")
        samples: list[dict[str, memoryview]] = []
        with self._parsing(view):
            for suffix, content in _members(data):
                if suffix == "jpg":
                    samples.append({})
                samples[-1][suffix] = content
        return samples

    def _run(self, samples: list[dict[str, memoryview]], with_views: bool, with_features: bool) -> ViewRun:
        header, arrays, featured = self._header, self._arrays, samples if with_features else []
        count = len(featured)
        code = np.empty((count, header.tokens, header.teacher.width), codec_of(header.codec).dtype)
        attention = np.empty((count, header.patches), np.float16)
        has_scale = arrays.scale is not None and with_features
        scale = np.empty((count, header.tokens), np.float16) if has_scale else None
        for row, sample in enumerate(featured):
            arrays.codes.unpack(sample[arrays.codes.suffix], code[row])
            arrays.attention.unpack(sample[arrays.attention.suffix], attention[row])
            if arrays.scale is not None and scale is not None:
                arrays.scale.unpack(sample[arrays.scale.suffix], scale[row])
        records = [json.loads(bytes(sample["json"])) for sample in samples]
        crop = np.array([record["crop"] for record in records], np.int32)
        if crop.shape != (len(records), 4) or not all(isinstance(record["key"], str) for record in records):
            raise ValueError("a record is not of a key and a crop of four numbers")
        return ViewRun(
            keys=[record["key"] for record in records],
            label_N=np.array([record["label"] for record in records], np.int64),
            code_NST=code,
            scale_NS=scale,
            attention_NL=attention,
            crop_N4=crop,
            flip_N=np.array([record["flip"] for record in records], np.bool_),
            jpegs=[bytes(sample["jpg"]) for sample in samples] if with_views else [],
        )
