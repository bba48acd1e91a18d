"""Stage 1 as a whole: which shards are still to do, who does them, and what it came to."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import torch

from milan_pipe.config.extraction import parse_share
from milan_pipe.config.params import Params
from milan_pipe.digests import sha256_of
from milan_pipe.errors import DataError, MilanError, MismatchError, StoreError
from milan_pipe.extraction.fit import sample_features
from milan_pipe.extraction.render import ShardJob, SourceError, digest
from milan_pipe.extraction.shard import Extractor, ShardResult, header_of
from milan_pipe.extraction.space import extraction_space_warning
from milan_pipe.extraction.stored import Images, StoredShard, require_one_source, stored_shards, with_views_of
from milan_pipe.extraction.worker import Assignment, load_extraction_teacher, process_count
from milan_pipe.images.bad import too_many_bad
from milan_pipe.images.shards import expand_shards
from milan_pipe.storage import location_of, require_writable
from milan_pipe.storage.kinds import TARGETS, require_new
from milan_pipe.targets.codec import build_codec
from milan_pipe.targets.convert import require_apart
from milan_pipe.targets.manifest import BAD_SAMPLES, CommittedShard, write_bad_samples
from milan_pipe.targets.schema import SourceInfo, SourceShard, StoreHeader
from milan_pipe.targets.store import TargetStoreWriter, header_sha256, open_targets, read_header
from milan_pipe.teacher.clip import Teacher

# Each source that is out of reach is tried for half a minute.
_MOST_UNREADABLE = 5
_MOST_NAMED = 5


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
        shards, samples, bad, bytes, bytes_per_view: of the whole store, earlier runs included.
        skipped: shards that an earlier run had committed.
        views, seconds, views_per_second: of this run.
        mean_cosine: codec fidelity over this run's views; None where all was skipped.
        phases: seconds by phase, summed over threads and workers; see `milan_pipe.extraction.render.Clock`.
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


@dataclass(kw_only=True)
class _Tally:
    """What is known of the run so far; its sums grow with it, as adding up all shards after each is quadratic."""

    progress: ExtractProgress
    on_progress: Callable[[ExtractProgress], None]
    committed: set[str] = field(default_factory=set)
    samples: int = 0
    bad: int = 0
    bad_example: str = ""
    failed: list[ShardResult] = field(default_factory=list)
    views: int = 0
    cosine: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)  # a cluster's client reports from a thread of its own

    def add_committed(self, name: str, source: SourceShard) -> None:
        self.committed.add(name)
        self.samples += source.samples
        self.bad += len(source.bad)
        if source.bad and not self.bad_example:
            self.bad_example = f"{source.name}: {source.bad[0][0]}: {source.bad[0][1]}"

    def add(self, result: ShardResult) -> None:
        if result.source is None:
            self.failed.append(result)
        else:
            self.add_committed(result.name, result.source)
            self.views += result.views
            self.cosine += result.cosine_sum
            for phase, seconds in result.seconds.items():
                self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        self.report()

    def report(self, views: int = 0, bad: int = 0, workers: int | None = None) -> None:
        """Report what was done since the last call, shards that are not committed yet included."""
        with self.lock:
            views, bad = self.progress.views + views, self.progress.bad + bad
            workers = workers or self.progress.workers
            done = len(self.committed)
            self.progress = replace(self.progress, shards_done=done, views=views, bad=bad, workers=workers)
            self.on_progress(self.progress)

    def require_few_bad(self, limit: float, writer: TargetStoreWriter) -> None:
        """Over the whole store, earlier runs included: to run the same command again must not get past the limit."""
        seen = self.bad + self.samples
        if too_many_bad(self.bad, seen, len(self.committed), self.progress.shards, limit):
            write_bad_samples(writer.location, writer.committed())
            raise DataError(
                f"{self.bad} of {seen} images are unreadable, more than extract.max_bad_fraction {limit:g} allows "
                f"({self.bad_example}). {writer.location}/{BAD_SAMPLES} lists them: repair the source, or raise the "
                "limit"
            )

    def failure(self) -> Exception:
        """The error for shards that failed."""
        first, failed, shards = self.failed[0].error, len(self.failed), self.progress.shards
        if shards == 1 and isinstance(first, MilanError):
            return first
        reasons = [
            f"{r.name}: {r.error if isinstance(r.error, MilanError) else f'{type(r.error).__name__}: {r.error}'}"
            for r in self.failed[:_MOST_NAMED]
        ]
        if failed > _MOST_NAMED:
            reasons.append(f"and {failed - _MOST_NAMED} more")
        return DataError(
            f"{failed} of {shards} shards failed: {'; '.join(reasons)}. "
            f"{len(self.committed)} shards are committed; repair these and run the same command again"
        )


def _header(
    teacher: Teacher, sources: Sequence[Images], params: Params, found: StoreHeader | None, seen: StoreHeader | None
) -> StoreHeader:
    """The header of this run; the codec is that of the store, if it was made for the same setting, else a new one.

    Args:
        found: the header of the store that is written, where it is there.
        seen: the header of the store whose views are used, if any.
    """
    codec = found.codec if found is not None else None
    if codec is None or codec.model_copy(update=params.codec.header_fields()) != codec:
        features = sample_features(teacher, sources, params) if params.codec.name == "klt" else None
        codec = build_codec(params.codec, features).info
    names = "".join(f"{source.name}\n" for source in sources)
    source = SourceInfo(shards=len(sources), fingerprint=sha256_of(names.encode()))
    header = header_of(params, teacher.info, codec, source)
    return header if seen is None else header.model_copy(update={"views": seen.views, "source": seen.source})


def _require_same_sources(
    sources: Mapping[str, Images], committed: Mapping[str, CommittedShard], with_digests: bool
) -> None:
    """Refuse source shards that are not what they were when their targets were made."""
    changed = {}
    for name in sorted(sources.keys() & committed.keys()):
        source, then = sources[name], committed[name].source
        if isinstance(source, StoredShard):
            if what := source.difference(committed[name]):
                changed[name] = f"{source}: {what}"
        elif (size := source.size()) != then.bytes:
            changed[name] = f"{source}: {size} bytes, {then.bytes} when it was extracted"
        elif with_digests and digest(source)[1] != then.sha256:
            changed[name] = f"{source}: another sha256 than when it was extracted"
    if changed:
        raise MismatchError(
            f"{len(changed)} source shards have changed since their targets were made "
            f"({next(iter(changed.values()))}). Extract them again with --redo {','.join(list(changed)[:20])}"
        )


def extract_targets(
    images: str | Path | None,
    targets: str | Path,
    params: Params,
    *,
    shards: str | None = None,
    redo: Sequence[str] = (),
    verify_sources: bool = False,
    views_from: str | Path | None = None,
    on_progress: Callable[[ExtractProgress], None] = lambda _: None,
) -> ExtractReport:
    """Write the targets of all image shards; goes on where an earlier run of the same configuration stopped.

    Args:
        images: folder of shards, or shard paths with braces or globs; local or a URL. None with `views_from`.
        targets: folder of the target store; local or a URL.
        params: views are rendered at the student's input size; the teacher's input size is fitted to its grid.
        shards: `i/n`: do only every n-th shard, beginning with number i.
        redo: names of committed shards to do again, as `000123`.
        verify_sources: compare the sha256 of source shards that are done, and not their sizes alone.
        views_from: a complete store of another teacher, whose views are seen; no image is read, and what is not stated
            of views, size and grid is that store's.

    Raises:
        MissingError, DataError: images are missing, too many are unreadable, or shards failed; others are committed.
        MismatchError: the store has another configuration, source shards have changed, or the settings are not those
            of the views.
        SettingError: neither or both of `images` and `views_from`, or that store and the new one are not apart.
        StoreError: the store cannot be written.
    """
    began, extract = time.monotonic(), params.extract
    share, shares = parse_share(shards) if shards is not None else (0, 1)
    location = location_of(targets)
    sources: Mapping[str, Images]
    seen = None
    require_one_source(images, views_from)
    if images is not None:
        sources = {f"{position:06d}": source for position, source in enumerate(expand_shards(images))}
    elif views_from is not None:
        require_apart(location_of(views_from), location)
        first = open_targets(views_from, complete=True)
        seen, sources = first.header, stored_shards(first)
        params = with_views_of(params, seen, views_from)
    # Those who made the store that is seen have accepted what it lacks.
    most_bad = extract.max_bad_fraction if seen is None else 1.0
    require_writable(location)
    require_new(location.local, TARGETS)
    found = read_header(location)
    clustered = extract.scheduler is not None or process_count(extract) > 1
    if clustered:
        # Only now, as Dask takes a second to import; before anything is written, as it may be missing.
        from milan_pipe.extraction.cluster import extract_on_cluster, precision_of_workers, remove_left_folders

        # Also where nothing is left to do: a run may have been killed after its last shard.
        remove_left_folders()
    if extract.scheduler is not None and params.teacher.precision == "auto":
        if found is None:
            precision = precision_of_workers(extract.scheduler, params.teacher, extract)
        else:
            precision = found.teacher.precision
        params = params.model_copy(update={"teacher": params.teacher.model_copy(update={"precision": precision})})
    teacher = load_extraction_teacher(params)
    writer = TargetStoreWriter(targets, _header(teacher, list(sources.values()), params, found, seen))
    for name in redo:
        if name not in sources:
            names = f"{min(sources)} to {max(sources)}"
            raise DataError(f"there is no shard {name!r} to do again; {location} has {names}")
        writer.forget(name)
    known = writer.committed(sizes=True)
    _require_same_sources(sources, known, verify_sources)
    jobs = [
        ShardJob(name=name, images=source)
        for name, source in sources.items()
        if name not in known and int(name) % shares == share
    ]
    space = extraction_space_warning(writer.header, [job.images for job in jobs], location)
    if space is not None:
        warnings.warn(space, UserWarning, stacklevel=2)
    nothing = ExtractProgress(shards_done=0, shards=len(sources), views=0, bad=0, workers=1)
    tally = _Tally(progress=nothing, on_progress=on_progress)
    for name, shard in known.items():
        tally.add_committed(name, shard.source)
    tally.report()
    tally.require_few_bad(most_bad, writer)
    results: Generator[ShardResult, None, None]
    if jobs and clustered:
        # Each worker has its own; this one would take memory from the first.
        del teacher
        torch.cuda.empty_cache()
        assignment = Assignment(
            targets=str(targets if location.local is None else location.local.absolute()),
            header_sha256=header_sha256(writer.header),
            teacher=params.teacher,
            extract=extract,
            limits=params.images,
        )
        results = extract_on_cluster(assignment, jobs, tally.report, lambda workers: tally.report(workers=workers))
    else:
        results = Extractor(teacher, writer, extract, params.images).run(jobs, tally.report)
    unreadable = 0
    try:
        with closing(results):
            for result in results:
                tally.add(result)
                # The next shard would fail in the same way: a full disk, no permission, a store out of reach.
                if isinstance(result.error, OSError) and not isinstance(result.error, LookupError):
                    raise result.error
                unreadable = unreadable + 1 if isinstance(result.error, SourceError) else 0
                if unreadable == _MOST_UNREADABLE:
                    break
                tally.require_few_bad(most_bad, writer)
    except OSError as error:
        if isinstance(error, MilanError) and not isinstance(error, StoreError):
            raise
        reason = str(error) if isinstance(error, MilanError) else f"{targets}: {error.strerror or error}"
        raise StoreError(
            f"{reason}. {len(tally.committed)} of {len(sources)} shards are whole; the same command goes on from there"
        ) from error
    if shares > 1:
        # Other shares may have come to their end meanwhile; the last one finishes the store.
        for name, shard in writer.committed().items():
            if name in sources and name not in tally.committed:
                tally.add_committed(name, shard.source)
    complete = len(tally.committed) == len(sources)
    if complete:
        writer.finish()
    if tally.failed:
        raise tally.failure()
    seconds = time.monotonic() - began
    size = sum(location.sizes().values())
    return ExtractReport(
        shards=len(tally.committed),
        complete=complete,
        skipped=len(known),
        samples=tally.samples,
        bad=tally.bad,
        views=tally.views,
        seconds=seconds,
        views_per_second=tally.views / seconds,
        bytes=size,
        bytes_per_view=size / (tally.samples * params.views.count) if tally.samples else 0.0,
        mean_cosine=tally.cosine / tally.views if tally.views else None,
        phases=tally.phases,
    )
