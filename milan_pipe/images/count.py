"""How many images there are, without reading them: from an index, from tar headers, or from a few of the shards."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import IO, Literal, TypeVar

from milan_pipe.errors import DataError, MilanError
from milan_pipe.images.files import IMAGE_SUFFIXES
from milan_pipe.images.index import INDEX_NAME, ImageIndex, read_index
from milan_pipe.images.shards import ShardFile
from milan_pipe.images.tar import read_shard, split_member_name
from milan_pipe.storage import Location

_MOST_LOCAL_SHARDS = 16
_MOST_REMOTE_SHARDS = 8
_MOST_AT_A_GLANCE = 4
# Of a remote shard only the beginning is fetched, a longer one where images are large: one request a header would
# take longer than the whole file.
_REMOTE_BYTES = (4 * 1024 * 1024, 64 * 1024 * 1024)
_NUL_BLOCK = bytes(tarfile.BLOCKSIZE)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ImageCount:
    """Number of images, those included that will turn out to be unreadable.

    Attributes:
        source: `index`, prepare's own count; `headers`, each shard's tar headers were read; `estimate`, those of some
            shards, or of their beginnings, and the rest by its size in bytes; `given`, nobody looked.
        shards, bytes: all of them.
        looked_at: shards whose headers were read.
    """

    total: int
    source: Literal["index", "headers", "estimate", "given"]
    shards: int
    looked_at: int
    bytes: int

    def __str__(self) -> str:
        how = {
            "index": "index.json",
            "headers": "tar headers",
            "given": "as given",
            "estimate": f"estimated from {self.looked_at} of {self.shards} shards",
        }
        return f"{self.total:,} in {self.shards:,} shards ({how[self.source]})"


@dataclass(frozen=True)
class _Part:
    """Images that a shard's first `bytes` hold; `whole`: there are no more."""

    total: int
    bytes: int
    whole: bool


def spread_evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, at equal distances."""
    count = min(most, len(items))
    return [items[position * len(items) // count] for position in range(count)]


def count_images(shards: Sequence[ShardFile], on_progress: Callable[[int, int], None]) -> ImageCount:
    """Count the images of shards.

    Args:
        on_progress: called with how many shards were looked at, and how many will be.

    Raises:
        DataError: there are none, or a shard that was looked at is empty, damaged or no tar.
        MissingError, StoreError: a shard cannot be read.
    """
    size = sum(shard.size() for shard in shards)
    indexed = indexed_images(shards)
    if indexed is not None:
        return ImageCount(total=indexed, source="index", shards=len(shards), looked_at=0, bytes=size)
    local = all(shard.location.local is not None for shard in shards)
    chosen = spread_evenly(shards, _MOST_LOCAL_SHARDS if local else _MOST_REMOTE_SHARDS)
    parts = []
    with ThreadPoolExecutor(1 if local else len(chosen), thread_name_prefix="count") as pool:
        for part in pool.map(_look_at, chosen):
            parts.append(part)
            on_progress(len(parts), len(chosen))
    found = sum(part.total for part in parts)
    if not found:
        raise DataError(f"{chosen[0]} holds no images; expected members that end in {', '.join(IMAGE_SUFFIXES)}")
    exact = len(chosen) == len(shards) and all(part.whole for part in parts)
    return ImageCount(
        total=found if exact else round(found * size / sum(part.bytes for part in parts)),
        source="headers" if exact else "estimate",
        shards=len(shards),
        looked_at=len(chosen),
        bytes=size,
    )


def like_these(images: ImageCount, total: int, per_shard: int) -> ImageCount:
    """So many images like those that are there, in shards of `per_shard`.

    Raises:
        DataError: there are none to go by.
    """
    if not images.total:
        raise DataError("no images to plan from")
    return ImageCount(
        total=total,
        source="given",
        shards=ceil(total / per_shard),
        looked_at=0,
        bytes=round(images.bytes / images.total * total),
    )


def glance_at_images(shards: Sequence[ShardFile]) -> int | None:
    """About how many images there are, from the index or a few headers; None where neither says, for any reason."""
    with suppress(MilanError, OSError):
        indexed = indexed_images(shards)
        if indexed is not None:
            return indexed
        parts = [part for shard in spread_evenly(shards, _MOST_AT_A_GLANCE) if (part := _peek(shard, _REMOTE_BYTES[0]))]
        if parts:
            size = sum(shard.size() for shard in shards)
            return round(sum(part.total for part in parts) * size / sum(part.bytes for part in parts))
    return None


def _look_at(shard: ShardFile) -> _Part:
    # What the headers do not make plain, the reader of shards decides: it says what is wrong with one.
    return _peek(shard, *_REMOTE_BYTES) or _Part(
        total=sum(1 for _ in read_shard(shard, lambda *_: None)), bytes=shard.size(), whole=True
    )


def _peek(shard: ShardFile, *remote_bytes: int) -> _Part | None:
    """What a shard's headers say; of a remote one, those in the first of these numbers of bytes that say something."""
    size = shard.size()
    if shard.location.local is not None:
        with shard.open() as file:
            return _walk(file, size)
    for most in remote_bytes:
        part = _walk(io.BytesIO(shard.location.read_range(shard.name, 0, min(most, size))), size)
        if part is not None:
            return part
    return None


def _walk(file: IO[bytes], size: int) -> _Part | None:
    """What the headers of a tar of `size` bytes say, or of its beginning; None where they say nothing."""
    keys: set[str] = set()
    before, start, end = 0, 0, 0
    # tarfile lets ValueError, OverflowError and others through when a header is damaged or cut.
    with suppress(Exception):
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        while (info := tar.next()) is not None:
            # The list would grow with the shard.
            tar.members = []  # type: ignore[attr-defined]
            key = _key_of_image(info.name)
            if key is not None and key not in keys:
                before, start = len(keys), info.offset
                keys.add(key)
        end = tar.offset
    if file.seek(0, io.SEEK_END) < size:
        # How far the last image's sample reaches is not known.
        return _Part(total=before, bytes=start, whole=False) if before else None
    file.seek(end)
    if not keys or file.read(tarfile.BLOCKSIZE) != _NUL_BLOCK:
        return None
    return _Part(total=len(keys), bytes=size, whole=True)


def _key_of_image(name: str) -> str | None:
    """Key of a sample; None for members that are no image."""
    key, suffix = split_member_name(name)
    return key if suffix in IMAGE_SUFFIXES else None


def indexed_images(shards: Sequence[ShardFile]) -> int | None:
    """Number of images of shards by the `index.json` beside them; None where it does not name each in its size."""
    indexes: dict[Location, dict[str, tuple[int, int]]] = {}
    images = 0
    for shard in shards:
        if shard.location not in indexes:
            index = _index_of(shard.location)
            records = index.shards if index is not None else ()
            indexes[shard.location] = {record.name: (record.samples, record.bytes) for record in records}
        samples, size = indexes[shard.location].get(shard.name, (0, -1))
        if size != shard.size():
            return None
        images += samples
    return images


def _index_of(location: Location) -> ImageIndex | None:
    try:
        if location.local is not None:
            return read_index(location.local)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / INDEX_NAME).write_bytes(location.read(INDEX_NAME))
            return read_index(folder)
    # An index is a help and no duty: most shards were never made by `prepare`.
    except MilanError:
        return None
