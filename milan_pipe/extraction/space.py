"""Whether a store will fit where it is written, reported before the first view is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from milan_pipe.config.targets import StoreFormat
from milan_pipe.extraction.stored import Images, StoredShard
from milan_pipe.images.count import glance_at_images
from milan_pipe.images.shards import ShardFile
from milan_pipe.storage import Location
from milan_pipe.targets.schema import StoreHeader
from milan_pipe.units import size as in_words

# Photographs at quality 95 take half of it.
_JPEG_BYTES_PER_PIXEL = 1
# A tar pads each of five members and gives it a header; zarr keeps crop, flip and where a JPEG lies.
_FIXED_BYTES: dict[StoreFormat, int] = {"zarr": 64, "webdataset": 5 * 1024}
_SCALE_BYTES = _ATTENTION_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class FreeSpace:
    """Room for a store, in its folder as named; `free_bytes` is None where it cannot be known, as in a bucket."""

    folder: str
    needed_bytes: int
    free_bytes: int | None

    @property
    def short(self) -> bool:
        """Whether it is known not to fit."""
        return self.free_bytes is not None and self.free_bytes < self.needed_bytes


def free_space(location: Location, needed_bytes: float) -> FreeSpace:
    """How much is free on the disk of a folder, which need not be there yet."""
    free = _of_disk(location, lambda folder: shutil.disk_usage(folder).free)
    return FreeSpace(folder=str(location), needed_bytes=round(needed_bytes), free_bytes=free)


def free_files(location: Location) -> int | None:
    """Files that may still be made on the disk of a folder; None where nobody counts them, as in a bucket."""
    if not hasattr(os, "statvfs"):
        return None
    return _of_disk(location, lambda folder: os.statvfs(folder).f_favail) or None


def _of_disk(location: Location, measure: Callable[[Path], int]) -> int | None:
    """A measure of the disk that a folder is to lie on; None in a bucket."""
    folder = location.local and location.local.absolute()
    for present in (folder, *folder.parents) if folder else ():
        # Not made yet, or a file is in the way: the write will report that.
        with suppress(OSError):
            return measure(present)
    return None


def free_space_warning(space: FreeSpace, *, at_most: bool = False) -> str | None:
    """One line where a store is known not to fit, else None; `at_most`: `needed_bytes` is a bound, not an estimate."""
    if space.free_bytes is None or not space.short:
        return None
    need = "may need up to" if at_most else "will need about"
    return (
        f"the targets {need} {in_words(space.needed_bytes)}, and {in_words(space.free_bytes)} are free at "
        f"{space.folder}; name a folder with room, or choose fewer views (views.count) or a smaller codec"
    )


def most_bytes_per_view(header: StoreHeader) -> int:
    """What a view takes at most: features as if their entropy coder saved nothing, a JPEG twice a photograph's."""
    per_dimension = 2 if header.codec.name == "float16" else 1
    features = header.tokens * (header.teacher.width * per_dimension + _SCALE_BYTES)
    jpeg = header.views.size**2 * _JPEG_BYTES_PER_PIXEL
    return features + jpeg + header.patches * _ATTENTION_BYTES + _FIXED_BYTES[header.format]


def extraction_space_warning(header: StoreHeader, shards: Sequence[Images], location: Location) -> str | None:
    """One line where the targets of these shards may not fit, as far as that can be known from a glance at them."""
    if location.local is None:
        return None
    stored = sum(shard.entry.samples for shard in shards if isinstance(shard, StoredShard))
    files = [shard for shard in shards if isinstance(shard, ShardFile)]
    images = glance_at_images(files) if files else stored
    if not images:
        return None
    bound = images * header.views.count * most_bytes_per_view(header)
    return free_space_warning(free_space(location, bound), at_most=True)
