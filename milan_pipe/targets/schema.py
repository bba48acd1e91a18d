"""The header of a target store, the records of its shards, and the two protocols that every backend meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from milan_pipe.errors import MismatchError
from milan_pipe.settings import Settings

SCHEMA_VERSION = 1


class TeacherInfo(Settings):
    """What a target depends on, of the teacher.

    Attributes:
        model: open_clip name, or `demo`.
        pretrained: open_clip tag, or file name of a local checkpoint, or `random`, or none for `demo`.
        weights_sha256: over names, shapes and bytes of the image tower's tensors; the identity of the teacher.
        normalization: `clip` or `imagenet`.
        image_size: input side in pixels.
        grid: patches down and across.
        width: T.
    """

    model: str
    pretrained: str | None
    weights_sha256: str
    normalization: str
    image_size: int
    grid: tuple[int, int]
    width: int


class ViewInfo(Settings):
    """What a target depends on, of the view policy. `size` is the rendered side in pixels, the student's input."""

    count: int
    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    seed: int
    jpeg_quality: int


class CodecInfo(Settings):
    """How stored codes become features; see `milan_pipe.targets.codec`."""

    name: str


class SourceInfo(Settings):
    """Where the images came from: names of the source shards and a digest over their names and sizes."""

    shards: int
    fingerprint: str


class StoreHeader(Settings):
    """Root attributes of a store; everything that a reader must agree with before the first byte of data."""

    schema_version: int = SCHEMA_VERSION
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


def header_differences(found: StoreHeader, expected: StoreHeader) -> list[str]:
    """Settings in which two headers differ, as `teacher.model: store has 'a', this run has 'b'`.

    The package version is told and not compared: the schema version says whether the layout changed.
    """
    differences = []
    left, right = found.model_dump(mode="json"), expected.model_dump(mode="json")
    for section, value in left.items():
        if section == "package_version":
            continue
        ours, theirs = right[section], value
        if not isinstance(value, dict):
            ours, theirs = {"": ours}, {"": theirs}
        for key, there in theirs.items():
            if there != ours[key]:
                name = f"{section}.{key}" if key else section
                differences.append(f"{name}: store has {there!r}, this run has {ours[key]!r}")
    return differences


def require_same_header(found: StoreHeader, expected: StoreHeader, where: Path) -> None:
    """Refuse to go on in a store of another configuration.

    Raises:
        MismatchError: names every setting that differs, with both values.
    """
    differences = header_differences(found, expected)
    if differences:
        raise MismatchError(
            f"{where} holds targets of another configuration: {'; '.join(differences)}. "
            "Use the same settings, or another folder for the new ones"
        )


def require_stated(header: StoreHeader, stated: Mapping[str, Mapping[str, Any]], where: Path) -> None:
    """Refuse a store that contradicts what a run's settings say of teacher and views.

    Args:
        stated: sections `teacher` and `views` with the settings that were given, not those left to their defaults.

    Raises:
        MismatchError: names every setting that differs, with both values.
    """
    differences = []
    for section, values in stated.items():
        found = getattr(header, section).model_dump(mode="json")
        for key, ours in values.items():
            if ours is not None and key in found and found[key] != ours:
                differences.append(f"{section}.{key}: store has {found[key]!r}, the settings say {ours!r}")
    if differences:
        raise MismatchError(
            f"{where} does not fit the settings: {'; '.join(differences)}. Change the settings, or extract the targets "
            "that they describe"
        )


@dataclass(frozen=True, kw_only=True)
class SourceShard:
    """A source shard as its targets remember it: file name, bytes, samples kept, samples set aside (key, reason)."""

    name: str
    bytes: int
    samples: int
    bad: tuple[tuple[str, str], ...]


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
    jpegs: Sequence[Sequence[bytes]]


@dataclass(frozen=True, kw_only=True)
class ViewRun:
    """Consecutive samples of one shard, one view of each; what training reads. Suffixes as in `TargetBlock`."""

    keys: Sequence[str]
    label_N: NDArray[np.int64]
    code_NST: NDArray[Any]
    scale_NS: NDArray[np.float16] | None
    attention_NL: NDArray[np.float16]
    crop_N4: NDArray[np.int32]
    flip_N: NDArray[np.bool_]
    jpegs: Sequence[bytes]


class ShardWriter(Protocol):
    """Targets of one shard in the making: invisible to readers until `commit`."""

    def append(self, block: TargetBlock) -> None:
        """Write the next samples. All blocks but the last hold `BLOCK_SAMPLES` samples."""

    def commit(self, source: SourceShard) -> None:
        """Make the shard visible, whole."""

    def discard(self) -> None:
        """Remove what was written."""


class TargetWriter(Protocol):
    """A store that shards are added to."""

    def committed(self) -> dict[str, SourceShard]:
        """Shards that are whole, by name."""

    def open_shard(self, name: str) -> ShardWriter:
        """Begin a shard; what an interrupted attempt left is removed."""

    def finish(self) -> None:
        """Write `bad_samples.jsonl` for all committed shards."""


class TargetReader(Protocol):
    """A store that is read."""

    header: StoreHeader
    shards: tuple[str, ...]

    def samples(self, shard: str) -> int:
        """Number of samples of a shard."""

    def read(self, shard: str, view: int, start: int, stop: int) -> ViewRun:
        """Samples `start` to `stop` of one view of a shard."""


BLOCK_SAMPLES = 128
"""Samples of one zarr-shard: the unit of writing and of sequential reading. Part of the schema."""
