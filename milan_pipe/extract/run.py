"""Many shards to a target store, in this process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from milan_pipe import __version__
from milan_pipe.data.ahead import thread_count
from milan_pipe.data.images import expand_shards
from milan_pipe.data.views import ViewConfig
from milan_pipe.devices import resolve_device
from milan_pipe.errors import DataError, MilanError, StoreError
from milan_pipe.extract.shard import ShardTask, extract_shard
from milan_pipe.settings import Settings
from milan_pipe.targets.codec import CodecConfig, build_codec
from milan_pipe.targets.schema import SourceInfo, SourceShard, StoreHeader, ViewInfo
from milan_pipe.targets.zarr_store import ZarrTargetReader, ZarrTargetWriter
from milan_pipe.teacher.clip import TeacherConfig, load_teacher


class ExtractConfig(Settings):
    """How stage 1 runs; nothing here but `batch_size` can change a byte of what it writes."""

    batch_size: int = Field(
        64, ge=1, description="views in one teacher forward pass; part of the last bit's arithmetic"
    )
    threads: int = Field(0, ge=0, description="threads that decode, crop and encode pictures; 0: one per processor")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:1, for the teacher")
    max_bad_fraction: float = Field(
        0.05, ge=0, le=1, description="share of unreadable pictures above which the run stops"
    )


@dataclass(frozen=True, kw_only=True)
class ExtractProgress:
    """Told while extraction goes on: totals of this run, and all shards of the store."""

    shards_done: int
    shards: int
    views: int
    bad: int


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction came to.

    Attributes:
        shards, samples, bad: of the whole store, earlier runs included.
        skipped: shards that an earlier run had committed.
        views, seconds: of this run.
        views_per_second: of this run, all stages together; 0 where all was skipped.
        bytes, bytes_per_view: of the whole store.
        mean_cosine: codec fidelity over this run's views; None where all was skipped.
    """

    shards: int
    skipped: int
    samples: int
    bad: int
    views: int
    seconds: float
    views_per_second: float
    bytes: int
    bytes_per_view: float
    mean_cosine: float | None


def source_info(shards: Sequence[Path]) -> SourceInfo:
    """Fingerprint over the names and sizes of the source shards, in order."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name}\0{shard.stat().st_size}\n".encode())
    return SourceInfo(shards=len(shards), fingerprint=digest.hexdigest())


def _check_bad_share(shards: dict[str, SourceShard], limit: float) -> None:
    """Over the whole store, earlier runs included: to run the same command again must not get past the limit."""
    bad = sum(len(shard.bad) for shard in shards.values())
    good = sum(shard.samples for shard in shards.values())
    if bad > limit * (bad + good):
        raise DataError(
            f"{bad} of {bad + good} pictures are unreadable, more than extract.max_bad_fraction {limit:g} allows "
            f"({_first_bad(shards)}). Mend the source, or raise the limit"
        )


def _first_bad(shards: dict[str, SourceShard]) -> str:
    return next((f"{s.name}: {s.bad[0][0]}: {s.bad[0][1]}" for s in shards.values() if s.bad), "")


def extract_targets(
    images: str | Path,
    targets: str | Path,
    *,
    teacher: TeacherConfig,
    views: ViewConfig,
    view_size: int,
    codec: CodecConfig,
    extract: ExtractConfig,
    on_progress: Callable[[ExtractProgress], None] = lambda _: None,
) -> ExtractReport:
    """Write the targets of all image shards; goes on where an earlier run of the same configuration stopped.

    Args:
        images: folder of shards, or shard paths with braces or globs.
        targets: folder of the target store.
        view_size: rendered side in pixels, the student's input size.

    Raises:
        MissingError, DataError: images are not there or cannot be read, or too many are unreadable.
        MismatchError: the store that is there has another configuration.
        StoreError: the store cannot be written.
    """
    began = time.monotonic()
    shards = expand_shards(images)
    model = load_teacher(teacher, resolve_device(extract.device))
    shard_codec = build_codec(codec)
    header = StoreHeader(
        package_version=__version__,
        teacher=model.info,
        views=ViewInfo(size=view_size, **views.model_dump()),
        codec=shard_codec.info,
        source=source_info(shards),
    )
    writer = ZarrTargetWriter(Path(targets), header)
    task = ShardTask(
        teacher=model,
        views=views,
        size=view_size,
        codec=shard_codec,
        batch_size=extract.batch_size,
        threads=thread_count(extract.threads),
    )
    known = writer.committed()
    skipped = len(known)
    done_views = done_bad = 0
    cosine = 0.0

    def tell(more_views: int, more_bad: int) -> None:
        nonlocal done_views, done_bad
        done_views += more_views
        done_bad += more_bad
        on_progress(ExtractProgress(shards_done=len(known), shards=len(shards), views=done_views, bad=done_bad))

    tell(0, 0)
    _check_bad_share(known, extract.max_bad_fraction)
    for position, shard in enumerate(shards):
        name = f"{position:06d}"
        if name in known:
            continue
        try:
            result = extract_shard(task, shard, writer.open_shard(name), tell)
        except OSError as error:
            if isinstance(error, MilanError):
                raise
            raise StoreError(
                f"{targets}, shard {name}: {error.strerror or error}. {len(known)} of {len(shards)} shards are whole; "
                "the same command goes on from there"
            ) from error
        known[name] = result.source
        cosine += result.cosine_sum
        tell(0, 0)
        _check_bad_share(known, extract.max_bad_fraction)
    writer.finish()
    seconds = time.monotonic() - began
    samples = sum(shard.samples for shard in known.values())
    size = ZarrTargetReader(targets).bytes_on_disk()
    return ExtractReport(
        shards=len(known),
        skipped=skipped,
        samples=samples,
        bad=sum(len(shard.bad) for shard in known.values()),
        views=done_views,
        seconds=seconds,
        views_per_second=done_views / seconds if done_views else 0.0,
        bytes=size,
        bytes_per_view=size / (samples * views.count),
        mean_cosine=cosine / done_views if done_views else None,
    )
