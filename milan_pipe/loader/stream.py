"""Batches from a target store, read and decoded ahead of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milan_pipe.errors import DataError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.loader.order import BatchPlan, Block, Piece
from milan_pipe.targets.schema import ViewRun
from milan_pipe.targets.several import SeveralStores
from milan_pipe.targets.store import TargetStore

Reader = TargetStore | SeveralStores

Codes = tuple[Tensor, Tensor | None]
"""Stored features of a batch, (B, S, T), and their scale, (B, S), where the codec needs one."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step needs, as it is stored: small to move, made into floats on the training device.

    Attributes:
        keys: B sample keys.
        pixels_BHWC: uint8, the rendered views.
        code_BST: stored features.
        scale_BS: float16, or None where the codec needs none.
        others: code and scale of further stores that are read beside the first.
        attention_BL: float16, each row sums to 1.
        noise_BL: float32, of the masks of one epoch; None where it is not drawn yet.
    """

    keys: tuple[str, ...]
    pixels_BHWC: Tensor
    code_BST: Tensor
    scale_BS: Tensor | None
    attention_BL: Tensor
    noise_BL: Tensor | None = None
    others: tuple[Codes, ...] = ()

    @property
    def codes(self) -> tuple[Codes, ...]:
        """Code and scale of each store, the first one's first."""
        return (self.code_BST, self.scale_BS), *self.others

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        tensors = [*vars(self).values(), *(tensor for codes in self.others for tensor in codes)]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def each(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """All tensors by name, each changed."""
        found: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        others = [(change(code), None if scale is None else change(scale)) for code, scale in self.others]
        return {**found, "others": tuple(others)}

    def rows(self, start: int, stop: int) -> Batch:
        """Samples `start` to `stop`; no copy."""
        return replace(self, keys=self.keys[start:stop], **self.each(lambda values: values[start:stop]))

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory the copies are under way when this returns."""
        return replace(self, **self.each(lambda values: values.to(device, non_blocking=True)))

    def parts(self, count: int) -> list[tuple[Batch, float]]:
        """Cut into `count` parts of nearly one size, fewer where there are fewer samples, each with its share."""
        size = len(self.keys)
        count = min(count, size)
        if count <= 1:
            return [(self, 1.0)]
        borders = [size * number // count for number in range(count + 1)]
        return [(self.rows(a, b), (b - a) / size) for a, b in pairwise(borders)]


DrawNoise = Callable[[int, Sequence[str]], Tensor]
"""Epoch and N keys to the noise of their masks, (N, L) float32."""

_Place = tuple[ViewRun, int]
"""A sample: a run that was read, and its row in it."""

# Most samples of one task: handing over a small view takes three times as long as decoding it.
_TASK = 16


class _Group:
    """Blocks that are shuffled together, each read by a task of its own; rows are counted through them in order."""

    def __init__(self, blocks: Sequence[Block], reading: Sequence[Future[ViewRun]]) -> None:
        self._reading = reading
        self._end_N = np.cumsum([block.stop - block.start for block in blocks])

    @cached_property
    def _runs(self) -> list[ViewRun]:
        return [one.result() for one in self._reading]

    def places(self, row_N: NDArray[np.int64]) -> list[_Place]:
        """Where samples lie; waits for those that are still being read."""
        number_N = np.searchsorted(self._end_N, row_N, side="right")
        within_N = row_N - np.concatenate([[0], self._end_N])[number_N]
        runs = self._runs
        return [(runs[number], row) for number, row in zip(number_N.tolist(), within_N.tolist(), strict=True)]


def ahead_of(plan: BatchPlan, threads: int) -> int:
    """Batches that are begun before the first of them is handed out: twice as many tasks as threads, two at least."""
    size = max(1, sum(piece.stop - piece.start for piece in plan.pieces()))
    return max(2, -(-2 * threads * _TASK // size))


class Loader:
    """Reads and decodes what one rank takes of every batch, some batches ahead of the one that is handed out.

    Blocks are read by one pool of threads, those of each stream's next group while the one before is handed out: two
    groups are in memory. Views are decoded by another pool, straight into the batch's memory. Use it as a context
    manager: its threads end with it.

    Args:
        threads: threads that decode views; as many, and at least two, read.
        with_targets: whether codes and scales are handed out; a pixel target needs none.
        draw_noise: draws `Batch.noise_BL`, on the threads that decode.
        pin: hand out pinned memory, from which copies to a CUDA device do not wait.
        memory: gives a batch's memory by its number, counted from the first one on; it is written to while
            `ahead_of` batches before it are yet to be handed out. None: new memory each time.
    """

    def __init__(
        self,
        reader: Reader,
        plan: BatchPlan,
        *,
        threads: int,
        with_targets: bool,
        draw_noise: DrawNoise | None = None,
        pin: bool = False,
        memory: Callable[[int], Batch] | None = None,
    ) -> None:
        self.plan = plan
        self._reader, self._draw_noise, self._memory = reader, draw_noise, memory
        self._threads, self._with_targets, self._pin = threads, with_targets, pin
        self._ahead, self._filled = ahead_of(plan, threads), 0
        self._decoders = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")
        self._readers = ThreadPoolExecutor(max_workers=max(2, threads), thread_name_prefix="read")

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._readers, self._decoders):
            pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, epoch: int, skip: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """All whole batches of the epochs `epoch` to `stop` - 1, by default of this one alone, in order.

        Args:
            skip: batches of the first epoch to leave out; groups that lie in them whole are not read.

        Raises:
            DataError: the store is damaged.
        """
        pending: deque[tuple[Batch, list[Future[None]]]] = deque()

        def first() -> Batch:
            batch, filling = pending.popleft()
            for part in filling:
                part.result()
            return batch

        for number in range(epoch, epoch + 1 if stop is None else stop):
            for places in self._places(number, skip if number == epoch else 0):
                pending.append(self._fill(places, number))
                if len(pending) > self._ahead:
                    yield first()
        while pending:
            yield first()

    def _fill(self, places: list[_Place], epoch: int) -> tuple[Batch, list[Future[None]]]:
        noise = None if self._draw_noise is None else (self._draw_noise, epoch)
        if self._memory is None:
            run, known = places[0][0], (len(places), self._reader)
            batch = empty_batch(run, *known, with_targets=self._with_targets, noise=noise is not None, pin=self._pin)
        else:
            batch = self._memory(self._filled)
        self._filled += 1
        batch = replace(batch, keys=tuple(run.keys[row] for run, row in places))
        share = min(_TASK, -(-len(places) // self._threads))
        starts = range(0, len(places), share)
        return batch, [
            self._decoders.submit(_fill, batch.rows(at, at + share), places[at : at + share], noise) for at in starts
        ]

    def _groups(self, epoch: int, piece: Piece, unwanted: int) -> Iterator[tuple[_Group, NDArray[np.int64]]]:
        """What is left of a stream after its first `unwanted` samples, group after group, the next one under way."""
        ahead: deque[tuple[_Group, NDArray[np.int64]]] = deque()
        for blocks, order in self.plan.order.groups(epoch, piece.stream):
            rows = order[unwanted:]
            unwanted -= len(order) - len(rows)
            if len(rows):
                ahead.append((_Group(blocks, [self._readers.submit(read_run, self._reader, b) for b in blocks]), rows))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead

    def _places(self, epoch: int, skip: int) -> Iterator[list[_Place]]:
        """This rank's samples of each batch of an epoch."""
        streams = [self._stream(epoch, piece, skip) for piece in self.plan.pieces()]
        for _ in range(skip, self.plan.steps):
            yield [place for stream in streams for place in next(stream)]

    def _stream(self, epoch: int, piece: Piece, skip: int) -> Iterator[list[_Place]]:
        """This rank's samples of each batch, from one stream."""
        size, position = piece.size, 0  # within the stream's part of a batch
        places: list[_Place] = []
        for group, rows in self._groups(epoch, piece, skip * size):
            used = 0
            while used < len(rows):
                stop = min(size, position + len(rows) - used)
                first, last = max(position, piece.start), min(stop, piece.stop)
                if first < last:
                    places += group.places(rows[used + first - position : used + last - position])
                used += stop - position
                position = stop % size
                if not position:
                    yield places
                    places = []


def read_batch(reader: Reader, block: Block) -> Batch:
    """All samples of one block, in their order.

    Raises:
        DataError: the store is damaged.
    """
    run = read_run(reader, block)
    places = [(run, row) for row in range(block.stop - block.start)]
    batch = empty_batch(run, len(places), reader, with_targets=True, noise=False)
    _fill(batch, places, None)
    return replace(batch, keys=tuple(run.keys))


def read_run(reader: Reader, block: Block) -> ViewRun:
    """A block as it is stored; raises as `read_batch`."""
    return reader.read(reader.shards[block.shard], block.view, block.start, block.stop)


def empty_batch(
    run: ViewRun, count: int, reader: Reader, *, with_targets: bool, noise: bool, pin: bool = False
) -> Batch:
    """Memory for `count` samples of the kinds that a run has, without keys."""
    side = reader.header.views.size

    def like(values_N: NDArray[Any], rows: int = count) -> Tensor:
        dtype = torch.from_numpy(values_N[:0]).dtype
        return torch.empty((rows, *values_N.shape[1:]), dtype=dtype, pin_memory=pin)

    def codes_like(code_NST: NDArray[Any], scale_NS: NDArray[np.float16] | None) -> Codes:
        scale_BS = like(scale_NS) if with_targets and scale_NS is not None else None
        return like(code_NST, count if with_targets else 0), scale_BS

    code_BST, scale_BS = codes_like(run.code_NST, run.scale_NS)
    return Batch(
        keys=(),
        pixels_BHWC=torch.empty((count, side, side, 3), dtype=torch.uint8, pin_memory=pin),
        code_BST=code_BST,
        scale_BS=scale_BS,
        others=tuple(codes_like(*other) for other in run.others),
        attention_BL=like(run.attention_NL),
        noise_BL=torch.empty((count, reader.header.patches), pin_memory=pin) if noise else None,
    )


def _fill(batch: Batch, places: Sequence[_Place], noise: tuple[DrawNoise, int] | None) -> None:
    """Decode and gather samples into a batch's memory."""
    pixels_BHWC, attention_BL = batch.pixels_BHWC.numpy(), batch.attention_BL.numpy()
    codes = [(code.numpy(), None if scale is None else scale.numpy()) for code, scale in batch.codes]
    for at, (run, row) in enumerate(places):
        try:
            decode_jpeg(run.jpegs[row], into=pixels_BHWC[at])
        except DataError as error:
            raise DataError(f"the stored view of {run.keys[row]} does not decode: {error}") from error
        attention_BL[at] = run.attention_NL[row]
        stored = (run.code_NST, run.scale_NS), *run.others
        for (code_BST, scale_BS), (code_NST, scale_NS) in zip(codes, stored, strict=True):
            if len(code_BST):
                code_BST[at] = code_NST[row]
            if scale_BS is not None and scale_NS is not None:
                scale_BS[at] = scale_NS[row]
    if noise is not None and batch.noise_BL is not None:
        draw, epoch = noise
        batch.noise_BL.copy_(draw(epoch, batch.keys))
