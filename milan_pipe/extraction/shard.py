"""Shards of images to shards of targets: renderer, teacher, codec and writer side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from milan_pipe import __version__
from milan_pipe.background import Background
from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ImageSettings
from milan_pipe.config.params import Params
from milan_pipe.devices import memory_for
from milan_pipe.errors import DataError
from milan_pipe.extraction.forward import Forward, Launched
from milan_pipe.extraction.render import Clock, RenderedSample, ShardJob, SourceFile, rendered_blocks
from milan_pipe.images.ahead import thread_count
from milan_pipe.images.views import RENDERER
from milan_pipe.targets.codec import Codec, codec_of, token_cosines
from milan_pipe.targets.schema import (
    CodecInfo,
    SourceInfo,
    SourceShard,
    StoreHeader,
    TargetBlock,
    TeacherInfo,
    ViewInfo,
)
from milan_pipe.targets.store import StoreShardWriter, TargetStoreWriter
from milan_pipe.teacher.clip import Teacher, TeacherOutput, require_sound


def header_of(params: Params, teacher: TeacherInfo, codec: CodecInfo, source: SourceInfo) -> StoreHeader:
    """The header of a store of these settings."""
    return StoreHeader(
        package_version=__version__,
        format=params.extract.format,
        teacher=teacher,
        views=ViewInfo(size=params.student.image_size, renderer=RENDERER, **params.views.model_dump()),
        codec=codec,
        source=source,
    )


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What one shard came to: `source` is what was committed, `error` why it failed.

    Attributes:
        cosine_sum: over views, the mean cosine of their tokens, stored against given.
        seconds: by phase; see `Clock`. Rendering ahead counts here what belongs to the next shard.
    """

    name: str
    source: SourceShard | None = None
    error: Exception | None = None
    views: int = 0
    cosine_sum: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


class Extractor:
    """Teacher, codec and store, loaded once for any number of shards. The store's header says which views."""

    def __init__(
        self, teacher: Teacher, writer: TargetStoreWriter, extract: ExtractSettings, limits: ImageSettings
    ) -> None:
        self.forward = Forward(teacher)
        self.writer = writer
        self.codec = codec_of(writer.header.codec)
        self.batch_size = extract.batch_size
        self._threads = thread_count(extract.threads)
        self._limits = limits

    def run(
        self, jobs: Iterable[ShardJob], on_progress: Callable[[int, int], None]
    ) -> Generator[ShardResult, None, None]:
        """Do shards one after another; the next one is rendered while the last one is encoded and written.

        Args:
            on_progress: called with views done and samples skipped since its last call.

        Yields:
            One result per job, in order. A shard that fails is discarded; the others go on.
        """
        clock = Clock()
        policy = self.writer.header.views
        rendered = rendered_blocks(jobs, policy.settings, policy.size, self._limits, self._threads, clock)
        with (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as pool,
            closing(Background(rendered, 1, "render")) as blocks,
        ):
            shard: _Shard | None = None
            ending: Future[ShardResult] | None = None
            try:
                for block in blocks:
                    if shard is None:
                        shard = _Shard(block.job, self, pool, clock, on_progress)
                    if block.samples:
                        shard.add(block.samples)
                    shard.report_bad(block.source)
                    if not block.samples:
                        shard.settle()
                        if ending is not None:
                            yield ending.result()
                        # Digests and the commit are made beside the next shard's first block.
                        ending = pool.submit(shard.end, block.source, block.error)
                        shard = None
                    elif ending is not None and ending.done():
                        yield ending.result()
                        ending = None
                if ending is not None:
                    yield ending.result()
            finally:
                if ending is not None:
                    ending.exception()
                if shard is not None:
                    shard.discard()


class _Block:
    """One block on its way through teacher and codec: its views in order, a batch at a time."""

    def __init__(self, names: Sequence[str], samples: list[RenderedSample], codec: Codec) -> None:
        """`names` are of all views, view after view."""
        self._names, self._samples, self._codec = names, samples, codec
        self._parts: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._done = 0

    @property
    def whole(self) -> bool:
        return self._done == len(self._names)

    def add(self, output: TeacherOutput) -> None:
        """Encode the next views, where they are; the results come to the CPU."""
        names = self._names[self._done : self._done + len(output.features_BST)]
        faults_BF = output.faults_BF()
        try:
            code, scale = self._codec.encode(output.features_BST)
        except DataError as error:
            require_sound(faults_BF, names)
            raise _not_encoded(self._codec, output.features_BST, names, error) from error
        cosine_BS = token_cosines(output.features_BST, self._codec.decode(code, scale))
        found = {"code": code, "attention": output.share_BL().to(torch.float16), "cosine": cosine_BS.mean(dim=1)}
        for name, tensor in (found if scale is None else {**found, "scale": scale}).items():
            self._parts[name].append(tensor.cpu())
        require_sound(faults_BF.cpu(), names)
        for name, cosine in zip(names, self._parts["cosine"][-1].tolist(), strict=True):
            if not cosine >= self._codec.least_cosine:
                raise DataError(
                    f"{name}: codec {self._codec.info.name} keeps the teacher's features at a mean cosine of "
                    f"{cosine:.6f}, expected at least {self._codec.least_cosine:g}; check the teacher's checkpoint, "
                    "or use another codec"
                )
        self._done += len(names)

    def finish(self) -> tuple[TargetBlock, float]:
        """A block of targets, and the sum over its views of the mean cosine of stored and given tokens."""
        samples, count = self._samples, len(self._samples)
        joined = {
            name: torch.cat(parts).numpy().reshape(-1, count, *parts[0].shape[1:])
            for name, parts in self._parts.items()
        }
        views_KN = list(zip(*(sample.views for sample in samples), strict=True))
        crops = [[(view.top, view.left, view.height, view.width) for view in row] for row in views_KN]
        block = TargetBlock(
            keys=[sample.key for sample in samples],
            label_N=np.array([sample.label for sample in samples], np.int64),
            code_KNST=joined["code"],
            scale_KNS=joined.get("scale"),
            attention_KNL=joined["attention"],
            crop_KN4=np.array(crops, np.int32),
            flip_KN=np.array([[view.flip for view in row] for row in views_KN], np.bool_),
            jpegs=[list(row) for row in zip(*(sample.jpegs for sample in samples), strict=True)],
        )
        return block, float(joined["cosine"].sum(dtype=np.float64))


@dataclass
class _Shard:
    """One shard on its way through teacher and writer.

    The output of a batch is encoded once the next one is on its way, so that a device has work meanwhile. Writing runs
    on the pool's thread, one block behind.
    """

    job: ShardJob
    extractor: Extractor
    pool: ThreadPoolExecutor
    clock: Clock
    on_progress: Callable[[int, int], None]
    writer: StoreShardWriter | None = None
    writing: Future[None] | None = None
    late: tuple[_Block, Launched] | None = None
    samples: int = 0
    reported_bad: int = 0
    cosine: float = 0.0
    error: Exception | None = None

    def add(self, samples: list[RenderedSample]) -> None:
        if self.error is None:
            with self._kept_errors():
                self._launch(samples)
                self.samples += len(samples)

    def settle(self) -> None:
        """Encode what is left of the last block."""
        if self.error is None:
            with self._kept_errors():
                self._encode_late()

    @contextmanager
    def _kept_errors(self) -> Iterator[None]:
        """Errors are reported with the shard's result."""
        size = self.extractor.batch_size
        try:
            with memory_for(f"extract.batch_size {size}", f"try extract.batch_size={max(1, size // 2)}"):
                yield
        except Exception as error:
            self.error = error

    def _launch(self, samples: list[RenderedSample]) -> None:
        if self.writer is None:
            self.writer = self.extractor.writer.open_shard(self.job.name)
        # A batch never crosses a block, so its composition, and with it the last bit of every feature, is fixed by the
        # shard alone.
        order = [(sample, k) for k in range(len(samples[0].views)) for sample in samples]
        names = [f"{self.job.images}: view {k} of {sample.key}" for sample, k in order]
        block = _Block(names, samples, self.extractor.codec)
        for start in range(0, len(order), self.extractor.batch_size):
            some = order[start : start + self.extractor.batch_size]
            launched = self.extractor.forward.launch([sample.pixels_KHWC[k] for sample, k in some], self.clock)
            self._encode_late()
            self.late = block, launched

    def _encode_late(self) -> None:
        if self.late is None:
            return
        (block, launched), self.late = self.late, None
        with self.extractor.forward.looking_at(launched, self.clock) as output, self.clock.of("encode"):
            block.add(output)
        self.on_progress(len(output.features_BST), 0)
        if block.whole:
            with self.clock.of("encode"):
                targets, cosine = block.finish()
            self.cosine += cosine
            self._await_writing()
            assert self.writer is not None
            self.writing = self.pool.submit(self.clock.of("write")(self.writer.append), targets)

    def report_bad(self, source: SourceFile) -> None:
        bad = len(source.bad)
        self.on_progress(0, bad - self.reported_bad)
        self.reported_bad = bad

    def end(self, source: SourceFile, error: Exception | None) -> ShardResult:
        """Commit, or discard if anything went wrong; runs on the writer's thread."""
        record = None
        try:
            if failure := self.error or error:
                raise failure
            record = self._commit(source)
        except Exception as caught:  # reported with the shard's result
            failure = caught
            self.discard()
        views, seconds = self._views(), self.clock.take()
        return ShardResult(
            name=self.job.name, source=record, error=failure, views=views, cosine_sum=self.cosine, seconds=seconds
        )

    def discard(self) -> None:
        if self.writing is not None:
            self.writing.exception()
        if self.writer is not None:
            self.writer.discard()

    def _commit(self, source: SourceFile) -> SourceShard:
        self._await_writing()
        if self.writer is None:
            first = f"; the first: {source.bad[0][0]}: {source.bad[0][1]}" if source.bad else ""
            raise DataError(f"{self.job.images} has no readable image ({len(source.bad)} skipped{first})")
        # Threads may report bad samples out of turn; sorted, the record is the same each time.
        name, bad = self.job.images.name, tuple(sorted(source.bad))
        record = SourceShard(name=name, bytes=source.bytes, sha256=source.sha256, samples=self.samples, bad=bad)
        with self.clock.of("write"):
            # Six digits: what is below them may depend on the order of a sum.
            self.writer.commit(record, round(self.cosine / self._views(), 6))
        return record

    def _views(self) -> int:
        return self.samples * self.extractor.writer.header.views.count

    def _await_writing(self) -> None:
        if self.writing is not None:
            self.writing.result()
            self.writing = None


def _not_encoded(codec: Codec, features_BST: Tensor, names: Sequence[str], error: DataError) -> DataError:
    """The codec's error for a batch, of the first image in it that it refuses."""
    for row, feature_ST in enumerate(features_BST):
        try:
            codec.encode(feature_ST)
        except DataError as own:
            return DataError(f"{names[row]}: {own}")
    return error
