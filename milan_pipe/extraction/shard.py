"""Shards of images to shards of targets: renderer, teacher, codec and writer side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from milan_pipe.background import Background
from milan_pipe.config.extraction import ExtractSettings
from milan_pipe.config.images import ViewSettings
from milan_pipe.errors import DataError
from milan_pipe.extraction.render import Clock, RenderedSample, ShardJob, SourceFile, rendered_blocks
from milan_pipe.images.ahead import thread_count
from milan_pipe.targets.codec import Codec, codec_of, token_cosines
from milan_pipe.targets.schema import SourceShard, TargetBlock
from milan_pipe.targets.store import StoreShardWriter, TargetStoreWriter
from milan_pipe.teacher.clip import Teacher, require_sound


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

    def __init__(self, teacher: Teacher, writer: TargetStoreWriter, extract: ExtractSettings) -> None:
        self.teacher = teacher
        self.writer = writer
        self.codec = codec_of(writer.header.codec)
        self.batch_size = extract.batch_size
        self._threads = thread_count(extract.threads)

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
        views = ViewSettings(**policy.model_dump(exclude={"size"}))
        rendered = rendered_blocks(jobs, views, policy.size, self._threads, clock)
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


@dataclass
class _Shard:
    """One shard on its way through teacher and writer. Writing runs on the pool's thread, one block behind."""

    job: ShardJob
    extractor: Extractor
    pool: ThreadPoolExecutor
    clock: Clock
    on_progress: Callable[[int, int], None]
    writer: StoreShardWriter | None = None
    writing: Future[None] | None = None
    samples: int = 0
    reported_bad: int = 0
    cosine: float = 0.0
    error: Exception | None = None

    def add(self, samples: list[RenderedSample]) -> None:
        if self.error is not None:
            return
        try:
            if self.writer is None:
                self.writer = self.extractor.writer.open_shard(self.job.name)
            block, cosine = self._encode(samples)
            self._await_writing()
            self.writing = self.pool.submit(self.clock.of("write")(self.writer.append), block)
        except Exception as error:  # reported with the shard's result
            self.error = error
            return
        self.samples += len(samples)
        self.cosine += cosine

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

    def _encode(self, samples: list[RenderedSample]) -> tuple[TargetBlock, float]:
        """A block of targets, and the sum of `cosine_N` over its views."""
        pixels_KNHWC = torch.from_numpy(np.stack([sample.pixels_KHWC for sample in samples], axis=1))
        by_view = [
            self._forward(pixels_NHWC, [f"{self.job.images}: view {k} of {sample.key}" for sample in samples])
            for k, pixels_NHWC in enumerate(pixels_KNHWC)
        ]

        stacked = {name: torch.stack([view[name] for view in by_view]).numpy() for name in by_view[0]}
        views_KN = list(zip(*(sample.views for sample in samples), strict=True))
        crops = [[(view.top, view.left, view.height, view.width) for view in row] for row in views_KN]
        block = TargetBlock(
            keys=[sample.key for sample in samples],
            label_N=np.array([sample.label for sample in samples], np.int64),
            code_KNST=stacked["code_NST"],
            scale_KNS=stacked.get("scale_NS"),
            attention_KNL=stacked["attention_NL"],
            crop_KN4=np.array(crops, np.int32),
            flip_KN=np.array([[view.flip for view in row] for row in views_KN], np.bool_),
            jpegs=[list(row) for row in zip(*(sample.jpegs for sample in samples), strict=True)],
        )
        return block, sum(float(view["cosine_N"].sum()) for view in by_view)

    def _forward(self, pixels_NHWC: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """One view of a block, on the CPU; `cosine_N` is the mean over an image's tokens, stored against given."""
        # A batch never crosses a block or a view, so its composition, and with it the last bit of every feature, is
        # fixed by the shard alone. Checks are read once, at the end: reading them of each batch would wait for each.
        codec = self.extractor.codec
        parts: defaultdict[str, list[Tensor]] = defaultdict(list)
        for batch in torch.split(pixels_NHWC, self.extractor.batch_size):
            with self.clock.of("teacher"):
                output = self.extractor.teacher(batch)
            with self.clock.of("encode"):
                parts["faults_NF"].append(output.faults_BF())
                try:
                    code, scale = codec.encode(output.features_BST)
                except DataError as error:
                    require_sound(torch.cat(parts["faults_NF"]), names)
                    first = sum(len(done) for done in parts["code_NST"])
                    raise _not_encoded(codec, output.features_BST, names[first:], error) from error
                cosine_BS = token_cosines(output.features_BST, codec.decode(code, scale))
                parts["cosine_N"].append(cosine_BS.mean(dim=1))
                parts["code_NST"].append(code)
                if scale is not None:
                    parts["scale_NS"].append(scale)
                parts["attention_NL"].append(output.share_BL().to(torch.float16))
            self.on_progress(len(batch), 0)
        with self.clock.of("encode"):
            view = {name: torch.cat(tensors).cpu() for name, tensors in parts.items()}
            require_sound(view["faults_NF"], names)
        for name, cosine in zip(names, view["cosine_N"].tolist(), strict=True):
            if not cosine >= codec.least_cosine:
                raise DataError(
                    f"{name}: codec {codec.info.name} keeps the teacher's features at a mean cosine of {cosine:.6f}, "
                    f"expected at least {codec.least_cosine:g}; check the teacher's checkpoint, or use another codec"
                )
        return view


def _not_encoded(codec: Codec, features_BST: Tensor, names: Sequence[str], error: DataError) -> DataError:
    """The codec's error for a batch, of the first image in it that it refuses."""
    for row, feature_ST in enumerate(features_BST):
        try:
            codec.encode(feature_ST)
        except DataError as own:
            return DataError(f"{names[row]}: {own}")
    return error
