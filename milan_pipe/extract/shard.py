"""One source shard to the targets of one shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milan_pipe.data.ahead import decoded_ahead
from milan_pipe.data.images import read_shard
from milan_pipe.data.views import ViewConfig
from milan_pipe.errors import DataError
from milan_pipe.extract.render import RenderedSample, render_sample
from milan_pipe.targets.codec import Codec, mean_cosine
from milan_pipe.targets.schema import BLOCK_SAMPLES, ShardWriter, SourceShard, TargetBlock
from milan_pipe.teacher.clip import Teacher

_AHEAD_PER_THREAD = 32


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What the extraction of one shard came to; `cosine_sum` is over views, of each view's mean token cosine."""

    source: SourceShard
    views: int
    cosine_sum: float


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """How to extract a shard: teacher, view policy, rendered size, codec, teacher batch and decoding threads."""

    teacher: Teacher
    views: ViewConfig
    size: int
    codec: Codec
    batch_size: int
    threads: int


def _forward(task: ShardTask, pixels_NHWC: Tensor) -> tuple[Tensor, Tensor | None, Tensor, float]:
    """Codes, scale, attention and summed cosine of one view of a block.

    A batch never crosses a block or a view, so its composition, and with it the last bit of every feature, is fixed
    by the shard alone.
    """
    codes, scales, rows = [], [], []
    cosine = 0.0
    for batch in torch.split(pixels_NHWC, task.batch_size):
        output = task.teacher(batch)
        code, scale = task.codec.encode(output.features_BST)
        cosine += mean_cosine(output.features_BST, task.codec.decode(code, scale)) * len(batch)
        codes.append(code.cpu())
        if scale is not None:
            scales.append(scale.cpu())
        row = output.importance_BL
        rows.append((row / row.sum(dim=1, keepdim=True)).to(torch.float16).cpu())
    return torch.cat(codes), torch.cat(scales) if scales else None, torch.cat(rows), cosine


def _block(task: ShardTask, samples: list[RenderedSample]) -> tuple[TargetBlock, float]:
    pixels = torch.from_numpy(np.stack([sample.pixels_KHWC for sample in samples], axis=1))
    outputs = [_forward(task, view) for view in pixels]
    views = [sample.views for sample in samples]
    crops = [[(v.top, v.left, v.height, v.width) for v in row] for row in views]
    scales = [scale for _, scale, _, _ in outputs if scale is not None]
    block = TargetBlock(
        keys=[sample.key for sample in samples],
        label_N=np.array([sample.label for sample in samples], np.int64),
        code_KNST=torch.stack([code for code, _, _, _ in outputs]).numpy(),
        scale_KNS=torch.stack(scales).numpy() if scales else None,
        attention_KNL=torch.stack([row for _, _, row, _ in outputs]).numpy(),
        crop_KN4=np.array(crops, np.int32).transpose(1, 0, 2),
        flip_KN=np.array([[v.flip for v in row] for row in views], np.bool_).T,
        jpegs=[[sample.jpegs[k] for sample in samples] for k in range(task.views.count)],
    )
    return block, sum(cosine for _, _, _, cosine in outputs)


def _batched(rendered: Iterator[RenderedSample]) -> Iterator[list[RenderedSample]]:
    while block := list(islice(rendered, BLOCK_SAMPLES)):
        yield block


def extract_shard(
    task: ShardTask, path: Path, writer: ShardWriter, on_progress: Callable[[int, int], None]
) -> ShardResult:
    """Read, render, run the teacher, encode and write one shard; reading and writing run beside the teacher.

    Args:
        on_progress: told views done and samples set aside since its last call.

    Raises:
        DataError: the shard has no readable image.
    """
    bad: list[tuple[str, str]] = []
    samples = views = told_bad = 0
    cosine = 0.0

    def set_aside(key: str, reason: str) -> None:
        bad.append((key, reason))

    rendered = decoded_ahead(
        read_shard(path, set_aside),
        lambda sample: render_sample(sample, task.views, task.size),
        task.threads,
        _AHEAD_PER_THREAD * task.threads,
        set_aside,
    )
    try:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as pool:
            writing: Future[None] | None = None
            for batch in _batched(rendered):
                block, block_cosine = _block(task, batch)
                if writing is not None:
                    writing.result()
                writing = pool.submit(writer.append, block)
                samples += len(batch)
                views += len(batch) * task.views.count
                cosine += block_cosine
                on_progress(len(batch) * task.views.count, len(bad) - told_bad)
                told_bad = len(bad)
            if writing is not None:
                writing.result()
        on_progress(0, len(bad) - told_bad)
        if not samples:
            first = f"; the first: {bad[0][0]}: {bad[0][1]}" if bad else ""
            raise DataError(f"{path} has no readable image ({len(bad)} set aside{first})")
        source = SourceShard(
            name=path.name,
            bytes=path.stat().st_size,
            samples=samples,
            # Threads may tell of bad samples out of turn; sorted, the record is the same each time.
            bad=tuple(sorted(bad)),
        )
        writer.commit(source)
    except BaseException:
        writer.discard()
        raise
    return ShardResult(source=source, views=views, cosine_sum=cosine)
