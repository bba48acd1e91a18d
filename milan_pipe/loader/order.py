"""The order of samples: arithmetic on seed, epoch and position, without state.

An epoch visits every block of every shard once, in an order drawn for that epoch. `shuffle_blocks` blocks at a time are
read, their samples are shuffled together, and batches are cut from the resulting sequence. Reading is sequential inside
a block, and the blocks that are mixed lie anywhere in the data set.

Each shard shows its K views in turn: every K epochs each view is used once, and shards do not change views in step.

Each rank takes its part of every batch. So that a rank need not read what the others use, the sequence of blocks can be
cut into canonical streams, and a batch has a part from each. The number of streams belongs to the order, the number of
ranks does not: ranks change who reads a sample, never the batch that it is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from milan_pipe.errors import SettingError
from milan_pipe.random_bits import permutation

ORDER_VERSION = 2
"""Change it when the order of the same seed changes: a run does not go on in another order."""


@lru_cache(maxsize=1)
def _numbers(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Numbers of an epoch's blocks in reading order; the same for every stream."""
    numbers = permutation(count, "blocks", seed, epoch)
    numbers.flags.writeable = False
    return numbers


@dataclass(frozen=True)
class Block:
    """Samples `start` to `stop` of view `view` of shard number `shard`."""

    shard: int
    view: int
    start: int
    stop: int


@dataclass(frozen=True)
class CanonicalStream:
    """Positions `start` to `stop` of an epoch's blocks laid end to end: stream `number` of `count`."""

    number: int
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """Samples `start` to `stop` of the `size` samples of each batch that come from a stream."""

    stream: CanonicalStream
    size: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of an epoch in reading order, each made when it is used: of millions only the numbers are kept.

    Attributes:
        number_N: of the blocks, counted through the shards in order.
        head, tail: samples that are cut from the beginning of the first block, and from the end of the last one.
    """

    order: EpochOrder
    epoch: int
    number_N: NDArray[np.int64]
    head: int = 0
    tail: int = 0

    def __len__(self) -> int:
        return len(self.number_N)

    def __getitem__(self, index: int) -> Block:
        position = range(len(self))[index]
        block = self.order.block_of(self.epoch, int(self.number_N[position]))
        first = block.start + (self.head if position == 0 else 0)
        last = block.stop - (self.tail if position == len(self) - 1 else 0)
        return replace(block, start=first, stop=last)

    def cut(self, start: int, stop: int) -> Blocks:
        """Positions `start` to `stop` of the blocks' samples laid end to end; blocks astride a border are cut."""
        end_N = np.cumsum(self.order.sizes_of(self.number_N))
        start = start + self.head
        stop = min(stop + self.head, int(end_N[-1]) - self.tail) if len(end_N) else 0
        if start >= stop:
            return Blocks(self.order, self.epoch, self.number_N[:0])
        first, last = (int(found) for found in np.searchsorted(end_N, [start, stop - 1], side="right"))
        before = int(end_N[first - 1]) if first else 0
        chosen_N = self.number_N[first : last + 1]
        return Blocks(self.order, self.epoch, chosen_N, start - before, int(end_N[last]) - stop)


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order of one data set.

    Attributes:
        samples: number of samples of each shard.
        views: K.
        block: most samples in one block.
        shuffle_blocks: blocks that are shuffled together.
    """

    samples: tuple[int, ...]
    views: int
    block: int
    shuffle_blocks: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.views, self.block, self.shuffle_blocks) < 1 or not sum(self.samples):
            raise SettingError(
                f"an order needs samples, views, block and shuffle_blocks of at least 1, found {sum(self.samples)} "
                f"samples, {self.views} views, block {self.block}, shuffle_blocks {self.shuffle_blocks}"
            )

    def view_of(self, epoch: int, shard: int) -> int:
        """The view that a shard shows in an epoch."""
        cycle, turn = divmod(epoch, self.views)
        return int(permutation(self.views, "views", self.seed, cycle, shard)[turn])

    @cached_property
    def _first_block(self) -> NDArray[np.int64]:
        """Number of each shard's first block, and behind the last shard's the number of all."""
        return np.cumsum([0, *(-(-count // self.block) for count in self.samples)], dtype=np.int64)

    def block_of(self, epoch: int, number: int) -> Block:
        """The block with a number, counted through the shards in order."""
        shard = int(np.searchsorted(self._first_block, number, side="right")) - 1
        start = (number - int(self._first_block[shard])) * self.block
        return Block(shard, self.view_of(epoch, shard), start, min(start + self.block, self.samples[shard]))

    def sizes_of(self, number_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples of the blocks with these numbers."""
        sizes = np.full(int(self._first_block[-1]), self.block, np.int64)
        counts, lasts = np.array(self.samples, np.int64), self._first_block[1:] - 1
        full = counts > 0
        sizes[lasts[full]] = (counts[full] - 1) % self.block + 1
        return sizes[number_N]

    def blocks(self, epoch: int) -> Blocks:
        """All blocks of an epoch in reading order."""
        return Blocks(self, epoch, _numbers(self.seed, epoch, int(self._first_block[-1])))

    def groups(
        self, epoch: int, stream: CanonicalStream | None = None
    ) -> Iterator[tuple[Sequence[Block], NDArray[np.int64]]]:
        """Blocks to read together, and the order of their samples, as indices into all of them laid end to end.

        A stream's groups are smaller by the number of streams, as all streams are open at a time.
        """
        blocks, number, count = self.blocks(epoch), 0, 1
        if stream is not None:
            blocks, number, count = blocks.cut(stream.start, stream.stop), stream.number, stream.count
        step = max(1, self.shuffle_blocks // count)
        for index, start in enumerate(range(0, len(blocks), step)):
            chosen = [blocks[position] for position in range(start, min(start + step, len(blocks)))]
            size = sum(block.stop - block.start for block in chosen)
            yield chosen, permutation(size, "samples", self.seed, epoch, index * count + number)


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """Whole batches in an epoch; the rest, other samples each epoch, is left out.

    Raises:
        SettingError: not even one batch.
    """
    if samples < batch_size:
        raise SettingError(
            f"the store has {samples} samples, fewer than one batch of {batch_size}; lower pretrain.batch_size"
        )
    return samples // batch_size


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batches of an epoch, and the part of each that one rank takes.

    Attributes:
        batch_size: B, over all ranks.
        canonical_streams: parts that the sequence of blocks is cut into; at most B are used.
        rank: takes samples B * rank // ranks to B * (rank + 1) // ranks of each batch.
    """

    order: EpochOrder
    batch_size: int
    canonical_streams: int = 1
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks <= self.batch_size or self.canonical_streams < 1:
            raise SettingError(
                f"a batch of {self.batch_size} in {self.canonical_streams} canonical streams cannot be shared by "
                f"{self.ranks} ranks; pretrain.batch_size is over all ranks and must be at least their number"
            )

    @property
    def steps(self) -> int:
        """Batches of an epoch, the same number on every rank; see `batches_per_epoch`."""
        return batches_per_epoch(sum(self.order.samples), self.batch_size)

    def pieces(self) -> list[Piece]:
        """This rank's part of each batch, in the batch's order."""
        first = self.batch_size * self.rank // self.ranks
        last = self.batch_size * (self.rank + 1) // self.ranks
        count = min(self.canonical_streams, self.batch_size)
        borders = pairwise(self.batch_size * number // count for number in range(count + 1))
        found = []
        for number, (start, stop) in enumerate(borders):
            if max(first, start) < min(last, stop):
                # The last stream also has what no whole batch takes.
                end = self.steps * stop if number < count - 1 else sum(self.order.samples)
                stream = CanonicalStream(number, count, self.steps * start, end)
                found.append(Piece(stream, stop - start, max(first, start) - start, min(last, stop) - start))
        return found

    def of_rank(self, rank: int, ranks: int) -> BatchPlan:
        """The same batches, seen by another rank of another number of ranks."""
        return replace(self, rank=rank, ranks=ranks)
