"""The header of a target store, the records of its shards, and the two protocols that every backend meets."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt, StringConstraints

from milan_pipe.config.base import Settings
from milan_pipe.config.images import Renderer, ViewSettings
from milan_pipe.config.targets import StoreFormat
from milan_pipe.errors import MismatchError

SCHEMA_VERSION = 3
READABLE_VERSIONS = (2, 3)
SHARDS = "shards"
"""Folder of a store with a folder for each shard; in format zarr a group, below which nothing else lies."""

_MOST_SHOWN = 80

# A store is not trusted: its names must not lead outside of it.
ShardName = Annotated[str, StringConstraints(pattern=r"^[0-9]{6,9}$")]
"""Name of a shard: the number of its source shard."""

_ARRAYS = "features|scale|attention|crop|flip|view_offset|view_length|view_bytes|label|key"
FileName = Annotated[
    str, StringConstraints(pattern=rf"^(zarr\.json|({_ARRAYS})/(zarr\.json|c(/[0-9]+)+)|view-[0-9]+\.tar)$")
]
"""Path of a file below its shard's folder."""


NOT_COMPARED = frozenset(("license", "source"))
"""What is told of a teacher, and changes no target."""


class TeacherInfo(Settings):
    """What a target depends on, of the teacher.

    Attributes:
        model: open_clip name, or `demo`.
        pretrained: open_clip tag, or file name of a local checkpoint, or `random`, or none for `demo`.
        weights_sha256: over names, shapes and bytes of the image tower's tensors; the identity of the teacher, with
        structure_sha256: over what its description builds around them, as heads and activation, and the mean and std
            of its input. None in headers from before it was kept, which agree with any.
        normalization: `clip` or `imagenet`.
        precision: of the forward pass, `float32` or `bfloat16`.
        image_size: input side in pixels.
        grid: patches down and across.
        width: T.
        license, source: what is stated of the weights, and where they are published; None where nobody says. They
            describe, and are not compared.
    """

    model: str
    pretrained: str | None
    weights_sha256: str
    normalization: str
    precision: str
    image_size: PositiveInt
    grid: tuple[PositiveInt, PositiveInt]
    width: PositiveInt
    license: str | None = None
    source: str | None = None
    structure_sha256: str | None = None


class ViewInfo(Settings):
    """What a target depends on, of the views: their settings, and how they are rendered.

    Attributes:
        size: rendered side in pixels, the student's input.
        renderer: which one; headers from before there was a second do not say.
    """

    count: PositiveInt
    size: PositiveInt
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    seed: int
    jpeg_quality: int
    renderer: Renderer = "pillow"

    @property
    def settings(self) -> ViewSettings:
        """Those by which they were drawn."""
        return ViewSettings(**self.model_dump(include=set(ViewSettings.model_fields)))


class CodecInfo(Settings):
    """How stored codes become features; see `milan_pipe.targets.codec`.

    Attributes:
        zstd_level: of the entropy coder that the backends put after the codec; 0 stores codes as they are.
        quality, step, mean, basis: of codec `klt` alone, none elsewhere. Mean cosine that it was fitted for, width of a
            quantiser step on unit vectors, and base64 of little-endian arrays: the mean (T) float32, the basis (T, T)
            float16.
    """

    name: str
    zstd_level: int = 1
    quality: float | None = None
    step: float | None = None
    mean: str | None = None
    basis: str | None = None


class SourceInfo(Settings):
    """Where the images came from: number of source shards and a digest over their names.

    The content of a shard is in its own record, so that one that changes does not invalidate the others.
    """

    shards: PositiveInt
    fingerprint: str


class StoreHeader(Settings):
    """What a reader must agree with before it reads data; stored in the root file."""

    schema_version: int = SCHEMA_VERSION
    format: StoreFormat = "zarr"
    package_version: str
    teacher: TeacherInfo
    views: ViewInfo
    codec: CodecInfo
    source: SourceInfo

    @property
    def patches(self) -> int:
        """L."""
        return self.teacher.grid[0] * self.teacher.grid[1]

    @property
    def tokens(self) -> int:
        """S."""
        return 1 + self.patches


def shard_path(header: StoreHeader, name: str) -> str:
    """Where a shard's files lie in its store; beside the header, in stores of schema 2."""
    return f"{SHARDS}/{name}" if header.schema_version > 2 else name


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({len(text)} characters)"


def _by_name(header: StoreHeader) -> dict[str, Any]:
    """Values of a header by name, as `teacher.model`. The schema version tells layouts apart, not the package's."""
    unknown = {"structure_sha256"} if header.teacher.structure_sha256 is None else set()
    excluded: Any = {"package_version": True, "teacher": NOT_COMPARED | unknown}
    found = header.model_dump(mode="json", exclude=excluded)
    flat = {name: value for name, value in found.items() if not isinstance(value, dict)}
    return flat | {f"{name}.{key}": v for name, part in found.items() if name not in flat for key, v in part.items()}


def _differences(stored: Mapping[str, Any], expected: Mapping[str, Any], who: str) -> list[str]:
    return [
        f"{name}: store has {_short(stored[name])}, {who} {_short(value)}"
        for name, value in expected.items()
        if stored.get(name, value) != value
    ]


def header_differences(found: StoreHeader, expected: StoreHeader) -> list[str]:
    """Settings in which two headers differ, as `teacher.model: store has 'a', this run has 'b'`."""
    return _differences(_by_name(found), _by_name(expected), "this run has")


def require_same_header(found: StoreHeader, expected: StoreHeader, where: object) -> None:
    """Refuse to go on in a store of another configuration.

    Raises:
        MismatchError: names every setting that differs, with both values.
    """
    differences = header_differences(found, expected)
    if differences:
        advice = "Use the same settings, or another folder for the new ones"
        if found.schema_version != expected.schema_version:
            advice = (
                "This version reads that schema and adds to none but its own: finish the store with the version that "
                "began it; one that is complete is written anew by `milan-pipe convert-targets`"
            )
        elif found.views.renderer != expected.views.renderer:
            advice = (
                f"This version scales views by {expected.views.renderer} and adds to no store of another: take "
                "another folder, or finish this one with the version that began it"
            )
        raise MismatchError(f"{where} holds targets of another configuration: {'; '.join(differences)}. {advice}")


def require_stated(header: StoreHeader, stated: Mapping[str, Mapping[str, Any]], where: object) -> None:
    """Refuse a store that contradicts a run's settings of teacher and views.

    Args:
        stated: sections `teacher` and `views` with the settings that were given, not those left to their defaults.

    Raises:
        MismatchError: names every setting that differs, with both values.
    """
    expected = {f"{part}.{key}": v for part, values in stated.items() for key, v in values.items() if v is not None}
    differences = _differences(_by_name(header), expected, "the settings say")
    if differences:
        raise MismatchError(
            f"{where} does not fit the settings: {'; '.join(differences)}. Change the settings, or extract the targets "
            "that they describe"
        )


@dataclass(frozen=True, kw_only=True)
class SourceShard:
    """A source shard as its targets remember it: its file, samples kept, key and reason of each sample skipped."""

    name: str
    bytes: NonNegativeInt
    sha256: str
    samples: PositiveInt
    bad: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and digest of one file of a shard."""

    bytes: NonNegativeInt
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What was committed of one shard.

    Attributes:
        files: all files, by path below the shard's folder.
        blocks: offset and crc32c by which a reader knows parts of a file: of each tar its blocks of samples, of each
            large file of zarr its end.
        mean_cosine: of the stored tokens with the teacher's, over all views; None where it was not reported.
        views_sha256: of keys and rendered views, as `ViewDigest` takes it: the same in any format, of any teacher; None
            in records from before there was one.
    """

    source: SourceShard
    files: Mapping[FileName, FileRecord]
    blocks: Mapping[FileName, Sequence[tuple[NonNegativeInt, NonNegativeInt]]]
    mean_cosine: float | None = None
    views_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class TargetBlock:
    """Consecutive samples of one shard, all K views of each.

    Attributes:
        keys: N sample keys.
        label_N: int64, -1 where there is none.
        code_KNST: stored features, dtype of the codec.
        scale_KNS: float16, or None where the codec needs none.
        attention_KNL: float16, each row sums to 1 up to rounding.
        crop_KN4: int32; top, left, height, width in source pixels.
        flip_KN: bool.
        jpegs: K lists of N rendered views.
    """

    keys: Sequence[str]
    label_N: NDArray[np.int64]
    code_KNST: NDArray[Any]
    scale_KNS: NDArray[np.float16] | None
    attention_KNL: NDArray[np.float16]
    crop_KN4: NDArray[np.int32]
    flip_KN: NDArray[np.bool_]
    jpegs: Sequence[Sequence[bytes | memoryview]]


class ViewDigest:
    """sha256 over the views of a shard, block by block: what two teachers of the same images must have in common.

    Of each block, all numbers little-endian: the number of samples as uint64; each key as its length, uint64, and
    UTF-8; crops (K, N, 4) as int32, flips (K, N) as bytes 0 and 1; each JPEG, view after view, as its length and bytes.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, block: TargetBlock) -> None:
        """Count the next samples."""
        update = self._digest.update
        update(len(block.keys).to_bytes(8, "little"))
        for key in block.keys:
            name = key.encode("utf-8", "surrogatepass")
            update(len(name).to_bytes(8, "little") + name)
        update(np.ascontiguousarray(block.crop_KN4, "<i4").data)
        update(np.ascontiguousarray(block.flip_KN, np.uint8).data)
        for row in block.jpegs:
            for jpeg in row:
                update(len(jpeg).to_bytes(8, "little"))
                update(jpeg)

    def value(self) -> str:
        """The digest of what was counted."""
        return self._digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ViewRun:
    """Consecutive samples of one shard, one view of each; what training reads. Suffixes as in `TargetBlock`.

    Attributes:
        others: code and scale of the same samples in further stores.
    """

    keys: Sequence[str]
    label_N: NDArray[np.int64]
    code_NST: NDArray[Any]
    scale_NS: NDArray[np.float16] | None
    attention_NL: NDArray[np.float16]
    crop_N4: NDArray[np.int32]
    flip_N: NDArray[np.bool_]
    jpegs: Sequence[bytes | memoryview]
    others: tuple[tuple[NDArray[Any], NDArray[np.float16] | None], ...] = ()


class ShardFiles(Protocol):
    """What a backend does to write one shard: files in a local folder of its own."""

    def append(self, block: TargetBlock) -> None:
        """Write the next samples. All blocks but the last hold `BLOCK_SAMPLES` samples."""

    def close(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        """Write what is left; returns `ShardRecord.blocks`."""


class OpenShard(Protocol):
    """What a backend does to read one shard. Raises `DataError` naming shard and array where it is damaged."""

    def keys(self) -> Sequence[str]:
        """Keys of all samples, in order."""

    def read(self, view: int, start: int, stop: int, *, with_views: bool = True, with_features: bool = True) -> ViewRun:
        """Samples `start` to `stop` of one view, all within the shard.

        Without rendered views, `jpegs` is empty; without features, so are codes and attention, and there is no scale.
        """


BLOCK_SAMPLES = 128
"""Samples of one zarr-shard: the unit of writing and of sequential reading. Part of the schema."""
