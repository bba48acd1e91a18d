"""How many images there are, without reading them: from an index, from tar headers, or from a few of the shards."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import IO, Any, Literal, TypeVar

from milan_pipe.errors import DataError, MilanError
from milan_pipe.images.files import IMAGE_SUFFIXES
from milan_pipe.images.index import ShardRecord, read_index
from milan_pipe.images.shards import ShardFile
from milan_pipe.images.tar import no_images, opened, split_member_name, walk
from milan_pipe.storage import Location

_MOST_LOCAL_SHARDS = 16
_MOST_REMOTE_SHARDS = 8
_MOST_AT_A_GLANCE = 4
# Only the beginning of a remote shard is fetched, a longer one where images are large: one request per header would
# take longer than the whole file.
_REMOTE_BYTES = (4 * 1024 * 1024, 64 * 1024 * 1024)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ImageCount:
    """Number of images, unreadable ones included.

    Attributes:
        source: `index`, prepare's own count; `headers`, the tar headers of all shards; `estimate`, those of `looked_at`
            shards, or of their beginnings, and the rest by its size in bytes; `given`, by the user; `store`, a store's
            records, without the images that it skipped.
        shards, bytes: all of them.
    """

    total: int
    source: Literal["index", "headers", "estimate", "given", "store"]
    shards: int
    looked_at: int
    bytes: int

    def __str__(self) -> str:
        how = {
            "index": "index.json",
            "headers": "tar headers",
            "given": "as given",
            "store": "records of the store",
            "estimate": f"estimated from {self.looked_at} of {self.shards} shards",
        }
        return f"{self.total:,} in {self.shards:,} shards ({how[self.source]})"


@dataclass(frozen=True)
class _Part:
    """Images in the first `bytes` of a shard; `whole`: there are no more."""

    total: int
    bytes: int
    whole: bool


def spread_evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, at equal distances."""
    count = min(most, len(items))
    return [items[position * len(items) // count] for position in range(count)]


def count_images(shards: Sequence[ShardFile], on_progress: Callable[[int, int], None]) -> ImageCount:
    """Count the images of shards.

    Args:
        on_progress: called with the shards that were looked at, and those that will be.

    Raises:
        DataError: there are no images, or a shard that was looked at is empty, damaged or no tar.
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
    source: Any = "headers" if len(chosen) == len(shards) and all(part.whole for part in parts) else "estimate"
    total = _estimate(parts, size)
    return ImageCount(total=total, source=source, shards=len(shards), looked_at=len(chosen), bytes=size)


def like_these(images: ImageCount, total: int, per_shard: int) -> ImageCount:
    """`total` images of the same mean size, in shards of `per_shard`; raises DataError where `images` has none."""
    if not images.total:
        raise DataError("no images to plan from")
    size = round(images.bytes / images.total * total)
    return ImageCount(total=total, source="given", shards=ceil(total / per_shard), looked_at=0, bytes=size)


def glance_at_images(shards: Sequence[ShardFile]) -> int | None:
    """About how many images there are, from the index or a few headers; None where both fail, for any reason."""
    with suppress(MilanError, OSError):
        indexed = indexed_images(shards)
        if indexed is not None:
            return indexed
        parts = []
        for shard in spread_evenly(shards, _MOST_AT_A_GLANCE):
            with suppress(DataError):
                parts.append(_look_at(shard))
        return _estimate(parts, sum(shard.size() for shard in shards)) or None
    return None


def _estimate(parts: Iterable[_Part], size: int) -> int:
    """Images in `size` bytes, from those in parts of them."""
    looked_at = sum(part.bytes for part in parts)
    return round(sum(part.total for part in parts) * size / looked_at) if looked_at else 0


def _look_at(shard: ShardFile) -> _Part:
    size = shard.size()
    for most in () if shard.location.local is not None else _REMOTE_BYTES:
        if most < size:
            part = _count(shard, io.BytesIO(shard.location.read_range(shard.name, 0, most)), size)
            if part.total:
                return part
    with opened(shard) as file:
        return _count(shard, file, size)


def _count(shard: ShardFile, file: IO[bytes], size: int) -> _Part:
    """Count by the headers of a tar of `size` bytes, or of its beginning."""
    keys: set[str] = set()
    before = start = 0
    whole = file.seek(0, io.SEEK_END) >= size
    try:
        for info in walk(shard, file, size):
            key, suffix = split_member_name(info.name)
            if suffix in IMAGE_SUFFIXES and key not in keys:
                before, start = len(keys), info.offset
                keys.add(key)
    except DataError:
        if whole:
            raise
        # How far the sample of the last image reaches is not known.
        return _Part(total=before, bytes=start, whole=False)
    if not keys:
        raise no_images(shard)
    return _Part(total=len(keys), bytes=size, whole=True)


def indexed_images(shards: Sequence[ShardFile]) -> int | None:
    """Number of images by the `index.json` beside the shards; None where it does not have each in its size."""
    indexes: dict[Location, dict[str, ShardRecord]] = {}
    images = 0
    for shard in shards:
        if shard.location not in indexes:
            indexes[shard.location] = {}
            # Most shards were never made by `prepare`, and have none.
            with suppress(MilanError):
                indexes[shard.location] = {record.name: record for record in read_index(shard.location).shards}
        record = indexes[shard.location].get(shard.name)
        if record is None or record.bytes != shard.size():
            return None
        images += record.samples
    return images
