"""A target store as lazy arrays of Dask."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dask.array as da
import numpy as np
from dask.delayed import delayed
from numpy.typing import NDArray

from milan_pipe.targets.codec import decode_run
from milan_pipe.targets.schema import BLOCK_SAMPLES
from milan_pipe.targets.store import TargetStore, open_targets


@dataclass(frozen=True, kw_only=True)
class DaskTargets:
    """All samples of a store; N counts through the shards in order.

    Attributes:
        features: (K, N, S, T) float32, decoded; CLS first, patches in raster order.
        attention: (K, N, L) float32.
        crop: (K, N, 4) int32; top, left, height, width in source pixels.
        flip: (K, N) bool.
        label: (N,) int64, -1 where there is none.
        key: (N,) strings.
    """

    features: Any
    attention: Any
    crop: Any
    flip: Any
    label: Any
    key: Any


@lru_cache(maxsize=8)
def _opened(where: str, identity: str) -> TargetStore:
    del identity  # part of the key: a store that is written again in the same location is another one
    return open_targets(where)


def _read(where: str, identity: str, view: int, shard: str, start: int, stop: int) -> dict[str, NDArray[Any]]:
    store = _opened(where, identity)
    run = store.read(shard, view, start, stop)
    return {
        "features": decode_run(store.header.codec, run).numpy(),
        "attention": run.attention_NL.astype(np.float32),
        "crop": run.crop_N4,
        "flip": run.flip_N,
        "label": run.label_N,
        "key": np.array(run.keys, dtype=object),
    }


def dask_targets(store: TargetStore) -> DaskTargets:
    """Arrays of a store; nothing is read before they are computed.

    A chunk is one view of a block of samples, stored together; all arrays of a chunk come from one read. Workers
    elsewhere need the store under the same name.
    """
    where, header = str(store.location), store.header
    shards = "".join(f"{shard} {store.samples(shard)}\n" for shard in store.shards)
    identity = hashlib.sha256(f"{header.model_dump_json()}\n{shards}".encode()).hexdigest()
    tails: dict[str, tuple[tuple[int, ...], type]] = {
        "features": ((header.tokens, header.teacher.width), np.float32),
        "attention": ((header.patches,), np.float32),
        "crop": ((4,), np.int32),
        "flip": ((), np.bool_),
        "label": ((), np.int64),
        "key": ((), object),
    }
    read = delayed(_read, pure=True)
    blocks = [
        (shard, start, min(start + BLOCK_SAMPLES, store.samples(shard)))
        for shard in store.shards
        for start in range(0, store.samples(shard), BLOCK_SAMPLES)
    ]

    def rows(name: str, found: list[Any]) -> Any:
        tail, dtype = tails[name]
        parts = [
            da.from_delayed(one[name], (stop - start, *tail), dtype=dtype)
            for one, (_, start, stop) in zip(found, blocks, strict=True)
        ]
        return da.concatenate(parts)

    views = [[read(where, identity, view, *block) for block in blocks] for view in range(header.views.count)]
    arrays = {
        name: da.stack([rows(name, view) for view in views]) for name in ("features", "attention", "crop", "flip")
    }
    return DaskTargets(**arrays, label=rows("label", views[0]), key=rows("key", views[0]))
