"""Small target stores for tests: headers, random blocks, whole stores, and what a reader gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan_pipe.config.targets import CodecSettings
from milan_pipe.images.views import encode_jpeg
from milan_pipe.storage import location_of
from milan_pipe.targets.codec import build_codec
from milan_pipe.targets.schema import (
    BLOCK_SAMPLES,
    CodecInfo,
    SourceInfo,
    SourceShard,
    StoreHeader,
    TargetBlock,
    TeacherInfo,
    ViewInfo,
    ViewRun,
)
from milan_pipe.targets.store import TargetStore, TargetStoreWriter, open_targets

BAD = (("worse", "damaged"),)


@cache
def codec_info(name: str, zstd_level: int, width: int) -> CodecInfo:
    """A codec of `width` dimensions; `klt` is fitted to noise."""
    settings = CodecSettings(name=name, zstd_level=zstd_level)  # type: ignore[arg-type]
    features = torch.randn(32, 5, width, generator=torch.Generator().manual_seed(0))
    return build_codec(settings, features).info


def header(
    codec: str = "int8",
    *,
    format: str = "zarr",
    zstd_level: int = 1,
    views: int = 2,
    shards: int = 1,
    size: int = 16,
    **teacher: Any,
) -> StoreHeader:
    """A header; `size` is the side of views and teacher input, keywords replace what is said of the teacher."""
    teacher = {
        "model": "demo",
        "pretrained": None,
        "weights_sha256": "ab" * 32,
        "normalization": "clip",
        "precision": "float32",
        "image_size": size,
        "grid": (2, 2),
        "width": 6,
        **teacher,
    }
    return StoreHeader(
        package_version="0.test",
        format=format,  # type: ignore[arg-type]
        teacher=TeacherInfo(**teacher),
        views=ViewInfo(count=views, size=size, scale=(0.2, 1), ratio=(0.75, 1.25), flip=0.5, seed=3, jpeg_quality=95),
        codec=codec_info(codec, zstd_level, teacher["width"]),
        source=SourceInfo(shards=shards, fingerprint="f" * 64),
    )


def random_block(head: StoreHeader, keys: Sequence[str], rng: np.random.Generator) -> TargetBlock:
    """A block that keeps every promise of a store: codes in range, attention that sums to 1, JPEGs that decode."""
    k, n, s, t, side = head.views.count, len(keys), head.tokens, head.teacher.width, head.views.size
    is_float = head.codec.name == "float16"
    attention = rng.random((k, n, head.patches)) + 0.05
    pixels = rng.integers(0, 256, (k, n, side, side, 3), dtype=np.uint8)
    return TargetBlock(
        keys=list(keys),
        label_N=rng.integers(-1, 9, n),
        code_KNST=rng.normal(size=(k, n, s, t)).astype(np.float16)
        if is_float
        else rng.integers(-127, 128, (k, n, s, t), np.int8),
        scale_KNS=None if is_float else rng.random((k, n, s)).astype(np.float16),
        attention_KNL=(attention / attention.sum(-1, keepdims=True)).astype(np.float16),
        crop_KN4=rng.integers(1, 500, (k, n, 4), np.int32),
        flip_KN=rng.random((k, n)) < 0.5,
        jpegs=[[encode_jpeg(image, head.views.jpeg_quality) for image in view] for view in pixels],
    )


def random_blocks(head: StoreHeader, samples: int, seed: int = 0, keys: Sequence[str] = ()) -> list[TargetBlock]:
    """Blocks of one shard; keys hold a slash and a letter that is no ASCII unless they are given."""
    rng = np.random.default_rng(seed)
    names = list(keys) or [f"dir/k\u00e9y-{seed}-{row}" for row in range(samples)]
    return [
        random_block(head, names[start : min(start + BLOCK_SAMPLES, samples)], rng)
        for start in range(0, samples, BLOCK_SAMPLES)
    ]


def blocks_with_views_of(head: StoreHeader, like: list[TargetBlock] | None, count: int, seed: int) -> list[TargetBlock]:
    """Random targets, of the views of other blocks where they are given."""
    own = random_blocks(head, count, seed)
    if like is None:
        return own
    views = ("keys", "label_N", "crop_KN4", "flip_KN", "jpegs")
    return [replace(one, **{name: getattr(of, name) for name in views}) for one, of in zip(own, like, strict=True)]


def source(samples: int, name: str = "train-000000.tar", bad: Sequence[tuple[str, str]] = ()) -> SourceShard:
    """What a shard says of its source."""
    return SourceShard(name=name, bytes=123, sha256="cd" * 32, samples=samples, bad=tuple(bad))


def commit(writer: TargetStoreWriter, name: str, blocks: Sequence[TargetBlock]) -> None:
    """Write one shard, with one sample skipped."""
    shard = writer.open_shard(name)
    for block in blocks:
        shard.append(block)
    shard.commit(source(sum(len(block.keys) for block in blocks), f"train-{name}.tar", BAD))


def write_store(where: str | Path, head: StoreHeader, sizes: Sequence[int]) -> dict[str, list[TargetBlock]]:
    """Write a whole store; shard i has `sizes[i]` samples. Returns what was written, by shard."""
    return write_blocks(where, head, [random_blocks(head, size, number) for number, size in enumerate(sizes)])


def write_blocks(
    where: str | Path, head: StoreHeader, shards: Sequence[list[TargetBlock]]
) -> dict[str, list[TargetBlock]]:
    """Write a store of given blocks, one list per shard; it is finished where that is all that its header tells of."""
    writer = TargetStoreWriter(where, head)
    written = {f"{number:06d}": blocks for number, blocks in enumerate(shards)}
    for name, blocks in written.items():
        commit(writer, name, blocks)
    if len(written) == head.source.shards:
        writer.finish()
    return written


def tree(where: str | Path) -> dict[str, bytes]:
    """Path and bytes of every file of a store."""
    location = location_of(where)
    return {path: location.read(path) for path in location.sizes()}


def joined(blocks: Sequence[TargetBlock], view: int) -> ViewRun:
    """All samples of one view, as a reader gives them."""
    scales = [block.scale_KNS[view] for block in blocks if block.scale_KNS is not None]
    return ViewRun(
        keys=[key for block in blocks for key in block.keys],
        label_N=np.concatenate([block.label_N for block in blocks]),
        code_NST=np.concatenate([block.code_KNST[view] for block in blocks]),
        scale_NS=np.concatenate(scales) if scales else None,
        attention_NL=np.concatenate([block.attention_KNL[view] for block in blocks]),
        crop_N4=np.concatenate([block.crop_KN4[view] for block in blocks]),
        flip_N=np.concatenate([block.flip_KN[view] for block in blocks]),
        jpegs=[jpeg for block in blocks for jpeg in block.jpegs[view]],
    )


def differences(found: ViewRun, expected: ViewRun, start: int = 0, stop: int | None = None) -> list[str]:
    """Fields of a run that are not those of samples `start` to `stop` of `expected`, type included."""
    rows = slice(start, stop)
    wrong = [] if list(found.keys) == list(expected.keys[rows]) else ["keys"]
    wrong += [] if [bytes(j) for j in found.jpegs] == [bytes(j) for j in expected.jpegs[rows]] else ["jpegs"]
    for name in ("label_N", "code_NST", "scale_NS", "attention_NL", "crop_N4", "flip_N"):
        left, right = getattr(found, name), getattr(expected, name)
        if left is None or right is None:
            same = left is right
        else:
            same = left.dtype == right.dtype and left.tobytes() == right[rows].tobytes()
        wrong += [] if same else [name]
    return wrong


def check_store(store: TargetStore, written: Mapping[str, Sequence[TargetBlock]]) -> None:
    """Every shard and view equals what was written."""
    assert store.shards == tuple(written)
    for shard, blocks in written.items():
        for view in range(store.header.views.count):
            run = store.read(shard, view, 0, store.samples(shard))
            assert differences(run, joined(blocks, view)) == [], (shard, view)


def wrong_values(where: str | Path, truth: Mapping[str, Sequence[ViewRun]]) -> Iterator[str]:
    """Read as training does, in blocks, and across them; yields what a read gave that was never written.

    Raises:
        MilanError: as the reader does.
    """
    store = open_targets(where)
    for shard, runs in truth.items():
        for view, run in enumerate(runs):
            count = len(run.keys)
            cuts = [(start, min(start + BLOCK_SAMPLES, count)) for start in range(0, count, BLOCK_SAMPLES)]
            for start, stop in [*cuts, (count // 3, count - count // 5), (0, 1), (count - 1, count)]:
                wrong = differences(store.read(shard, view, start, stop), run, start, stop)
                if wrong:
                    yield f"{shard}, view {view}, {start}:{stop}: {wrong}"
