"""A target store for other code: by index, by key, as a dataset of torch, as arrays of Dask."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from milan_pipe.errors import DataError, MissingError, SettingError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.loader.order import Block, EpochOrder
from milan_pipe.targets.codec import decode_run
from milan_pipe.targets.schema import BLOCK_SAMPLES, StoreHeader
from milan_pipe.targets.store import TargetStore
from milan_pipe.targets.store import open_targets as _open_store

if TYPE_CHECKING:
    from milan_pipe.loader.dask_arrays import DaskTargets


@dataclass(frozen=True, kw_only=True)
class Target:
    """One view of one sample, decoded.

    Attributes:
        key: of the sample.
        label: class number, None where it has none.
        view: number of the view.
        pixels_HWC: uint8, the rendered view, which is what the teacher saw.
        features_ST: float32, CLS first, patches in raster order; not unit length.
        attention_L: float32, the CLS token's over the patches; sums to 1.
        crop: top, left, height, width in source pixels.
        flip: whether the view is mirrored.
    """

    key: str
    label: int | None
    view: int
    pixels_HWC: NDArray[np.uint8]
    features_ST: NDArray[np.float32]
    attention_L: NDArray[np.float32]
    crop: tuple[int, int, int, int]
    flip: bool


class Targets:
    """A target store, local or in a bucket, of either format; its length is the number of samples.

    `targets[i]` is view 0 of sample i, `targets[i, k]` view k, and so with a key in place of i. Samples are counted
    through the shards in order. It may be read by several threads, and pickled: another process opens the store anew.
    """

    def __init__(self, store: TargetStore) -> None:
        """See `open_targets`; `store` gives runs of stored codes."""
        self.store = store
        self._ends = list(accumulate(store.samples(shard) for shard in store.shards))

    def __reduce__(self) -> tuple[Callable[[str], Targets], tuple[str]]:
        return open_targets, (str(self.store.location),)

    def __repr__(self) -> str:
        header = self.store.header
        return (
            f"<Targets {self.store.location}: {len(self)} samples, {self.views} views, teacher "
            f"{header.teacher.model!r}, grid {self.grid[0]} x {self.grid[1]}, codec {header.codec.name!r}>"
        )

    @property
    def header(self) -> StoreHeader:
        """What the targets depend on: teacher, views, codec, source."""
        return self.store.header

    @property
    def views(self) -> int:
        """K, views of each sample."""
        return self.store.header.views.count

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.store.header.teacher.grid

    @property
    def width(self) -> int:
        """T, of the teacher's features."""
        return self.store.header.teacher.width

    def __len__(self) -> int:
        return self._ends[-1]

    def keys(self) -> Iterator[str]:
        """Keys of all samples, in order.

        Raises:
            DataError: a shard is damaged.
        """
        for shard in self.store.shards:
            yield from self.store.keys(shard)

    def __iter__(self) -> Iterator[Target]:
        """View 0 of each sample."""
        return (self[number] for number in range(len(self)))

    def index(self, key: str) -> int:
        """Number of the sample with a key; the first call reads all keys.

        Raises:
            MissingError: there is none.
        """
        if key not in self._by_key:
            raise MissingError(self.no_sample(repr(key)))
        return self._by_key[key]

    @cached_property
    def _by_key(self) -> dict[str, int]:
        # The first of several with one key, as a list would find.
        return {key: number for number, key in reversed(list(enumerate(self.keys())))}

    def no_sample(self, names: str) -> str:
        """The message for keys that are not in the store."""
        some = ", ".join(self.store.keys(self.store.shards[0])[:3])
        return f"{self.store.location} has no sample {names}; its keys are such as {some}"

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key in self._by_key

    def location(self, number: int) -> tuple[int, int]:
        """Number of the shard, and of the row in it; negative numbers count from the end.

        Raises:
            IndexError: no such sample.
        """
        count = len(self)
        if not -count <= number < count:
            raise IndexError(f"{self.store.location} has no sample {number}; it has samples 0 to {count - 1}")
        number %= count
        shard = bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def block(self, number: int, view: int) -> Block:
        """One view of one sample, as `read_batch` takes it; raises as indexing does."""
        if not 0 <= view < self.views:
            raise IndexError(f"{self.store.location} has no view {view}; it has views 0 to {self.views - 1}")
        shard, row = self.location(number)
        return Block(shard, view, row, row + 1)

    def __getitem__(self, index: int | str | tuple[int | str, int]) -> Target:
        """One view of one sample.

        Raises:
            IndexError: no such sample or view.
            MissingError: no such key.
            TypeError: the index is neither; slices are for `as_dask` and `store.read`.
            DataError: the shard is damaged.
        """
        sample, view = index if isinstance(index, tuple) else (index, 0)
        if isinstance(sample, bool) or not isinstance(sample, int | str | np.integer):
            raise TypeError(
                f"targets are indexed by number or key, and view, as targets[3], targets['key', 1]; found {index!r}"
            )
        block = self.block(self.index(sample) if isinstance(sample, str) else int(sample), int(view))
        run = self.store.read(self.store.shards[block.shard], block.view, block.start, block.stop)
        label = int(run.label_N[0])
        try:
            pixels = decode_jpeg(run.jpegs[0], side=self.header.views.size)
        except DataError as error:
            raise DataError(f"the stored view {view} of {run.keys[0]} does not decode: {error}") from error
        return Target(
            key=str(run.keys[0]),
            label=None if label < 0 else label,
            view=int(view),
            pixels_HWC=pixels,
            features_ST=decode_run(self.header.codec, run)[0].numpy(),
            attention_L=run.attention_NL[0].astype(np.float32),
            crop=tuple(run.crop_N4[0].tolist()),
            flip=bool(run.flip_N[0]),
        )

    def as_torch_dataset(
        self, *, view: int | None = None, seed: int = 0, transform: Callable[[Target], Any] | None = None
    ) -> TargetDataset:
        """A map-style dataset for torch's DataLoader.

        `pretrain` reads runs of a shard instead, which is many times as fast; this is for code that expects a dataset.

        Args:
            view: which one, or SettingError; none takes another in each epoch, as `pretrain` does with this seed.
            transform: from a `Target` to what is handed out; none gives a dict of tensors.
        """
        return TargetDataset(self, view=view, seed=seed, transform=transform)

    def as_dask(self) -> DaskTargets:
        """All samples as lazy arrays of Dask, a chunk for each view of a block; computing raises as indexing does."""
        from milan_pipe.loader.dask_arrays import dask_targets

        return dask_targets(self.store)


class TargetDataset(Dataset[Any]):
    """Targets as a dataset of torch; see `Targets.as_torch_dataset`.

    Without a transform an item is a dict: `key`, `label` (-1 for none), `view`, `pixels` (3, H, W) uint8, `features`
    (S, T) and `attention` (L) float32.
    """

    def __init__(
        self, targets: Targets, *, view: int | None, seed: int, transform: Callable[[Target], Any] | None
    ) -> None:
        if view is not None and not 0 <= view < targets.views:
            raise SettingError(f"view is {view}; {targets.store.location} has views 0 to {targets.views - 1}")
        self.targets = targets
        self._view = view
        self._transform = transform
        self._epoch = 0
        store = targets.store
        sizes = tuple(store.samples(shard) for shard in store.shards)
        self._order = EpochOrder(samples=sizes, views=targets.views, block=BLOCK_SAMPLES, shuffle_blocks=1, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of this epoch; call it before a DataLoader's workers start."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        view = self._view
        if view is None:
            view = self._order.view_of(self._epoch, self.targets.location(index)[0])
        target = self.targets[index, view]
        if self._transform is not None:
            return self._transform(target)
        return {
            "key": target.key,
            "label": -1 if target.label is None else target.label,
            "view": target.view,
            "pixels": torch.from_numpy(target.pixels_HWC).permute(2, 0, 1).contiguous(),
            "features": torch.from_numpy(target.features_ST),
            "attention": torch.from_numpy(target.attention_L),
        }


def open_targets(where: str | Path) -> Targets:
    """Open a target store.

    Raises:
        MissingError: no such folder.
        DataError: not a store, no shard committed, or damaged.
        MismatchError: another schema version.
        StoreError: it cannot be reached.
    """
    return Targets(_open_store(where))
