"""Stage 1 as a whole: what is to be done, who does it, and what it came to."""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from milan_pipe import __version__
from milan_pipe.config.extraction import parse_share
from milan_pipe.config.params import Params
from milan_pipe.config.targets import CodecSettings
from milan_pipe.errors import DataError, MilanError, MismatchError, StoreError
from milan_pipe.extraction.fit import sample_features
from milan_pipe.extraction.render import ShardJob, SourceError, digest
from milan_pipe.extraction.scratch import remove_abandoned
from milan_pipe.extraction.shard import ShardResult
from milan_pipe.extraction.space import extraction_space_warning
from milan_pipe.extraction.worker import Assignment, ShardWorker, load_assigned_teacher
from milan_pipe.images.shards import ShardFile, expand_shards
from milan_pipe.storage import location_of, require_writable
from milan_pipe.student.encoder import grid_of
from milan_pipe.targets.codec import build_codec
from milan_pipe.targets.manifest import CommittedShard, write_bad_samples
from milan_pipe.targets.schema import CodecInfo, SourceInfo, SourceShard, StoreHeader, ViewInfo
from milan_pipe.targets.store import TargetStoreWriter, read_header
from milan_pipe.teacher.clip import Teacher

_JUDGED_FROM_IMAGES, _JUDGED_FROM_SHARE = 1000, 0.1
# Of sources that are out of reach each is tried for half a minute.
_MOST_UNREADABLE = 5


@dataclass(frozen=True, kw_only=True)
class ExtractProgress:
    """Reported while extraction goes on: shards of the store, totals of this run, processes at work."""

    shards_done: int
    shards: int
    views: int
    bad: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """What an extraction came to.

    Attributes:
        shards, samples, bad: committed in the store, earlier runs included.
        complete: whether all shards are committed.
        skipped: shards that an earlier run had committed.
        views, seconds: of this run.
        views_per_second: of this run, all stages together; 0 where all was skipped.
        bytes, bytes_per_view: of the whole store.
        mean_cosine: codec fidelity over this run's views; None where all was skipped.
        phases: seconds by phase, summed over threads and workers; see `milan_pipe.extraction.clock`.
    """

    shards: int
    complete: bool
    skipped: int
    samples: int
    bad: int
    views: int
    seconds: float
    views_per_second: float
    bytes: int
    bytes_per_view: float
    mean_cosine: float | None
    phases: dict[str, float]


@dataclass
class _Tally:
    """What is known of the run so far."""

    shards: int
    on_progress: Callable[[ExtractProgress], None]
    committed: dict[str, CommittedShard | ShardResult]
    workers: int = 1
    views: int = 0
    bad: int = 0
    done_views: int = 0
    cosine: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    failed: list[ShardResult] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    kept_samples: int = 0
    bad_samples: int = 0
    bad_example: str = ""

    def __post_init__(self) -> None:
        for shard in self.committed.values():
            self._count(shard.source)

    def _count(self, source: SourceShard | None) -> None:
        """Sums over the whole store, kept as they grow: to go through all shards after each is quadratic."""
        if source is not None:
            self.kept_samples += source.samples
            self.bad_samples += len(source.bad)
            if source.bad and not self.bad_example:
                self.bad_example = f"{source.name}: {source.bad[0][0]}: {source.bad[0][1]}"

    def report(self, views: int = 0, bad: int = 0) -> None:
        with self.lock:  # a cluster's client reports from a thread of its own
            self.views += views
            self.bad += bad
            self.on_progress(
                ExtractProgress(
                    shards_done=len(self.committed),
                    shards=self.shards,
                    views=self.views,
                    bad=self.bad,
                    workers=self.workers,
                )
            )

    def set_workers(self, workers: int) -> None:
        self.workers = workers

    def add(self, result: ShardResult) -> None:
        if result.source is None:
            self.failed.append(result)
        else:
            self.committed[result.name] = result
            self._count(result.source)
            self.done_views += result.views
            self.cosine += result.cosine_sum
            for phase, seconds in result.seconds.items():
                self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        self.report()

    def has_too_many_bad(self, limit: float) -> bool:
        """Over the whole store, earlier runs included: to run the same command again must not get past the limit.

        Judged once it is sure, or once enough of the whole is known: a first shard may hold all that is bad.
        """
        seen, done = self.bad_samples + self.kept_samples, len(self.committed)
        whole = seen * self.shards / max(done, 1)
        is_enough = seen >= _JUDGED_FROM_IMAGES and seen >= _JUDGED_FROM_SHARE * whole
        return self.bad_samples > limit * (seen if is_enough else whole)


def source_info(shards: Sequence[ShardFile]) -> SourceInfo:
    """Fingerprint over the names of the source shards, in order."""
    names = "".join(f"{shard.name}\n" for shard in shards)
    return SourceInfo(shards=len(shards), fingerprint=hashlib.sha256(names.encode()).hexdigest())


def shard_name(position: int) -> str:
    """Name in the store of the source shard at a position."""
    return f"{position:06d}"


def _codec_info(
    config: CodecSettings,
    found: StoreHeader | None,
    fit: Callable[[], CodecInfo],
) -> CodecInfo:
    """The codec of a store: the one that it has, if it was made for the same setting, else a new one."""
    if found is not None:
        asked = found.codec.model_copy(update=config.header_fields())
        if asked == found.codec:
            return found.codec
    return fit()


def _header(
    teacher: Teacher,
    shards: Sequence[ShardFile],
    params: Params,
    found: StoreHeader | None,
) -> StoreHeader:
    views, codec, size = params.views, params.codec, params.student.image_size

    def fit() -> CodecInfo:
        if codec.name != "klt":
            return build_codec(codec).info
        features = sample_features(teacher, shards, views, size, params.extract.batch_size, codec.fit_samples)
        return build_codec(codec, features).info

    return StoreHeader(
        package_version=__version__,
        format=params.extract.format,
        teacher=teacher.info,
        views=ViewInfo(size=size, **views.model_dump()),
        codec=_codec_info(codec, found, fit),
        source=source_info(shards),
    )


def _require_same_sources(
    shards: Sequence[ShardFile], committed: Mapping[str, CommittedShard], with_digests: bool
) -> None:
    """Find source shards that are not what they were when their targets were made.

    Raises:
        MismatchError: names them, and what to run.
    """
    changed = []
    for position, shard in enumerate(shards):
        done = committed.get(shard_name(position))
        if done is None:
            continue
        then = done.source
        size = shard.size()
        if size != then.bytes:
            changed.append((shard_name(position), f"{shard}: {size} bytes, {then.bytes} when it was extracted"))
        elif with_digests and digest(shard)[1] != then.sha256:
            changed.append((shard_name(position), f"{shard}: another sha256 than when it was extracted"))
    if changed:
        raise MismatchError(
            f"{len(changed)} source shards have changed since their targets were made ({changed[0][1]}). Extract them "
            f"again with --redo {','.join(name for name, _ in changed[:20])}"
        )


def _in_process(
    assignment: Assignment, teacher: Teacher, header: StoreHeader, jobs: Iterable[ShardJob], tally: _Tally
) -> Iterator[ShardResult]:
    return ShardWorker(assignment, teacher, header).run(jobs, tally.report)


def _on_cluster(assignment: Assignment, jobs: Sequence[ShardJob], tally: _Tally) -> Iterator[ShardResult]:
    # Dask takes a second to import, and only a cluster needs it.
    from milan_pipe.extraction.cluster import extract_on_cluster

    return extract_on_cluster(assignment, jobs, tally.report, tally.set_workers)


def _is_stores_fault(error: Exception) -> bool:
    """Whether the next shard would fail in the same way: a full disk, no permission, a store out of reach."""
    return isinstance(error, OSError) and not isinstance(error, LookupError)


def extract_targets(
    images: str | Path,
    targets: str | Path,
    params: Params,
    *,
    shards: str | None = None,
    redo: Sequence[str] = (),
    verify_sources: bool = False,
    on_progress: Callable[[ExtractProgress], None] = lambda _: None,
) -> ExtractReport:
    """Write the targets of all image shards; goes on where an earlier run of the same configuration stopped.

    Args:
        images: folder of shards, or shard paths with braces or globs; local or a URL.
        targets: folder of the target store; local or a URL.
        params: views are rendered at the student's input size; the teacher's input size is fitted to its grid.
        shards: `i/n`: do only every n-th shard, beginning with number i.
        redo: names of committed shards to do again, as `000123`.
        verify_sources: compare the sha256 of source shards that are done, and not their sizes alone.

    Raises:
        MissingError, DataError: images are not there or cannot be read, too many are unreadable, or shards failed; all
            that could be done is committed first.
        MismatchError: the store that is there has another configuration, or source shards have changed.
        StoreError: the store cannot be written.
    """
    began = time.monotonic()
    share, shares = parse_share(shards) if shards is not None else (0, 1)
    sources = expand_shards(images)
    location = location_of(targets)
    require_writable(location)
    found = read_header(location)
    extract = params.extract
    assignment = Assignment(
        targets=str(targets), teacher=params.teacher, grid=grid_of(params.student), views=params.views, extract=extract
    )
    model = load_assigned_teacher(assignment)
    header = _header(model, sources, params, found)
    writer = TargetStoreWriter(targets, header)
    names = [shard_name(position) for position in range(len(sources))]
    own_names = set(names)
    for name in redo:
        if name not in own_names:
            raise DataError(f"there is no shard {name!r} to do again; {location} has {names[0]} to {names[-1]}")
        writer.forget(name)
    known = writer.committed(sizes=True)
    _require_same_sources(sources, known, verify_sources)
    jobs = [
        ShardJob(name=name, images=source)
        for position, (name, source) in enumerate(zip(names, sources, strict=True))
        if name not in known and position % shares == share
    ]
    space = extraction_space_warning(header, [job.images for job in jobs], location)
    if space is not None:
        warnings.warn(space, UserWarning, stacklevel=2)
    tally = _Tally(shards=len(sources), on_progress=on_progress, committed=dict(known))
    tally.report()

    def require_few_bad() -> None:
        if tally.has_too_many_bad(extract.max_bad_fraction):
            bad, seen = tally.bad_samples, tally.bad_samples + tally.kept_samples
            listed = write_bad_samples(location, writer.committed())
            raise DataError(
                f"{bad} of {seen} images are unreadable, more than extract.max_bad_fraction "
                f"{extract.max_bad_fraction:g} allows ({tally.bad_example}). {listed} lists them: repair the source, "
                "or raise the limit"
            )

    require_few_bad()
    remove_abandoned()
    clustered = jobs and (extract.scheduler is not None or extract.workers > 1)
    results = (
        _on_cluster(assignment, jobs, tally)
        if clustered
        else _in_process(assignment, model, writer.header, jobs, tally)
    )
    unreadable = 0
    try:
        for result in results:
            tally.add(result)
            if result.error is not None and _is_stores_fault(result.error):
                raise result.error
            unreadable = unreadable + 1 if isinstance(result.error, SourceError) else 0
            if unreadable == _MOST_UNREADABLE:
                break
            require_few_bad()
    except OSError as error:
        if isinstance(error, MilanError) and not isinstance(error, StoreError):
            raise
        reason = str(error) if isinstance(error, MilanError) else f"{targets}: {error.strerror or error}"
        raise StoreError(
            f"{reason}. {len(tally.committed)} of {len(sources)} shards are whole; the same command goes on from there"
        ) from error
    finally:
        _close(results)
    if shares > 1:
        # Other shares may have come to their end meanwhile; the last one finishes the store.
        tally.committed.update({name: shard for name, shard in writer.committed().items() if name in own_names})
    complete = len(tally.committed) == len(sources)
    if complete:
        writer.finish()
    if tally.failed:
        raise _failure(tally.failed, len(tally.committed), len(sources))
    seconds = time.monotonic() - began
    committed = [shard.source for shard in tally.committed.values() if shard.source is not None]
    samples = sum(source.samples for source in committed)
    size = sum(location.sizes().values())
    return ExtractReport(
        shards=len(committed),
        complete=complete,
        skipped=len(known),
        samples=samples,
        bad=sum(len(source.bad) for source in committed),
        views=tally.done_views,
        seconds=seconds,
        views_per_second=tally.done_views / seconds,
        bytes=size,
        bytes_per_view=size / (samples * params.views.count) if samples else 0.0,
        mean_cosine=tally.cosine / tally.done_views if tally.done_views else None,
        phases=dict(tally.phases),
    )


def _close(results: Iterator[ShardResult]) -> None:
    """End the threads or processes behind an iterator that was left early."""
    close = getattr(results, "close", None)
    if close is not None:
        close()


def _failure(failed: Sequence[ShardResult], committed: int, shards: int) -> Exception:
    first = failed[0].error
    if len(failed) == 1 and shards == 1 and isinstance(first, MilanError):
        return first
    reasons = "; ".join(f"{result.name}: {_reason(result.error)}" for result in failed[:5])
    more = f"; and {len(failed) - 5} more" if len(failed) > 5 else ""
    return DataError(
        f"{len(failed)} of {shards} shards failed: {reasons}{more}. {committed} shards are committed; repair these and "
        "run the same command again"
    )


def _reason(error: Exception | None) -> str:
    return str(error) if isinstance(error, MilanError) else f"{type(error).__name__}: {error}"
