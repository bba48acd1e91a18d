"""Image shards to blocks of rendered samples, made ahead of the teacher and across the borders of shards."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from milan_pipe.config.images import ImageSettings, ViewSettings
from milan_pipe.errors import DataError, MissingError, StoreError, system_reason
from milan_pipe.extraction.stored import Images, StoredShard
from milan_pipe.images.ahead import decoded_ahead
from milan_pipe.images.decode import decode_pixels
from milan_pipe.images.shards import ShardFile
from milan_pipe.images.tar import Sample, read_shard
from milan_pipe.images.views import (
    View,
    aligned,
    decode_jpeg,
    draw_view,
    encode_jpeg,
    render_view,
    shrink_factor,
    shrunk,
)
from milan_pipe.targets.schema import BLOCK_SAMPLES
from milan_pipe.targets.store import damaged

_AHEAD_PER_THREAD = 32
_COPY_BYTES = 4 * 1024 * 1024

Phase = Literal["read", "decode", "crop", "jpeg", "teacher", "encode", "write"]


class Clock:
    """Seconds by phase, summed over threads: phases that run side by side add up to more than the time on the wall."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, phase: Phase) -> Iterator[None]:
        """Count the time spent inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - began)

    def add(self, phase: Phase, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        with self._lock:
            self._seconds[phase] += seconds

    def take(self) -> dict[str, float]:
        """What was counted since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, defaultdict(float)
        return dict(seconds)


@dataclass(frozen=True, kw_only=True)
class RenderedSample:
    """One sample and its K views; pixels are the stored JPEGs decoded again, as teacher and student see them."""

    key: str
    label: int
    jpegs: tuple[bytes, ...]
    pixels_KHWC: NDArray[np.uint8]
    views: tuple[View, ...]


def render_sample(
    sample: Sample, settings: ViewSettings, size: int, limits: ImageSettings, clock: Clock, most: int | None = None
) -> RenderedSample:
    """Decode an image once and render its K views at `size` pixels, or the first `most`, as they would be among all.

    Raises:
        DataError: the image cannot be read, or is above `limits`.
    """
    views: tuple[View, ...] = ()
    source, factor = (0, 0), 1

    def draw(height: int, width: int) -> int:
        nonlocal views, source, factor
        drawn = [draw_view(settings, sample.key, index, height, width) for index in range(settings.count)]
        source, factor = (height, width), shrink_factor(drawn, size)
        # Where a view begins must not depend on how the image was decoded.
        views = tuple(aligned(view, factor) for view in drawn[:most])
        return factor

    with clock.of("decode"):
        image_HWC = decode_pixels(sample.data, draw, limits)
    with clock.of("crop"):
        by = 1 if image_HWC.shape[:2] == source else factor
        rendered = [render_view(image_HWC, shrunk(view, by), size) for view in views]
    with clock.of("jpeg"):
        jpegs = tuple(encode_jpeg(pixels, settings.jpeg_quality) for pixels in rendered)
        pixels_KHWC = np.empty((len(views), size, size, 3), np.uint8)
        for jpeg, pixels_HWC in zip(jpegs, pixels_KHWC, strict=True):
            decode_jpeg(jpeg, into=pixels_HWC)
    return RenderedSample(key=sample.key, label=sample.label, jpegs=jpegs, pixels_KHWC=pixels_KHWC, views=views)


@dataclass(frozen=True, kw_only=True)
class StoredSample:
    """One sample and its views as a store has them."""

    shard: StoredShard
    key: str
    label: int
    jpegs: tuple[bytes, ...]
    views: tuple[View, ...]


def stored_samples(shard: StoredShard, clock: Clock, most: int | None = None) -> Iterator[StoredSample]:
    """The samples of a stored shard, with all their views or the first `most`; raises as `StoredShard.blocks`."""
    blocks = shard.blocks(most)
    while True:
        with clock.of("read"), _reading(shard):
            runs = next(blocks, None)
        if runs is None:
            return
        for row, key in enumerate(runs[0].keys):
            boxes = [run.crop_N4[row].tolist() for run in runs]
            flips = [bool(run.flip_N[row]) for run in runs]
            yield StoredSample(
                shard=shard,
                key=key,
                label=int(runs[0].label_N[row]),
                jpegs=tuple(bytes(run.jpegs[row]) for run in runs),
                views=tuple(
                    View(top=top, left=left, height=height, width=width, flip=flip)
                    for (top, left, height, width), flip in zip(boxes, flips, strict=True)
                ),
            )


def decode_stored(sample: StoredSample, size: int, clock: Clock) -> RenderedSample:
    """Decode the views of a sample; DataError where one is damaged, with the command that writes it again."""
    pixels_KHWC = np.empty((len(sample.jpegs), size, size, 3), np.uint8)
    with clock.of("decode"):
        for view, (jpeg, pixels_HWC) in enumerate(zip(sample.jpegs, pixels_KHWC, strict=True)):
            try:
                decode_jpeg(jpeg, into=pixels_HWC)
            except DataError as error:
                what = f"view {view} of {sample.key}: {error}"
                raise damaged(sample.shard.location, sample.shard.shard, what) from error
    return RenderedSample(
        key=sample.key, label=sample.label, jpegs=sample.jpegs, pixels_KHWC=pixels_KHWC, views=sample.views
    )


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One shard to do: its name in the store, and its images."""

    name: str
    images: Images


@dataclass(kw_only=True)
class SourceFile:
    """What is known of a source shard while it is read; `bad` has key and reason of skipped samples."""

    bytes: int = 0
    sha256: str = ""
    bad: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, key: str, reason: str) -> None:
        self.bad.append((key, reason))


@dataclass(frozen=True, kw_only=True)
class RenderedBlock:
    """Up to 128 samples of one shard; a shard ends with an empty one, which carries the error that ended it, if any."""

    job: ShardJob
    source: SourceFile
    samples: list[RenderedSample]
    error: Exception | None = None


class SourceError(DataError):
    """A source shard cannot be read, whatever is in it. It is no fault of the store that is written."""


@contextmanager
def _reading(images: Images) -> Iterator[None]:
    """Have errors of reading name the source shard."""
    try:
        yield
    except MissingError:
        raise
    except StoreError as error:
        raise SourceError(f"shard {error}") from error
    except OSError as error:
        raise SourceError(f"shard {images} cannot be read: {system_reason(error)}") from error


def _pieces(images: ShardFile) -> Iterator[bytes]:
    with _reading(images), images.open() as file:
        while piece := file.read(_COPY_BYTES):
            yield piece


def digest(images: ShardFile, copy_to: IO[bytes] | None = None) -> tuple[int, str]:
    """Bytes and sha256 of a shard; on the way its bytes are written to `copy_to`.

    Raises:
        MissingError, SourceError: the shard cannot be read.
        StoreError: the copy cannot be written.
    """
    hasher, size = hashlib.sha256(), 0
    for piece in _pieces(images):
        hasher.update(piece)
        size += len(piece)
        if copy_to is not None:
            try:
                copy_to.write(piece)
                copy_to.flush()
            except OSError as error:
                raise StoreError(
                    f"{tempfile.gettempdir()} cannot be written: {system_reason(error)}; shards that are far away are "
                    "fetched there: set TMPDIR to a folder with room for some of them"
                ) from error
    return size, hasher.hexdigest()


def rendered_blocks(
    jobs: Iterable[ShardJob], views: ViewSettings, size: int, limits: ImageSettings, threads: int, clock: Clock
) -> Iterator[RenderedBlock]:
    """The blocks of all shards, one shard after another."""
    for job in jobs:
        source = SourceFile()
        error: Exception | None = None
        try:
            made = (
                _stored(job.images, source, size, threads, clock)
                if isinstance(job.images, StoredShard)
                else _rendered(job.images, source, views, size, limits, threads, clock)
            )
            with closing(made):
                while samples := list(islice(made, BLOCK_SAMPLES)):
                    yield RenderedBlock(job=job, source=source, samples=samples)
        # A shard that fails must not take the others with it; its error is reported where the shard is committed.
        except Exception as caught:
            error = caught
        yield RenderedBlock(job=job, source=source, samples=[], error=error)


def _rendered(
    images: ShardFile,
    source: SourceFile,
    views: ViewSettings,
    size: int,
    limits: ImageSettings,
    threads: int,
    clock: Clock,
) -> Generator[RenderedSample, None, None]:
    # A remote shard is fetched once, to a file without a name: nothing of it outlives this process.
    with tempfile.TemporaryFile() if images.location.local is None else nullcontext() as copy:
        with clock.of("read"):
            source.bytes, source.sha256 = digest(images, copy)
        yield from decoded_ahead(
            _read(images, source, copy, clock),
            lambda sample: render_sample(sample, views, size, limits, clock),
            threads,
            _AHEAD_PER_THREAD * threads,
            source.skip,
        )


def _stored(
    shard: StoredShard, source: SourceFile, size: int, threads: int, clock: Clock
) -> Generator[RenderedSample, None, None]:
    def refuse(_key: str, reason: str) -> None:
        raise DataError(reason)

    then = shard.source
    source.bytes, source.sha256, source.bad = then.bytes, then.sha256, list(then.bad)
    yield from decoded_ahead(
        stored_samples(shard, clock),
        lambda sample: decode_stored(sample, size, clock),
        threads,
        _AHEAD_PER_THREAD * threads,
        refuse,
    )


def _read(images: ShardFile, source: SourceFile, copy: IO[bytes] | None, clock: Clock) -> Iterator[Sample]:
    samples = read_shard(images, source.skip, copy)
    while True:
        with clock.of("read"), _reading(images):
            sample = next(samples, None)
        if sample is None:
            return
        yield sample
