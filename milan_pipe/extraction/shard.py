"""Shards of images to shards of targets: renderer, teacher, codec and writer side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from milan_pipe.background import Background
from milan_pipe.config.images import ViewSettings
from milan_pipe.errors import DataError
from milan_pipe.extraction.clock import Clock
from milan_pipe.extraction.render import RenderedSample, Renderer, ShardJob, SourceFile
from milan_pipe.images.shards import ShardFile
from milan_pipe.targets.codec import Codec, token_cosines
from milan_pipe.targets.schema import SourceShard, TargetBlock
from milan_pipe.targets.store import StoreShardWriter
from milan_pipe.teacher.clip import Teacher, first_fault

OpenWriter = Callable[[str], StoreShardWriter]


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What one shard came to.

    Attributes:
        source: what was committed; None where the shard failed.
        error: why it failed, or None.
        views: rendered and encoded.
        cosine_sum: codec fidelity: over views, the mean cosine of their tokens.
        seconds: by phase; see `Clock`. Rendering ahead counts here what belongs to the next shard.
    """

    name: str
    source: SourceShard | None
    error: Exception | None
    views: int
    cosine_sum: float
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to extract a shard: teacher, view policy, rendered size, codec, teacher batch and decoding threads."""

    teacher: Teacher
    views: ViewSettings
    size: int
    codec: Codec
    batch_size: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class _EncodedView:
    """One view of a block, on the CPU; `cosine_N` is the mean over an image's tokens, stored against given."""

    code_NST: Tensor
    scale_NS: Tensor | None
    attention_NL: Tensor
    cosine_N: Tensor


def _forward(
    recipe: Recipe, pixels_NHWC: Tensor, names: Sequence[str], clock: Clock, on_views: Callable[[int], None]
) -> _EncodedView:
    """Codes, scale, attention and cosines of one view of a block.

    A batch never crosses a block or a view, so its composition, and with it the last bit of every feature, is fixed
    by the shard alone. What is checked is read once, at the end: to read it of each batch would be to wait for each.

    Raises:
        DataError: the teacher's output for an image is not fit to be stored, or the codec does not keep it; begins with
            its name.
    """
    codes, scales, rows, faults, cosines = [], [], [], [], []
    for batch in torch.split(pixels_NHWC, recipe.batch_size):
        with clock.of("teacher"):
            output = recipe.teacher(batch)
        with clock.of("encode"):
            faults.append(output.faults_BF())
            try:
                code, scale = recipe.codec.encode(output.features_BST)
            except DataError as error:
                _require_sound(torch.cat(faults), names)
                first = sum(len(other) for other in faults[:-1])
                raise _not_encoded(recipe.codec, output.features_BST, names[first:], error) from error
            cosines.append(token_cosines(output.features_BST, recipe.codec.decode(code, scale)).mean(dim=1))
            codes.append(code)
            if scale is not None:
                scales.append(scale)
            row = output.importance_BL
            rows.append((row / row.sum(dim=1, keepdim=True)).to(torch.float16))
        on_views(len(batch))
    with clock.of("encode"):
        view = _EncodedView(
            code_NST=torch.cat(codes).cpu(),
            scale_NS=torch.cat(scales).cpu() if scales else None,
            attention_NL=torch.cat(rows).cpu(),
            cosine_N=torch.cat(cosines).cpu(),
        )
        _require_sound(torch.cat(faults).cpu(), names)
    _require_kept(recipe.codec, view.cosine_N, names)
    return view


def _require_sound(faults_NF: Tensor, names: Sequence[str]) -> None:
    fault = first_fault(faults_NF)
    if fault is not None:
        row, what = fault
        raise DataError(f"{names[row]}: {what}")


def _require_kept(codec: Codec, cosine_N: Tensor, names: Sequence[str]) -> None:
    lost = (~(cosine_N >= codec.least_cosine)).nonzero()
    if len(lost):
        row = int(lost[0])
        raise DataError(
            f"{names[row]}: codec {codec.info.name} keeps the teacher's features at a mean cosine of "
            f"{float(cosine_N[row]):.6f}, expected at least {codec.least_cosine:g}; check the teacher's checkpoint, or "
            "use another codec"
        )


def _not_encoded(codec: Codec, features_BST: Tensor, names: Sequence[str], error: DataError) -> DataError:
    """The codec's error for a batch, of the first image in it that it refuses."""
    for row, feature_ST in enumerate(features_BST):
        try:
            codec.encode(feature_ST)
        except DataError as own:
            return DataError(f"{names[row]}: {own}")
    return error


def _encode(
    recipe: Recipe, images: ShardFile, samples: list[RenderedSample], clock: Clock, on_views: Callable[[int], None]
) -> tuple[TargetBlock, float]:
    pixels = torch.from_numpy(np.stack([sample.pixels_KHWC for sample in samples], axis=1))
    outputs = []
    for k, view in enumerate(pixels):
        names = [f"{images}: view {k} of {sample.key}" for sample in samples]
        outputs.append(_forward(recipe, view, names, clock, on_views))
    views = [sample.views for sample in samples]
    crops = [[(v.top, v.left, v.height, v.width) for v in row] for row in views]
    scales = [view.scale_NS for view in outputs if view.scale_NS is not None]
    block = TargetBlock(
        keys=[sample.key for sample in samples],
        label_N=np.array([sample.label for sample in samples], np.int64),
        code_KNST=torch.stack([view.code_NST for view in outputs]).numpy(),
        scale_KNS=torch.stack(scales).numpy() if scales else None,
        attention_KNL=torch.stack([view.attention_NL for view in outputs]).numpy(),
        crop_KN4=np.array(crops, np.int32).transpose(1, 0, 2),
        flip_KN=np.array([[v.flip for v in row] for row in views], np.bool_).T,
        jpegs=[[sample.jpegs[k] for sample in samples] for k in range(recipe.views.count)],
    )
    return block, sum(float(view.cosine_N.sum()) for view in outputs)


class _Shard:
    """One shard on its way through teacher and writer. Writing runs on a thread, one block behind the teacher."""

    def __init__(self, job: ShardJob, recipe: Recipe, open_writer: OpenWriter, clock: Clock) -> None:
        self._job = job
        self._recipe = recipe
        self._open_writer = open_writer
        self._clock = clock
        self._writer: StoreShardWriter | None = None
        self._writing: Future[None] | None = None
        self._samples = 0
        self._cosine = 0.0
        self.error: Exception | None = None

    def add(self, samples: list[RenderedSample], pool: ThreadPoolExecutor, on_views: Callable[[int], None]) -> None:
        if self.error is not None:
            return
        try:
            if self._writer is None:
                self._writer = self._open_writer(self._job.name)
            block, cosine = _encode(self._recipe, self._job.images, samples, self._clock, on_views)
            self._await_writing()
            self._writing = pool.submit(self._timed, self._writer.append, block)
        except Exception as error:  # reported with the shard's result
            self.error = error
            return
        self._samples += len(samples)
        self._cosine += cosine

    def _timed(self, function: Callable[..., None], *arguments: object) -> None:
        with self._clock.of("write"):
            function(*arguments)

    def _await_writing(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def discard(self) -> None:
        if self._writing is not None:
            self._writing.exception()
        if self._writer is not None:
            self._writer.discard()

    def end(self, source: SourceFile, error: Exception | None) -> ShardResult:
        """Commit, or discard if anything went wrong; runs on the writer's thread."""
        committed = None
        self.error = self.error or error
        try:
            if self.error is None:
                self._await_writing()
                if self._writer is None:
                    first = f"; the first: {source.bad[0][0]}: {source.bad[0][1]}" if source.bad else ""
                    raise DataError(f"{self._job.images} has no readable image ({len(source.bad)} skipped{first})")
                committed = SourceShard(
                    name=self._job.images.name,
                    bytes=source.bytes,
                    sha256=source.sha256,
                    samples=self._samples,
                    # Threads may report bad samples out of turn; sorted, the record is the same each time.
                    bad=tuple(sorted(source.bad)),
                )
                views = self._samples * self._recipe.views.count
                # Six digits: what is below them may depend on the order of a sum.
                self._timed(self._writer.commit, committed, round(self._cosine / views, 6))
        except Exception as caught:  # reported with the shard's result
            self.error = caught
        if self.error is not None:
            self.discard()
            committed = None
        return ShardResult(
            name=self._job.name,
            source=committed,
            error=self.error,
            views=self._samples * self._recipe.views.count,
            cosine_sum=self._cosine,
            seconds=self._clock.take(),
        )


def extract_shards(
    recipe: Recipe,
    jobs: Iterable[ShardJob],
    open_writer: OpenWriter,
    on_progress: Callable[[int, int], None],
) -> Iterator[ShardResult]:
    """Do shards one after another; the next one is rendered while the last one is encoded and written.

    Args:
        open_writer: called with a shard's name before its first block.
        on_progress: called with views done and samples skipped since its last call.

    Yields:
        One result per job, in order. A shard that fails is discarded and reported; the others go on.
    """
    clock = Clock()
    render = Renderer(recipe.views, recipe.size, recipe.threads, clock)
    with (
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as pool,
        closing(Background(render(jobs), 1, "render")) as blocks,
    ):
        shard: _Shard | None = None
        ending: Future[ShardResult] | None = None
        reported_bad = 0
        try:
            for block in blocks:
                if shard is None:
                    shard = _Shard(block.job, recipe, open_writer, clock)
                    reported_bad = 0
                if block.samples:
                    # A block may take minutes: its batches report themselves.
                    shard.add(block.samples, pool, lambda views: on_progress(views, 0))
                bad = len(block.source.bad)
                on_progress(0, bad - reported_bad)
                reported_bad = bad
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
                ending = None
        finally:
            if ending is not None:
                ending.exception()
            if shard is not None:
                shard.discard()
