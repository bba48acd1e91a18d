"""Batches from a target store, read and decoded ahead of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milan_pipe.errors import DataError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.loader.order import BatchPlan, Block, Piece
from milan_pipe.targets.schema import ViewRun
from milan_pipe.targets.store import TargetStore


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


class _Group:
    """Several runs, joined."""

    def __init__(self, runs: list[ViewRun]) -> None:
        scales = [run.scale_NS for run in runs if run.scale_NS is not None]
        self.keys = [key for run in runs for key in run.keys]
        self.jpegs = [jpeg for run in runs for jpeg in run.jpegs]
        self.code_NST = torch.from_numpy(np.concatenate([run.code_NST for run in runs]))
        self.scale_NS = torch.from_numpy(np.concatenate(scales)) if scales else None
        self.attention_NL = torch.from_numpy(np.concatenate([run.attention_NL for run in runs]))


# Most views that a thread decodes at a time: handing over a small one takes three times as long as decoding it.
_TASK = 16

_Fragment = tuple[_Group, list[int]]
"""Rows of a group, in the order in which they are handed out."""


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Loader:
    """Reads and decodes what one rank takes of every batch.

    Groups of shuffle blocks are read by `READERS` threads, each stream's next one while the one before is handed out:
    two groups are in memory. Use it as a context manager: its threads end with it.

    Args:
        threads: threads that decode views.
        with_targets: whether codes and scales are handed out; a pixel target needs none.
    """

    READERS = 2

    def __init__(self, reader: TargetStore, plan: BatchPlan, *, threads: int, with_targets: bool) -> None:
        self.plan = plan
        self._reader = reader
        self._with_targets, self._threads = with_targets, threads
        self._decoders = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
        self._readers = ThreadPoolExecutor(max_workers=self.READERS, thread_name_prefix="read")

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._readers, self._decoders):
            pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """All whole batches of one epoch, in order.

        Args:
            skip: batches to leave out at the beginning; groups that lie in them whole are not read.

        Raises:
            DataError: the store is damaged.
        """
        streams = [self._stream(epoch, piece, skip) for piece in self.plan.pieces()]
        for _ in range(skip, self.plan.steps):
            yield _batch(
                [fragment for stream in streams for fragment in next(stream)],
                self._decode,
                with_targets=self._with_targets,
            )

    def _decode(self, jpegs: list[bytes | memoryview]) -> NDArray[np.uint8]:
        share = min(_TASK, -(-len(jpegs) // self._threads))
        tasks = [jpegs[start : start + share] for start in range(0, len(jpegs), share)]
        return np.concatenate(list(self._decoders.map(_decode, tasks)))

    def _groups(self, epoch: int, piece: Piece, unwanted: int) -> Iterator[tuple[Future[_Group], list[int]]]:
        """What is left of a stream after its first `unwanted` samples, group after group, the next one under way."""
        ahead: deque[tuple[Future[_Group], list[int]]] = deque()
        for blocks, order in self.plan.order.groups(epoch, piece.stream):
            rows = order[unwanted:].tolist()
            unwanted -= len(order) - len(rows)
            if rows:
                ahead.append((self._readers.submit(_read, self._reader, blocks), rows))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead

    def _stream(self, epoch: int, piece: Piece, skip: int) -> Iterator[list[_Fragment]]:
        """This rank's rows of each batch, from one stream."""
        size, position = piece.size, 0  # within the stream's part of a batch
        fragments: list[_Fragment] = []
        for loading, rows in self._groups(epoch, piece, skip * size):
            group, used = loading.result(), 0
            while used < len(rows):
                stop = min(size, position + len(rows) - used)
                first, last = max(position, piece.start), min(stop, piece.stop)
                if first < last:
                    fragments.append((group, rows[used + first - position : used + last - position]))
                used += stop - position
                position = stop % size
                if not position:
                    yield fragments
                    fragments = []


def read_batch(reader: TargetStore, block: Block) -> Batch:
    """All samples of one block, in their order.

    Raises:
        DataError: the store is damaged.
    """
    return _batch([(_read(reader, [block]), list(range(block.stop - block.start)))], _decode)


def _read(reader: TargetStore, blocks: Sequence[Block]) -> _Group:
    return _Group([reader.read(reader.shards[b.shard], b.view, b.start, b.stop) for b in blocks])


def _decode(jpegs: list[bytes | memoryview]) -> NDArray[np.uint8]:
    return np.stack([decode_jpeg(jpeg) for jpeg in jpegs])


def _batch(
    fragments: list[_Fragment],
    decode: Callable[[list[bytes | memoryview]], NDArray[np.uint8]],
    *,
    with_targets: bool = True,
) -> Batch:
    keys = tuple(group.keys[row] for group, rows in fragments for row in rows)
    jpegs = [group.jpegs[row] for group, rows in fragments for row in rows]
    try:
        pixels = decode(jpegs)
    except DataError as error:
        raise DataError(f"a stored view of one of {keys[0]} ... {keys[-1]} does not decode: {error}") from error
    parts = [(group, torch.tensor(rows)) for group, rows in fragments]
    coded = parts if with_targets else []
    scales = [group.scale_NS[index] for group, index in coded if group.scale_NS is not None]
    return Batch(
        keys=keys,
        pixels_BHWC=torch.from_numpy(pixels),
        code_BST=_cat([group.code_NST[index] for group, index in coded]) if coded else parts[0][0].code_NST[:0],
        scale_BS=_cat(scales) if scales else None,
        attention_BL=_cat([group.attention_NL[index] for group, index in parts]),
    )
