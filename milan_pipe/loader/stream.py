"""Batches from a target store, read and decoded ahead of training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from milan_pipe.data.views import decode_jpeg
from milan_pipe.errors import DataError
from milan_pipe.loader.order import EpochOrder
from milan_pipe.targets.schema import TargetReader, ViewRun


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step needs, as it is stored: small to move, made into floats on the training device.

    Attributes:
        keys: B sample keys.
        pixels_BHWC: uint8, the rendered views.
        code_BST: stored features.
        scale_BS: float16, or None where the codec needs none.
        attention_BL: float16, each row sums to 1.
    """

    keys: tuple[str, ...]
    pixels_BHWC: Tensor
    code_BST: Tensor
    scale_BS: Tensor | None
    attention_BL: Tensor

    def rows(self, start: int, stop: int) -> Batch:
        """Samples `start` to `stop`; no copy."""
        return Batch(
            keys=self.keys[start:stop],
            pixels_BHWC=self.pixels_BHWC[start:stop],
            code_BST=self.code_BST[start:stop],
            scale_BS=None if self.scale_BS is None else self.scale_BS[start:stop],
            attention_BL=self.attention_BL[start:stop],
        )

    def parts(self, count: int) -> list[tuple[Batch, float]]:
        """Cut into `count` parts of nearly one size, fewer where there are fewer samples, each with its share."""
        size = len(self.keys)
        if count == 1:
            return [(self, 1.0)]
        borders = [size * number // count for number in range(count + 1)]
        return [(self.rows(a, b), (b - a) / size) for a, b in pairwise(borders) if b > a]


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Several runs laid end to end."""

    keys: list[str]
    jpegs: list[bytes | memoryview]
    code: Tensor
    scale: Tensor | None
    attention: Tensor

    @staticmethod
    def of(runs: list[ViewRun]) -> _Window:
        scales = [run.scale_NS for run in runs if run.scale_NS is not None]
        return _Window(
            keys=[key for run in runs for key in run.keys],
            jpegs=[jpeg for run in runs for jpeg in run.jpegs],
            code=torch.from_numpy(np.concatenate([run.code_NST for run in runs])),
            scale=torch.from_numpy(np.concatenate(scales)) if scales else None,
            attention=torch.from_numpy(np.concatenate([run.attention_NL for run in runs])),
        )

    def take(self, rows: list[int], pool: ThreadPoolExecutor, with_targets: bool) -> Batch:
        index = torch.tensor(rows)
        keys = tuple(self.keys[row] for row in rows)
        try:
            pixels = np.stack(list(pool.map(decode_jpeg, [self.jpegs[row] for row in rows])))
        except DataError as error:
            raise DataError(f"a stored view of one of {keys[0]} ... {keys[-1]} does not decode: {error}") from error
        return Batch(
            keys=keys,
            pixels_BHWC=torch.from_numpy(pixels),
            code_BST=self.code[index] if with_targets else self.code[:0],
            scale_BS=self.scale[index] if with_targets and self.scale is not None else None,
            attention_BL=self.attention[index],
        )


def _join(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    scales = [part.scale_BS for part in parts if part.scale_BS is not None]
    return Batch(
        keys=tuple(key for part in parts for key in part.keys),
        pixels_BHWC=torch.cat([part.pixels_BHWC for part in parts]),
        code_BST=torch.cat([part.code_BST for part in parts]),
        scale_BS=torch.cat(scales) if scales else None,
        attention_BL=torch.cat([part.attention_BL for part in parts]),
    )


def epoch_batches(
    reader: TargetReader,
    order: EpochOrder,
    epoch: int,
    batch_size: int,
    pool: ThreadPoolExecutor,
    with_targets: bool,
    skip: int = 0,
) -> Iterator[Batch]:
    """All whole batches of one epoch, in order.

    Args:
        with_targets: whether codes and scales are handed out; a pixel target needs none.
        skip: batches to leave out at the beginning; windows that lie in them whole are not read.

    Raises:
        DataError: the store is damaged.
    """
    parts: list[Batch] = []
    missing = batch_size
    unwanted = skip * batch_size
    for blocks, sample_order in order.windows(epoch):
        if unwanted >= len(sample_order):
            unwanted -= len(sample_order)
            continue
        window = _Window.of([reader.read(reader.shards[b.shard], b.view, b.start, b.stop) for b in blocks])
        position, unwanted = unwanted, 0
        rows = sample_order.tolist()
        while position < len(rows):
            taken = rows[position : position + missing]
            parts.append(window.take(taken, pool, with_targets))
            position += len(taken)
            missing -= len(taken)
            if not missing:
                yield _join(parts)
                parts, missing = [], batch_size


class Prefetcher:
    """Runs an iterator of batches on a thread, a few batches ahead. An error there is raised here."""

    def __init__(self, batches: Iterator[Batch], ahead: int) -> None:
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches,), name="prefetch", daemon=True)
        self._thread.start()

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _run(self, batches: Iterator[Batch]) -> None:
        try:
            for batch in batches:
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:  # handed over whole: the training thread must not wait for ever
            self._put(error)

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop reading ahead."""
        self._stop.set()
        self._thread.join()
