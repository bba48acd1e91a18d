"""Views that a store already has, for another teacher to look at; no source image is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milan_pipe.config.params import Params, stated_of
from milan_pipe.errors import DataError, SettingError
from milan_pipe.images.shards import ShardFile
from milan_pipe.storage import Location
from milan_pipe.student.encoder import grid_of
from milan_pipe.targets.manifest import CommittedShard, ManifestEntry
from milan_pipe.targets.schema import BLOCK_SAMPLES, SourceShard, StoreHeader, ViewRun, require_stated
from milan_pipe.targets.store import TargetStore, read_header


@dataclass(frozen=True, kw_only=True)
class StoredShard:
    """A shard of a store, whose views stand for a source shard. It can be sent to other processes.

    Attributes:
        location: of the store.
        shard: its name there.
        source: the source shard that its views are of.
        entry: what was committed of it.
    """

    location: Location
    shard: str
    source: SourceShard
    entry: ManifestEntry

    def __str__(self) -> str:
        return f"{self.location}/{self.shard}"

    @property
    def name(self) -> str:
        """File name of the source shard."""
        return self.source.name

    def difference(self, then: CommittedShard) -> str | None:
        """In what its images or views are not those that targets were made of; None where they are the same."""
        if self.source.bytes != then.source.bytes:
            return f"its images had {self.source.bytes} bytes, {then.source.bytes} when they were extracted"
        if self.source != then.source:
            return "other images than when it was extracted"
        digests = {self.entry.views_sha256, then.entry.views_sha256} - {None}
        return "other views than when it was extracted" if len(digests) > 1 else None

    def blocks(self, views: int | None = None) -> Iterator[list[ViewRun]]:
        """Blocks of up to 128 samples, in order; of each its views, or the first of them, without features.

        Raises:
            DataError: the shard is damaged, or its store cannot be seen from here.
            StoreError: it cannot be read.
        """
        header = read_header(self.location)
        if header is None:
            raise DataError(
                f"{self.location} is not a target store as seen from here; it must be a shared folder or bucket"
            )
        store, count = TargetStore(self.location, header, {self.shard: self.entry}), self.entry.samples
        for start in range(0, count, BLOCK_SAMPLES):
            stop = min(start + BLOCK_SAMPLES, count)
            yield [
                store.read(self.shard, view, start, stop, with_features=False)
                for view in range(header.views.count if views is None else views)
            ]


Images = ShardFile | StoredShard
"""Where the samples of a shard come from."""


def require_one_source(images: object, views_from: object) -> None:
    """Raise SettingError for both or neither of images and a store whose views are seen."""
    if (images is None) == (views_from is None):
        given = "both" if images is not None else "neither"
        raise SettingError(f"expected images or views_from, a store whose views are seen; found {given}")


def stored_shards(store: TargetStore) -> dict[str, StoredShard]:
    """The shards of a store by name."""
    return {
        name: StoredShard(location=store.location, shard=name, source=shard.source, entry=shard.entry)
        for name, shard in store.committed().items()
    }


def with_views_of(params: Params, header: StoreHeader, where: str | Path) -> Params:
    """Settings of a run over a store's views: their own settings, size and grid are the store's.

    Raises:
        MismatchError: settings that were given say otherwise; names each, with both values.
    """
    size, grid = header.views.size, header.teacher.grid
    own = {"image_size": size, "patch_size": size // grid[0]}
    given = params.student.model_fields_set
    student = params.student.model_copy(update={name: value for name, value in own.items() if name not in given})
    stated: dict[str, dict[str, Any]] = {
        "views": {**stated_of(params)["views"], "size": student.image_size},
        "teacher": {"grid": list(grid_of(student))},
    }
    require_stated(header, stated, where)
    return params.model_copy(update={"student": student, "views": header.views.settings})
