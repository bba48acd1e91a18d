"""Which sample comes when: arithmetic on seed, epoch and position, nothing remembered.

An epoch visits every block of every shard once, in an order drawn for that epoch. `window` blocks at a time are read,
their samples are shuffled together, and batches are cut from the resulting sequence. Reading stays sequential inside a
block, and mixing reaches `window` blocks far, which lie anywhere in the data set.

Each shard shows its K views in turn: in any K consecutive epochs every view is used once, and shards do not move in
step.

Several ranks take each their part of every batch. So that a rank need not read what the others use, the sequence of
blocks can be cut into lanes: a batch is then put together of a part from every lane. The number of lanes belongs to the
order, the number of ranks does not: who reads what changes with the ranks, which samples make up a batch never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from milan_pipe.errors import SettingError

_BLOCK_STREAM, _SAMPLE_STREAM, _VIEW_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Block:
    """Samples `start` to `stop` of view `view` of shard number `shard`."""

    shard: int
    view: int
    start: int
    stop: int


@dataclass(frozen=True)
class Lane:
    """Positions `start` to `stop` of an epoch's blocks laid end to end: lane `number` of `count`."""

    number: int
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """Of each batch, samples `start` to `stop` of the part that a lane gives to it."""

    lane: int
    start: int
    stop: int


def _cut(blocks: Sequence[Block], start: int, stop: int) -> list[Block]:
    """Positions `start` to `stop` of blocks laid end to end; those astride a border are cut."""
    kept = []
    position = 0
    for block in blocks:
        size = block.stop - block.start
        first, last = max(start - position, 0), min(stop - position, size)
        if first < last:
            kept.append(replace(block, start=block.start + first, stop=block.start + last))
        position += size
    return kept


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order of one data set.

    Attributes:
        samples: number of samples of each shard.
        views: K.
        block: most samples in one block.
        window: blocks that are shuffled together.
        seed: of all draws.
    """

    samples: tuple[int, ...]
    views: int
    block: int
    window: int
    seed: int

    def __post_init__(self) -> None:
        if min(self.views, self.block, self.window) < 1 or not sum(self.samples):
            raise SettingError(
                f"an order needs samples, views, block and window of at least 1, found {sum(self.samples)} samples, "
                f"{self.views} views, block {self.block}, window {self.window}"
            )

    def _rng(self, stream: int, *position: int) -> np.random.Generator:
        return np.random.default_rng([stream, self.seed, *position])

    def view_of(self, epoch: int, shard: int) -> int:
        """The view that a shard shows in an epoch."""
        cycle, turn = divmod(epoch, self.views)
        return int(self._rng(_VIEW_STREAM, cycle, shard).permutation(self.views)[turn])

    def blocks(self, epoch: int) -> list[Block]:
        """All blocks of an epoch in reading order."""
        views = [self.view_of(epoch, shard) for shard in range(len(self.samples))]
        in_place = [
            Block(shard, views[shard], start, min(start + self.block, count))
            for shard, count in enumerate(self.samples)
            for start in range(0, count, self.block)
        ]
        return [in_place[i] for i in self._rng(_BLOCK_STREAM, epoch).permutation(len(in_place))]

    def windows(self, epoch: int, lane: Lane | None = None) -> Iterator[tuple[Sequence[Block], NDArray[np.int64]]]:
        """Blocks to read together, and in which order to hand out their samples.

        The order indexes the blocks' samples laid end to end. A lane's windows are smaller by the number of lanes, as
        all lanes are open at a time.
        """
        blocks = self.blocks(epoch)
        number, count = 0, 1
        if lane is not None:
            blocks = _cut(blocks, lane.start, lane.stop)
            number, count = lane.number, lane.count
        window = max(1, self.window // count)
        for index, start in enumerate(range(0, len(blocks), window)):
            chosen = blocks[start : start + window]
            size = sum(block.stop - block.start for block in chosen)
            yield chosen, self._rng(_SAMPLE_STREAM, epoch, index * count + number).permutation(size)


def batches_per_epoch(samples: int, batch_size: int) -> int:
    """Whole batches in an epoch; what is left over is left out, other samples each epoch.

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
    """How the batches of an epoch are put together, and what one rank takes of each.

    Attributes:
        batch_size: B, over all ranks.
        lanes: parts that the sequence of blocks is cut into; no more than B are used.
        rank: takes samples B * rank // ranks to B * (rank + 1) // ranks of each batch.
    """

    order: EpochOrder
    batch_size: int
    lanes: int = 1
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks <= self.batch_size or self.lanes < 1:
            raise SettingError(
                f"a batch of {self.batch_size} in {self.lanes} lanes cannot be shared by {self.ranks} ranks; "
                "pretrain.batch_size is over all ranks and must be at least their number"
            )

    @property
    def steps(self) -> int:
        """Batches of an epoch, the same number on every rank; see `batches_per_epoch`."""
        return batches_per_epoch(sum(self.order.samples), self.batch_size)

    @property
    def size(self) -> int:
        """Samples of a batch that are this rank's."""
        return sum(piece.stop - piece.start for piece in self.pieces())

    def _borders(self) -> list[int]:
        count = min(self.lanes, self.batch_size)
        return [self.batch_size * number // count for number in range(count + 1)]

    def lane(self, number: int) -> Lane:
        """Where a lane lies in an epoch. The last one also has what no whole batch takes."""
        borders = self._borders()
        last = number == len(borders) - 2
        stop = sum(self.order.samples) if last else self.steps * borders[number + 1]
        return Lane(number, len(borders) - 1, self.steps * borders[number], stop)

    def lane_size(self, number: int) -> int:
        """Samples that a lane gives to each batch."""
        borders = self._borders()
        return borders[number + 1] - borders[number]

    def pieces(self) -> list[Piece]:
        """What this rank takes of each batch, in the batch's order."""
        first = self.batch_size * self.rank // self.ranks
        last = self.batch_size * (self.rank + 1) // self.ranks
        return [
            Piece(number, max(first, start) - start, min(last, stop) - start)
            for number, (start, stop) in enumerate(pairwise(self._borders()))
            if max(first, start) < min(last, stop)
        ]

    def of_rank(self, rank: int, ranks: int) -> BatchPlan:
        """The same batches, seen by another rank of another number of ranks."""
        return replace(self, rank=rank, ranks=ranks)
