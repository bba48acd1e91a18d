"""Which sample comes when: arithmetic on seed, epoch and position, nothing remembered.

An epoch visits every block of every shard once, in an order drawn for that epoch. `window` blocks at a time are read,
their samples are shuffled together, and batches are cut from the resulting sequence. Reading stays sequential inside a
block, and mixing reaches `window` blocks far, which lie anywhere in the data set.

Each shard shows its K views in turn: in any K consecutive epochs every view is used once, and shards do not move in
step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

    def windows(self, epoch: int) -> Iterator[tuple[Sequence[Block], NDArray[np.int64]]]:
        """Blocks to read together, and in which order to hand out their samples.

        The order indexes the blocks' samples laid end to end.
        """
        blocks = self.blocks(epoch)
        for number, start in enumerate(range(0, len(blocks), self.window)):
            chosen = blocks[start : start + self.window]
            count = sum(block.stop - block.start for block in chosen)
            yield chosen, self._rng(_SAMPLE_STREAM, epoch, number).permutation(count)


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
