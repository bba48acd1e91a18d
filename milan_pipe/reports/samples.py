"""Which samples of a store are looked at, and all that is stored of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from milan_pipe.errors import DataError, MissingError, SettingError
from milan_pipe.images.views import decode_jpeg
from milan_pipe.loader.order import Block
from milan_pipe.targets.codec import codec_of
from milan_pipe.targets.store import TargetStore

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class StoredView:
    """One view as it is stored.

    Attributes:
        pixels_HWC: uint8.
        feature_ST: float32, decoded; CLS first.
        attention_L: float32.
        crop: top, left, height, width in source pixels.
    """

    pixels_HWC: NDArray[np.uint8]
    feature_ST: NDArray[np.float32]
    attention_L: NDArray[np.float32]
    crop: tuple[int, int, int, int]
    flip: bool


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sample's location in the store; `shard` counts the shards, `row` within it."""

    key: str
    shard: int
    row: int

    def block(self, view: int) -> Block:
        """What the loader calls its place."""
        return Block(self.shard, view, self.row, self.row + 1)


def _by_key(store: TargetStore, keys: Sequence[str]) -> list[Sample]:
    found: dict[str, Sample] = {}
    wanted = set(keys)
    for number, shard in enumerate(store.shards):
        for row, key in enumerate(store.keys(shard)):
            if key in wanted and key not in found:
                found[key] = Sample(key=key, shard=number, row=row)
        if len(found) == len(wanted):
            break
    missing = [key for key in keys if key not in found]
    if missing:
        some = ", ".join(store.keys(store.shards[0])[:_SHOWN])
        raise MissingError(f"{store.location} has no sample {', '.join(missing)}; its keys are such as {some}")
    return [found[key] for key in keys]


def choose_samples(store: TargetStore, keys: Sequence[str], count: int) -> list[Sample]:
    """The samples that are named, in that order, or `count` of them spread evenly over the store.

    Raises:
        MissingError: a key is not in the store; says which, and what keys look like.
        SettingError: `count` is below 1.
    """
    if keys:
        return _by_key(store, keys)
    if count < 1:
        raise SettingError(f"number of images: found {count}, expected at least 1")
    sizes = [store.samples(shard) for shard in store.shards]
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    samples = []
    for index in sorted({total * (2 * number + 1) // (2 * count) for number in range(count)}):
        shard = int(np.searchsorted(ends, index, side="right"))
        row = index - int(ends[shard]) + sizes[shard]
        samples.append(Sample(key=store.keys(store.shards[shard])[row], shard=shard, row=row))
    return samples


def read_view(store: TargetStore, sample: Sample, view: int) -> StoredView:
    """All that is stored of one view.

    Raises:
        DataError: the shard is damaged.
    """
    run = store.read(store.shards[sample.shard], view, sample.row, sample.row + 1)
    scale = None if run.scale_NS is None else torch.from_numpy(run.scale_NS)
    feature_NST = codec_of(store.header.codec).decode(torch.from_numpy(run.code_NST), scale)
    try:
        pixels = decode_jpeg(run.jpegs[0])
    except DataError as error:
        raise DataError(f"the stored view {view} of {sample.key} does not decode: {error}") from error
    top, left, height, width = (int(value) for value in run.crop_N4[0])
    return StoredView(
        pixels_HWC=pixels,
        feature_ST=feature_NST[0].float().numpy(),
        attention_L=run.attention_NL[0].astype(np.float32),
        crop=(top, left, height, width),
        flip=bool(run.flip_N[0]),
    )
