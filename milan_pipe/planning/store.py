"""Bytes and files of a store that is to come, measured on stores of a few images that are really written.

Shape suffixes as in `milan_pipe.targets.schema`; K = 1 here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from milan_pipe import __version__
from milan_pipe.config.images import ViewSettings
from milan_pipe.config.targets import CodecSettings, StoreFormat
from milan_pipe.errors import DataError
from milan_pipe.extraction.render import Clock, RenderedSample, render_sample
from milan_pipe.images.count import ImageCount, spread_evenly
from milan_pipe.images.shards import ShardFile
from milan_pipe.images.tar import OnBad, read_shard
from milan_pipe.storage import location_of
from milan_pipe.targets.codec import Codec, build_codec, mean_cosine
from milan_pipe.targets.schema import (
    BLOCK_SAMPLES,
    CodecInfo,
    SourceInfo,
    SourceShard,
    StoreHeader,
    TargetBlock,
    TeacherInfo,
    ViewInfo,
)
from milan_pipe.targets.store import TargetStoreWriter
from milan_pipe.teacher.clip import TeacherOutput

CODECS = ("float16", "int8", "klt")
FORMATS: tuple[StoreFormat, ...] = ("zarr", "webdataset")

_MOST_LOCAL_SHARDS = 16
# Each of them costs a few blocks of read-ahead.
_MOST_REMOTE_SHARDS = 4
_SHARD = "000000"
_STORE_FILES = 3  # header, summary, bad_samples.jsonl
# Of a record, measured on those of shards of 10,000 images.
_FILE_ENTRY_BYTES, _BLOCK_ENTRY_BYTES = 190, 42


# --- images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageSample:
    """Images spread over the shards, the first view of each.

    Attributes:
        bad: images met that cannot be read.
        render_seconds: of one thread, for one view, an image's decoding shared by all its views.
    """

    rendered: tuple[RenderedSample, ...]
    bad: int
    render_seconds: float

    @property
    def pixels_NHWC(self) -> Tensor:
        """uint8, as the teacher sees them."""
        return torch.from_numpy(np.stack([sample.pixels_KHWC[0] for sample in self.rendered]))

    @property
    def jpeg_bytes(self) -> float:
        """Mean over views."""
        return sum(len(sample.jpegs[0]) for sample in self.rendered) / len(self.rendered)


def sample_images(
    shards: Sequence[ShardFile], views: ViewSettings, size: int, count: int, on_progress: Callable[[int], None]
) -> ImageSample:
    """Render one view of up to `count` images, the first of some shards, as an extraction would.

    Args:
        size: rendered side in pixels.
        on_progress: called with how many images are rendered.

    Raises:
        DataError: no image can be read, or a shard is empty, damaged or no tar.
        MissingError, StoreError: a shard cannot be read.
    """
    local = all(shard.location.local is not None for shard in shards)
    used = spread_evenly(shards, _MOST_LOCAL_SHARDS if local else _MOST_REMOTE_SHARDS)
    clock, one = Clock(), views.model_copy(update={"count": 1})
    bad: list[tuple[str, str]] = []
    rendered: list[RenderedSample] = []
    for position, shard in enumerate(used):
        # A shard with few images leaves its share to the next.
        wanted = count * (position + 1) // len(used) - len(rendered)
        for sample in islice(_rendered(shard, one, size, clock, lambda *found: bad.append(found)), wanted):
            rendered.append(sample)
            on_progress(len(rendered))
    if not rendered:
        first = f"; the first: {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise DataError(f"{shards[0]} and {len(used) - 1} other shards have no readable image to measure with{first}")
    seconds = clock.take()
    each_view = seconds["decode"] / views.count + seconds["crop"] + seconds["jpeg"]
    return ImageSample(rendered=tuple(rendered), bad=len(bad), render_seconds=each_view / len(rendered))


def _rendered(
    shard: ShardFile, views: ViewSettings, size: int, clock: Clock, on_bad: OnBad
) -> Iterator[RenderedSample]:
    for sample in read_shard(shard, on_bad):
        try:
            yield render_sample(sample, views, size, clock)
        except DataError as error:
            on_bad(sample.key, str(error))


# --- targets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """Targets of the sample in one codec, on the CPU; `mean_cosine` is over all its tokens."""

    info: CodecInfo
    code_NST: Tensor
    scale_NS: Tensor | None
    attention_NL: Tensor
    mean_cosine: float


def encode_sample(output: TeacherOutput, config: CodecSettings) -> EncodedSample:
    """Encode the teacher's outputs for the sample; codec klt is fitted to them.

    Raises:
        DataError: a feature cannot be stored, or codec klt cannot reach its quality.
    """
    features = output.features_BST.cpu()
    codec: Codec = build_codec(config, features)
    code, scale = codec.encode(features)
    row = output.importance_BL.cpu()
    return EncodedSample(
        info=codec.info,
        code_NST=code,
        scale_NS=scale,
        attention_NL=(row / row.sum(dim=1, keepdim=True)).to(torch.float16),
        mean_cosine=mean_cosine(features, codec.decode(code, scale)),
    )


def header_of(
    teacher: TeacherInfo, views: ViewSettings, size: int, codec: CodecInfo, store_format: StoreFormat
) -> StoreHeader:
    """The header that a store of these settings would have, but for its sources."""
    return StoreHeader(
        package_version=__version__,
        format=store_format,
        teacher=teacher,
        views=ViewInfo(size=size, **views.model_dump()),
        codec=codec,
        source=SourceInfo(shards=1, fingerprint=""),
    )


def _block(samples: Sequence[RenderedSample], encoded: EncodedSample, rows: slice) -> TargetBlock:
    views = [sample.views[0] for sample in samples[rows]]
    scale_NS = encoded.scale_NS
    return TargetBlock(
        keys=[sample.key for sample in samples[rows]],
        label_N=np.array([sample.label for sample in samples[rows]], np.int64),
        code_KNST=encoded.code_NST[rows][None].numpy(),
        scale_KNS=None if scale_NS is None else scale_NS[rows][None].numpy(),
        attention_KNL=encoded.attention_NL[rows][None].numpy(),
        crop_KN4=np.array([[(v.top, v.left, v.height, v.width) for v in views]], np.int32),
        flip_KN=np.array([[v.flip for v in views]], np.bool_),
        jpegs=[[sample.jpegs[0] for sample in samples[rows]]],
    )


# --- stores -------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class _Parts:
    """What a store of one shard and one view per image is made of.

    Attributes:
        view_bytes: all that grows with the views.
        shard_bytes: metadata of the shard.
        record_bytes, files: of the shard's record, and how many files it names.
        store_bytes: header, summary and list of bad samples.
        fixed_files: files of the shard whose number does not depend on the views.
        jpeg_file_bytes: after which the rendered views go on in another file; 0 where they lie beside the features.
    """

    view_bytes: int
    shard_bytes: int
    record_bytes: int
    files: int
    store_bytes: int
    fixed_files: int
    jpeg_file_bytes: int


def estimate_store(
    header: StoreHeader, sample: ImageSample, encoded: EncodedSample, images: ImageCount
) -> StoreEstimate:
    """Write the sample into a store in a temporary folder, and extrapolate to all images and views.

    Args:
        header: of the store that is meant, with all its views.

    Raises:
        StoreError: the temporary folder cannot be written.
    """
    parts = _measured(header, sample, encoded)
    per_shard = images.total / images.shards
    files = _files_of_shard(header, parts, per_shard, sample.jpeg_bytes)
    per_view = parts.view_bytes / len(sample.rendered)
    records = images.shards * _record_bytes(header, parts, files, per_shard)
    metadata = parts.store_bytes + images.shards * parts.shard_bytes + records
    total = metadata + images.total * header.views.count * per_view
    return StoreEstimate(
        codec=header.codec.name,
        format=header.format,
        bytes_per_view=per_view,
        bytes=round(total),
        # A record beside the files of each shard.
        files=images.shards * (files + 1) + _STORE_FILES,
        record_bytes=round(records),
        mean_cosine=encoded.mean_cosine,
    )


def _files_of_shard(header: StoreHeader, parts: _Parts, per_shard: float, jpeg_bytes: float) -> int:
    if header.format == "webdataset":
        return header.views.count
    blocks = ceil(per_shard / BLOCK_SAMPLES)
    jpeg_files = ceil(per_shard * header.views.count * jpeg_bytes / parts.jpeg_file_bytes)
    return parts.fixed_files + header.views.count * blocks + jpeg_files


def _record_bytes(header: StoreHeader, parts: _Parts, files: int, per_shard: float) -> float:
    """For each file a record has size, digest and, of large arrays, its end; of a tar also where each block begins."""
    blocks = header.views.count * ceil(per_shard / BLOCK_SAMPLES) if header.format == "webdataset" else 0
    return parts.record_bytes + _FILE_ENTRY_BYTES * (files - parts.files) + _BLOCK_ENTRY_BYTES * blocks


@contextmanager
def sample_store(header: StoreHeader, sample: ImageSample, encoded: EncodedSample) -> Iterator[Path]:
    """A store of one view of each image of the sample, in a temporary folder that goes with the context.

    Args:
        header: of the store that is meant, with all its views.

    Raises:
        StoreError: the temporary folder cannot be written.
    """
    one = header.model_copy(update={"views": header.views.model_copy(update={"count": 1})})
    with tempfile.TemporaryDirectory(prefix="milan-plan-") as folder:
        writer = TargetStoreWriter(folder, one)
        shard = writer.open_shard(_SHARD)
        for start in range(0, len(sample.rendered), BLOCK_SAMPLES):
            shard.append(_block(sample.rendered, encoded, slice(start, start + BLOCK_SAMPLES)))
        shard.commit(SourceShard(name="sample.tar", bytes=0, sha256="0" * 64, samples=len(sample.rendered), bad=()))
        writer.finish()
        yield Path(folder)


def _measured(header: StoreHeader, sample: ImageSample, encoded: EncodedSample) -> _Parts:
    with sample_store(header, sample, encoded) as folder:
        sizes = location_of(folder).sizes()
        jpeg_file_bytes, chunk_bytes = _jpeg_layout(folder) if header.format == "zarr" else (0, 0)
    of_shard = {path: size for path, size in sizes.items() if path.startswith(f"{_SHARD}/")}
    metadata = sum(size for path, size in of_shard.items() if path.endswith("/zarr.json"))
    record = next(size for path, size in sizes.items() if path.endswith(f"/{_SHARD}.json"))
    # Rendered views end in a chunk that is half empty on the average, whatever their number.
    padded = sum(size for path, size in of_shard.items() if path.startswith(f"{_SHARD}/view_bytes/c/"))
    padding = padded - sum(len(rendered.jpegs[0]) for rendered in sample.rendered) if padded else 0
    grows = [path for path in of_shard if path.startswith((f"{_SHARD}/features/c/", f"{_SHARD}/view_bytes/c/"))]
    return _Parts(
        view_bytes=sum(of_shard.values()) - metadata - padding,
        shard_bytes=metadata + chunk_bytes // 2,
        record_bytes=record,
        files=len(of_shard),
        store_bytes=sum(sizes.values()) - sum(of_shard.values()) - record,
        fixed_files=len(of_shard) - len(grows),
        jpeg_file_bytes=jpeg_file_bytes,
    )


def _jpeg_layout(store: Path) -> tuple[int, int]:
    """Bytes of rendered views in a file, and in a chunk of it."""
    metadata = json.loads((store / _SHARD / "view_bytes" / "zarr.json").read_bytes())
    (file_bytes,) = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    (chunk_bytes,) = metadata["codecs"][0]["configuration"]["chunk_shape"]
    return file_bytes, chunk_bytes
