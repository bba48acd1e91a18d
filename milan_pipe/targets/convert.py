"""A store written again, in either backend's files: the same values and records, without the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from milan_pipe.config.targets import StoreFormat
from milan_pipe.errors import DataError, MismatchError, SettingError
from milan_pipe.storage import Location, location_of
from milan_pipe.storage.kinds import TARGETS, require_new
from milan_pipe.storage.local import real_path
from milan_pipe.targets.schema import BLOCK_SAMPLES, SCHEMA_VERSION, TargetBlock
from milan_pipe.targets.store import TargetStore, TargetStoreWriter, open_targets


@dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """Shards of the new store, those of them that were complete before, samples, and bytes."""

    shards: int
    skipped: int
    samples: int
    bytes: int


def _block(store: TargetStore, shard: str, start: int, stop: int) -> TargetBlock:
    runs = [store.read(shard, view, start, stop) for view in range(store.header.views.count)]
    scales = [run.scale_NS for run in runs if run.scale_NS is not None]
    return TargetBlock(
        keys=runs[0].keys,
        label_N=runs[0].label_N,
        code_KNST=np.stack([run.code_NST for run in runs]),
        scale_KNS=np.stack(scales) if scales else None,
        attention_KNL=np.stack([run.attention_NL for run in runs]),
        crop_KN4=np.stack([run.crop_N4 for run in runs]),
        flip_KN=np.stack([run.flip_N for run in runs]),
        jpegs=[run.jpegs for run in runs],
    )


def require_apart(source: Location, destination: Location) -> None:
    """Refuse a store that is written where another is read; SettingError where one lies within the other."""
    if source.local is not None and destination.local is not None:
        one, other = real_path(source.local).parts, real_path(destination.local).parts
    else:
        one, other = tuple(source.name.rstrip("/").split("/")), tuple(destination.name.rstrip("/").split("/"))
    if one[: len(other)] == other[: len(one)]:
        what = "is the store that is read" if one == other else f"and {source} lie one within the other"
        raise SettingError(f"{destination} {what}; name another folder for the new store")


def convert_targets(
    source: str | Path,
    destination: str | Path,
    *,
    format: StoreFormat,
    zstd_level: int | None = None,
    redo: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> ConvertReport:
    """Write a store again, in either format and the present schema; goes on where it was interrupted.

    Args:
        format: of the new store.
        zstd_level: entropy coder of its codes, 0 for none; by default that of the source.
        redo: names of shards to write again, as `000123`.
        on_progress: called with shards done and shards in all.

    Raises:
        MissingError, DataError, MismatchError, StoreError: the source cannot be read, is damaged or not complete, has
            no shard that is named, or the destination holds something else, as targets of other images.
        SettingError: one lies within the other.
    """
    require_apart(location_of(source), location_of(destination))
    store = open_targets(source, complete=True)
    codec = store.header.codec
    if zstd_level is not None:
        codec = codec.model_copy(update={"zstd_level": zstd_level})
    changes = {"format": format, "schema_version": SCHEMA_VERSION, "codec": codec}
    require_new(location_of(destination).local, TARGETS)
    writer = TargetStoreWriter(destination, store.header.model_copy(update=changes))
    for shard in redo:
        if shard not in store.shards:
            raise DataError(
                f"there is no shard {shard!r} to write again; {store.location} has {store.shards[0]} to "
                f"{store.shards[-1]}"
            )
        writer.forget(shard)
    previous = writer.committed(sizes=True)
    committed = store.committed() if previous else {}
    changed = [name for name in store.shards if name in previous and previous[name].source != committed[name].source]
    if changed:
        raise MismatchError(
            f"{len(changed)} of the {len(previous)} shards of {destination} are of other images than those of "
            f"{source}, as {changed[0]}; name another folder, or write them again with --redo {','.join(changed[:20])}"
        )
    skipped = 0
    for done, shard in enumerate(store.shards):
        on_progress(done, len(store.shards))
        if shard in previous:
            skipped += 1
            continue
        record = store.record(shard)
        new = writer.open_shard(shard)
        try:
            count = store.samples(shard)
            for start in range(0, count, BLOCK_SAMPLES):
                new.append(_block(store, shard, start, min(start + BLOCK_SAMPLES, count)))
            new.commit(record.source, record.mean_cosine)
        except BaseException:
            new.discard()
            raise
    writer.finish()
    on_progress(len(store.shards), len(store.shards))
    return ConvertReport(
        shards=len(store.shards),
        skipped=skipped,
        samples=sum(store.samples(shard) for shard in store.shards),
        bytes=sum(writer.location.sizes().values()),
    )
