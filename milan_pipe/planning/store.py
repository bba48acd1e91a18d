"""Bytes and files of a planned store, measured on written stores of a few images.

Shape suffixes as in `milan_pipe.targets.schema`; K = 1 here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milan_pipe.config.params import Params
from milan_pipe.config.targets import CodecSettings, StoreFormat
from milan_pipe.errors import DataError
from milan_pipe.extraction.fit import MOST_SHARDS, draw_images
from milan_pipe.extraction.render import Clock, RenderedSample
from milan_pipe.extraction.shard import header_of
from milan_pipe.extraction.stored import Images, StoredShard
from milan_pipe.images.count import ImageCount
from milan_pipe.loader.order import Block
from milan_pipe.loader.stream import Batch, read_batch
from milan_pipe.storage import location_of
from milan_pipe.targets import manifest
from milan_pipe.targets.codec import build_codec, mean_cosine
from milan_pipe.targets.schema import (
    BLOCK_SAMPLES,
    CodecInfo,
    SourceInfo,
    SourceShard,
    StoreHeader,
    TargetBlock,
    TeacherInfo,
    shard_path,
)
from milan_pipe.targets.store import TargetStore, TargetStoreWriter
from milan_pipe.targets.zarr_store import VIEW_CHUNK_BYTES, VIEW_SHARD_BYTES, stored_rows
from milan_pipe.teacher.clip import TeacherOutput

CODECS = ("float16", "int8", "klt")
FORMATS: tuple[StoreFormat, ...] = ("zarr", "webdataset")

# Each of them costs a few blocks of read-ahead.
_MOST_REMOTE_SHARDS = 4
_SHARD = "000000"
_STORE_FILES = 3  # header, summary, bad_samples.jsonl
# Of a record, measured on those of shards of 10,000 images.
_FILE_ENTRY_BYTES, _BLOCK_ENTRY_BYTES = 190, 42


@dataclass(frozen=True, kw_only=True)
class ImageSample:
    """Images spread over the shards, the first view of each.

    Attributes:
        bad: images met that cannot be read.
        render_seconds: of one thread, for one view, an image's decoding shared by all its views; of stored ones, to
            decode it.
    """

    rendered: tuple[RenderedSample, ...]
    bad: int
    render_seconds: float

    @property
    def jpeg_bytes(self) -> float:
        """Mean of a view."""
        return sum(len(image.jpegs[0]) for image in self.rendered) / len(self.rendered)

    @cached_property
    def pixels_NHWC(self) -> Tensor:
        """uint8, as the teacher sees them."""
        return torch.from_numpy(np.stack([sample.pixels_KHWC[0] for sample in self.rendered]))


def sample_images(
    shards: Sequence[Images], params: Params, count: int, on_progress: Callable[[int], None]
) -> ImageSample:
    """Render one view of up to `count` images, the first of some shards, as an extraction would.

    Raises:
        DataError: no image can be read, or a shard is empty, damaged or no tar.
        MissingError, StoreError: a shard cannot be read.
    """
    views, size = params.views, params.student.image_size
    most = MOST_SHARDS if all(shard.location.local is not None for shard in shards) else _MOST_REMOTE_SHARDS
    clock = Clock()
    bad: list[tuple[str, str]] = []
    rendered: list[RenderedSample] = []
    drawn = draw_images(shards, views, size, params.images, count, clock, lambda *found: bad.append(found), most)
    for _, sample in drawn:
        rendered.append(sample)
        on_progress(len(rendered))
    if not rendered:
        first, others = f"; the first: {bad[0][0]}: {bad[0][1]}" if bad else "", min(most, len(shards)) - 1
        looked_at = f"{shards[0]} and {others} more of {len(shards)} shards have" if others else f"{shards[0]} has"
        raise DataError(f"{looked_at} no readable image to measure with{first}")
    seconds = clock.take()
    decoded = 1 if isinstance(shards[0], StoredShard) else views.count
    each_view = seconds["decode"] / decoded + seconds.get("crop", 0.0) + seconds.get("jpeg", 0.0)
    return ImageSample(rendered=tuple(rendered), bad=len(bad), render_seconds=each_view / len(rendered))


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """The sample in one codec, as the loader would give it; `mean_cosine` is over all its tokens."""

    codec: CodecInfo
    batch: Batch
    mean_cosine: float


def encode_sample(sample: ImageSample, output: TeacherOutput, settings: CodecSettings) -> EncodedSample:
    """Encode the teacher's outputs for the sample, on the CPU; codec klt is fitted to them.

    Raises:
        DataError: a feature cannot be stored, or codec klt cannot reach its quality.
    """
    codec = build_codec(settings, output.features_BST)
    code, scale = codec.encode(output.features_BST)
    batch = Batch(
        keys=tuple(image.key for image in sample.rendered),
        pixels_BHWC=sample.pixels_NHWC,
        code_BST=code,
        scale_BS=scale,
        attention_BL=output.share_BL().to(torch.float16),
    )
    cosine = mean_cosine(output.features_BST, codec.decode(code, scale))
    return EncodedSample(codec=codec.info, batch=batch, mean_cosine=cosine)


def stored_codes(reader: TargetStore, sample: ImageSample) -> EncodedSample:
    """What a store has for as many images as the sample has, which stands for theirs.

    Raises:
        DataError: the store is damaged.
    """
    first = reader.shards[0]
    some = read_batch(reader, Block(0, 0, 0, min(BLOCK_SAMPLES, reader.samples(first))))
    row_B = torch.arange(len(sample.rendered)) % len(some.keys)
    kept = {**some.each(lambda values: values[row_B]), "pixels_BHWC": sample.pixels_NHWC}
    batch = replace(some, keys=tuple(image.key for image in sample.rendered), **kept)
    return EncodedSample(codec=reader.header.codec, batch=batch, mean_cosine=1.0)


def planned_header(params: Params, teacher: TeacherInfo, codec: CodecInfo, store_format: StoreFormat) -> StoreHeader:
    """The header that a store of these settings would have, but for its sources."""
    header = header_of(params, teacher, codec, SourceInfo(shards=1, fingerprint=""))
    return header.model_copy(update={"format": store_format})


@dataclass(frozen=True, kw_only=True)
class StoreEstimate:
    """A store of one codec and format.

    Attributes:
        bytes_per_view: measured: all that grows with the views, JPEG and padding included.
        bytes, files: of the whole store, extrapolated.
        record_bytes: of its shards' records, in `bytes`.
        mean_cosine: of the codec, measured on the sample.
    """

    codec: str
    format: StoreFormat
    bytes_per_view: float
    bytes: int
    files: int
    record_bytes: int
    mean_cosine: float


def estimate_store(
    header: StoreHeader, sample: ImageSample, encoded: EncodedSample, images: ImageCount
) -> StoreEstimate:
    """Write the sample into a store as `sample_store` does, and extrapolate to all images and views."""
    with sample_store(header, sample, encoded) as folder:
        sizes = location_of(folder).sizes()
    folder_of_shard = shard_path(header, _SHARD)
    of_shard = {path: size for path, size in sizes.items() if path.startswith(f"{folder_of_shard}/")}
    metadata = sum(size for path, size in of_shard.items() if path.endswith("/zarr.json"))
    record = sizes[f"{manifest.FOLDER}/{_SHARD}.json"]
    view_bytes = float(sum(of_shard.values()) - metadata)
    views, per_shard = header.views.count, images.total / images.shards
    blocks = views * ceil(per_shard / BLOCK_SAMPLES)
    shard_bytes, record_bytes = float(metadata), float(record)
    if header.format == "webdataset":
        files = views
        record_bytes += _BLOCK_ENTRY_BYTES * blocks
    else:
        features, jpegs, *padded = (
            [path for path in of_shard if path.startswith(f"{folder_of_shard}/{name}/c/")]
            for name in ("features", "view_bytes", "scale", "attention")
        )
        jpeg_files = ceil(per_shard * views * sample.jpeg_bytes / VIEW_SHARD_BYTES)
        files = len(of_shard) - len(features) - len(jpegs) + blocks + jpeg_files
        # Rendered views end in a chunk that is half empty on the average, whatever their number.
        view_bytes -= sum(of_shard[path] for path in jpegs) - sample.jpeg_bytes * len(sample.rendered)
        shard_bytes += VIEW_CHUNK_BYTES // 2
        # Whole blocks, whatever the last one holds.
        rows = stored_rows(len(sample.rendered))
        row_bytes = sum(of_shard[path] for path in chain(*padded)) / rows
        view_bytes -= row_bytes * (rows - len(sample.rendered))
        shard_bytes += row_bytes * views * (stored_rows(ceil(per_shard)) - per_shard)
    record_bytes += _FILE_ENTRY_BYTES * (files - len(of_shard))
    per_view = view_bytes / len(sample.rendered)
    store_bytes = sum(sizes.values()) - sum(of_shard.values()) - record
    total = store_bytes + images.shards * (shard_bytes + record_bytes) + images.total * views * per_view
    return StoreEstimate(
        codec=header.codec.name,
        format=header.format,
        bytes_per_view=per_view,
        bytes=round(total),
        # A record beside the files of each shard.
        files=images.shards * (files + 1) + _STORE_FILES,
        record_bytes=round(images.shards * record_bytes),
        mean_cosine=encoded.mean_cosine,
    )


@contextmanager
def sample_store(header: StoreHeader, sample: ImageSample, encoded: EncodedSample) -> Iterator[Path]:
    """A store of one view of each image of the sample, in a temporary folder that goes with the context.

    Args:
        header: of the store that is meant, with all its views.

    Raises:
        StoreError: the temporary folder cannot be written.
    """
    policy, source = header.views.model_copy(update={"count": 1}), header.source.model_copy(update={"shards": 1})
    one = header.model_copy(update={"views": policy, "source": source})
    with tempfile.TemporaryDirectory(prefix="milan-plan-") as folder:
        writer = TargetStoreWriter(folder, one)
        shard = writer.open_shard(_SHARD)
        for start in range(0, len(sample.rendered), BLOCK_SAMPLES):
            images = sample.rendered[start : start + BLOCK_SAMPLES]
            batch = encoded.batch.rows(start, start + BLOCK_SAMPLES)
            views = [image.views[0] for image in images]
            block = TargetBlock(
                keys=batch.keys,
                label_N=np.array([image.label for image in images], np.int64),
                code_KNST=batch.code_BST[None].numpy(),
                scale_KNS=None if batch.scale_BS is None else batch.scale_BS[None].numpy(),
                attention_KNL=batch.attention_BL[None].numpy(),
                crop_KN4=np.array([[(v.top, v.left, v.height, v.width) for v in views]], np.int32),
                flip_KN=np.array([[v.flip for v in views]], np.bool_),
                jpegs=[[image.jpegs[0] for image in images]],
            )
            shard.append(block)
        shard.commit(SourceShard(name="sample.tar", bytes=0, sha256="0" * 64, samples=len(sample.rendered), bad=()))
        writer.finish()
        yield Path(folder)
